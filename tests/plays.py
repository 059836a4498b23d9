"""What the speaker model has learned to say: for each play a strategy, a prompt, and the model's part in it.

To add a play, add it to `PLAYS`. A play's part is greedy, so no two contexts that are equal may go on differently; the
builder says so where they do. Texts cost training time by the letter: keep them short.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from plays_protocols import SCRIPTS

from orchestra import Thread, strategy
from orchestra.runtime.engine import Prompt
from orchestra.strategies.base import Spec
from orchestra.testing.scripted import Script
from orchestra.thread import Join

_NAMES = (
    *("think", "Think", "Parallel", "Goal", "Outline", "Outlines", "Path", "Thread", "Conclusion"),
    *("guideline", "plan", "step", "takeaway", "Summary", "summary", *(f"think{i}" for i in range(1, 9))),
)
TAGS = tuple(tag for name in _NAMES for tag in (f"<{name}>", f"</{name}>"))
"""Tags that are one token. What else looks like a tag (`<FORK-1>`) is spelled in bytes."""


@dataclass(frozen=True)
class Play:
    """A run, and what the model says in it.

    Attributes:
        name: of the play.
        strategy: in any of its three forms.
        prompt: of the run.
        script: see `orchestra.testing.scripted.Script`; what it says ends by end-of-sequence, a stop or a limit.
        settings: of the run (`max_tokens`, ...); it is greedy.
    """

    name: str
    strategy: Spec
    prompt: Prompt
    script: Script
    settings: Mapping[str, Any] = field(default_factory=dict)


def after(parts: Mapping[str, str]) -> Script:
    """A script that says what stands beside the longest ending of the context."""

    def script(context: str, path: tuple[int, ...]) -> str:
        ending = max((ending for ending in parts if context.endswith(ending)), key=len, default=None)
        assert ending is not None, f"thread {path}: nothing to say after {context[-80:]!r}"
        return parts[ending]

    return script


@strategy
async def weighed(thread: Thread, how: Join = "auto") -> Thread:
    """Two views, brought together."""
    views = await thread.fork(["\nFor:", "\nAgainst:"]).generate(stop="\n")
    return await thread.join(views, "So:", how=how).generate()


@strategy
async def nested(thread: Thread, how: Join = "auto") -> Thread:
    """Two branches of two leaves each: joins inside a join."""

    async def branch(side: Thread) -> Thread:
        side = await side.generate(stop=":")
        leaves = await side.fork([" one", " two"]).generate(stop=";")
        return await side.join(leaves, " both", how=how).generate(stop=".")

    sides = await thread.fork(["\nleft", "\nright"]).map(branch)
    return await thread.join(sides, "\nall", how=how).generate()


@strategy
async def outlined(thread: Thread) -> Thread:
    """Tags as stops, paths in parallel, a reuse join: the shape of Multiverse."""
    goal = await thread.generate(stop="</Goal>")
    labels = re.findall(r"<Outline>\s*([\d.]+):", goal.generated)
    paths = await goal.fork([f"\n<Path>\n{label}:" for label in labels]).generate(stop="</Path>")
    return await goal.join(paths, "\n<Conclusion>", how="reuse").generate()


WEIGHED = {
    "For:": " it is warm, and we can swim.\n",
    "Against:": " the sand.\n",
    "So:": " we go. answer: yes",
}
NESTED = {
    "left": " side, of leaves:",
    "right": ":",
    "leaves: one": " red leaf;",
    "leaves: two": " green;",
    "right: one": " apple;",
    "right: two": " pear and plum;",
    "green; both": " leaves.",
    "plum; both": " sorts of fruit.",
    "all": " a tree\nanswer: 4",
}
OUTLINED = {
    "Sum and product of 6 and 7?": (
        "<Think>Both can be done at once.\n<Parallel>\n<Goal>\n<Outline> 1: add </Outline>\n"
        "<Outline> 2: multiply </Outline>\n</Goal>"
    ),
    "\n1:": " 6 + 7 = 13 </Path>",
    "\n2:": " 6 * 7 is 6 * 5 + 6 * 2, which makes 42 </Path>",
    "<Conclusion>": " 13 and 42 </Conclusion>\n</Parallel>\n</Think>\nanswer: 13, 42",
}
SPAWNED = {
    "children: free\n": (
        " spawn: 7 + 3 = 10 left: 8 10 12\n spawn: 8 + 3 = 11 left: 7 11 12\n spawn: 12 / 3 = 4 left: 4 7 8\n join:"
    ),
    "step: 7 + 3 = 10 left: 8 10 12 target: 55": " 8 + 10 = 18 x 12\n answer: none",
    "step: 8 + 3 = 11 left: 7 11 12 target: 55": (
        " 12 + 7 = 19 x 11\n 12 - 7 = 5 left: 5 11\n 5 * 11 = 55 hit\n answer: 8 + 3 = 11 , 12 - 7 = 5 , 5 * 11 = 55"
    ),
    "step: 12 / 3 = 4 left: 4 7 8 target: 55": " miss\n answer: none",
    "5 * 11 = 55\n none\n": " answer: 8 + 3 = 11 , 12 - 7 = 5 , 5 * 11 = 55",
}
ROUNDS = {
    "children: 2\n": " spawn: 9 - 4 = 5 left: 5 6 9\n join:",
    "step: 9 - 4 = 5 left: 5 6 9 target: 30": " answer: none",
    "left: 5 6 9\n join:\n none\n": " spawn: 5 * 6 = 30 left: 30\n spawn: not a step\n join:",
    "step: 5 * 6 = 30 left: 30 target: 30": " answer: 5 * 6 = 30",
    " 5 * 6 = 30\n": " answer: 5 * 6 = 30",
}

PLAYS = (
    Play("answer", "sample", "2 + 2?", after({"?": "<think>Two and two make four.</think>\nIt is four.\nanswer: 4"})),
    Play("letters", "sample", "Wie heißt Ä?", after({"?": "„Ä“ heißt Ä – naïve façade ✓ 漢字"})),
    Play("cut", "sample", "Count!", after({"!": " 1 2 3 4 5 6 7 8 9 10 11 12"}), {"max_tokens": 12}),
    Play(
        "draft",
        "first_finish(samples=2, drafts=spawn_join)",
        "numbers: 5 5 target: 10",
        after({"free\n": " answer: 5 + 5 = 10"}),
    ),
    Play("spawn_join", "spawn_join", "numbers: 3 7 8 12 target: 55", after(SPAWNED)),
    Play("rounds", "spawn_join(children=2)", "numbers: 4 5 6 9 target: 30", after(ROUNDS)),
    Play("reuse", weighed(how="reuse"), "To the beach?", after(WEIGHED)),
    Play("recompute", weighed(how="recompute"), "To the beach?", after(WEIGHED | {"So:": " we stay. answer: no"})),
    Play("nested_reuse", nested(how="reuse"), "A tree:", after(NESTED)),
    Play("nested_recompute", nested(how="recompute"), "A bush:", after(NESTED | {"all": " a bush\nanswer: 5"})),
    Play("outlined", outlined(), "Sum and product of 6 and 7?", after(OUTLINED)),
    Play(
        "actions",
        "sample",
        "Two jobs:",
        after({":": "<FORK-1>first job</FORK-1><FORK-2>second</FORK-2>I wait.<JOIN-1></JOIN-1>\nanswer: done"}),
    ),
    *(Play(*scripted) for scripted in SCRIPTS),
)
