"""The published languages of parallel blocks, one definition each, and where each text differs from the original.

Positions never depend on a definition: a node starts after the longest of its context parents (docs/design.md), and
what is forced is ordinary tokens of the node that it stands in.
"""

from __future__ import annotations

from dataclasses import replace

from orchestra.protocols.blocks import Blocks

MULTIVERSE = Blocks(
    name="multiverse",
    paper="Yang et al. 2025, arXiv 2506.09991",
    plan="Goal",
    outline="Outline",
    path="Path",
    conclusion="Conclusion",
    nested=5,
    header="<Path>\n{label}:",
    join="<Conclusion>",
)
"""Positions are those of the published training code: each `<Path>` stands one after `</Goal>`, `<Conclusion>` one
after the longest path. Nothing stands between them, so nothing shifts."""

MULTIVERSE_ENGINE = replace(MULTIVERSE, name="multiverse_engine", lead="\n", after="\n", join="<Conclusion>\n")
"""As the published engine serves the published checkpoints: a line break before the paths and one after each take
positions, so paths stand at `</Goal>` + 2. The original keeps whatever token follows `</Path>`, usually that break."""

THREAD_WEAVER = Blocks(
    name="thread_weaver",
    paper="Lian et al. 2025, arXiv 2512.07843",
    plan="Outlines",
    outline="Outline",
    path="Thread",
    strict=True,
    gap="\n",
    lead="\n",
    header="<Thread>\n{label}:",
    join="\n",
    closing="\n",
    recompute=True,
)
"""Threads are written one after the other into one causal context. The model closes the block itself."""

NPR = Blocks(
    name="npr",
    paper="Native Parallel Reasoner 2025, arXiv 2512.07461",
    block="",
    plan="guideline",
    outline="plan",
    path="step",
    conclusion="takeaway",
    header="<step>{label}:",
    join="<takeaway>",
)
"""Multiverse's blocks without a tag around them."""

PARALLEL_R1 = Blocks(
    name="parallel_r1",
    paper="Zheng et al. 2025, arXiv 2509.07980",
    path="Path",
    conclusion="Summary",
    header="<Path>",
    join="</Parallel><Summary>",
    recompute=True,
)
"""The model only opens a block; how many paths look at the same context is the runtime's choice. Joined as text in the
original's *seen* variant; `join="reuse"` is its *unseen* one."""

PARA_THINKER = Blocks(
    name="para_thinker",
    paper="Wen et al. 2025, arXiv 2509.04475",
    block="",
    path="think{label}",
    conclusion="summary",
    header="<think{label}>",
    join="<summary>",
)
"""Whole thoughts from the end of the prompt. The original adds a learned embedding for each thought, which plain
checkpoints do not have: here the tag alone tells the thoughts apart."""
