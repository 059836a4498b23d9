"""Texts as graphs: what the strategy would have made of a model that says the same; masks as they were published."""

from __future__ import annotations

import asyncio
import random

import pytest
import torch
from conftest import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from plays import PLAYS
from rehearsal import CONTEXT, EOS, rehearse, tokenizer

from orchestra.errors import UsageError
from orchestra.graph import ThreadGraph
from orchestra.protocols import BLOCKS, MULTIVERSE, NPR, THREAD_WEAVER, Block, Branch, Document, Path, transcript
from orchestra.protocols.blocks import Blocks
from orchestra.runtime.local.prompts import Prompts
from orchestra.training.flatten import Row, dense_mask, flatten
from orchestra.training.graphs import graph_of
from orchestra.training.trie import merge_graph

ENCODER = Prompts(tokenizer(), CONTEXT)
STRATEGIES = {"map_reduce": "multiverse", "threads": "thread_weaver", "spawn_join": "apr", "async_think": "async_think"}


def language_of(strategy: object) -> str | None:
    strategy = str(strategy)
    if "language='" in strategy:
        return strategy.partition("language='")[2].partition("'")[0]
    return None if "prompted" in strategy else STRATEGIES.get(strategy.partition("(")[0])


SPOKEN = [play for play in PLAYS if language_of(play.strategy) and play.name != "rounds"]  # which is malformed


def sight(row: Row) -> list[tuple[int, int, float, tuple[tuple[int, int], ...]]]:
    """Of every entry that is no echo: where and what it is, what it weighs, and where and what it sees."""
    mask = dense_mask(row)
    return sorted(
        (
            row.positions[i],
            row.tokens[i],
            row.weights[i],
            tuple(sorted((row.positions[j], row.tokens[j]) for j in mask[i].nonzero().flatten().tolist())),
        )
        for i in range(len(row))
        if not row.echoes[i]
    )


@pytest.mark.parametrize("play", SPOKEN, ids=[play.name for play in SPOKEN])
def test_a_text_becomes_the_graph_that_its_strategy_makes(play):
    made = rehearse(play).graph
    roots = [node for node in made.nodes if not node.context][1:]
    helpers = [
        "".join(
            span.text
            for node in made.nodes
            if node.id == root.id or (node.context and node.context[0].parent == root.id)
            for span in node.spans
            if span.origin == "sampled"
        )
        for root in roots
    ]
    graph = graph_of(
        play.prompt,
        transcript(made),
        language_of(play.strategy),
        ENCODER,
        EOS,
        branches=helpers,
        join="recompute" if "recompute" in str(play.strategy) else "auto",
        shared="shared=false" not in str(play.strategy).lower(),
    )
    assert sight(flatten(graph)) == sight(flatten(made))


# -- as published ------------------------------------------------------------------------------------------------------

WORDS = st.text("abc ", max_size=4)


@st.composite
def documents(draw, language: Blocks, depth: int = 2) -> Document:
    """Random texts: several blocks, nested ones where the language has them."""

    def block(depth: int, prefix: str) -> Block:
        labels = [f"{prefix}{i}" for i in range(1, draw(st.integers(1, 3)) + 1)]
        paths = [Path(label, parts(depth - 1, f"{label}.")) for label in labels]
        ending = draw(WORDS) if language.conclusion else None
        goal = "" if language.strict else draw(WORDS)
        return Block(goal, [Branch(label, draw(WORDS)) for label in labels], paths, ending)

    def parts(depth: int, prefix: str) -> list[str | Block]:
        found: list[str | Block] = [draw(WORDS)]
        for _ in range(draw(st.integers(0, 2)) if depth > 0 else 0):
            found += [block(depth, prefix), draw(WORDS)]
        return found

    return Document(parts(depth if language.nested > 1 else 1, ""))


def published(words: list[str], plan: str, path: str, shift_at: str) -> tuple[list[int], list[list[bool]]]:
    """Positions and mask from their description (arXiv:2506.09991): all is causal, and the `path` spans of one block
    do not see each other; a path begins one after the end of its plan, `shift_at` one after the longest path."""
    spans: list[dict] = []  # of open blocks: where the plan ended, the paths' spans, how far they reach
    stack: list[dict] = []
    positions: list[int] = []
    hidden: set[tuple[int, int]] = set()
    at = 0
    for i, word in enumerate(words):
        if word == f"<{plan}>":
            stack.append({"plan": None, "paths": [], "reach": 0})
            spans.append(stack[-1])
        if word == f"<{path}>":
            at = stack[-1]["plan"] + 1
            stack[-1]["open"] = i
        if word == shift_at:
            at = stack[-1]["plan"] + stack[-1]["reach"] + 1
        positions.append(at)
        if word == f"</{plan}>":
            stack[-1]["plan"] = at
        if word == f"</{path}>":
            while "open" not in stack[-1]:  # an inner block has ended
                stack.pop()
            stack[-1]["reach"] = max(stack[-1]["reach"], at - stack[-1]["plan"])
            stack[-1]["paths"].append(range(stack[-1].pop("open"), i + 1))
        if word in (f"</{shift_at[1:]}",):
            stack.pop()
        at += 1
    for block in spans:
        for first in block["paths"]:
            for second in block["paths"]:
                if first is not second:
                    hidden |= {(i, j) for i in first for j in second}
    return positions, [[j <= i and (i, j) not in hidden for j in range(len(words))] for i in range(len(words))]


def without_echoes(row: Row) -> tuple[list[int], list[int], list[list[bool]]]:
    keep = [i for i in range(len(row)) if not row.echoes[i]]
    mask = dense_mask(row)[keep][:, keep].tolist()
    return [row.tokens[i] for i in keep], [row.positions[i] for i in keep], mask


@pytest.mark.parametrize(
    ("language", "plan", "path", "shift_at"),
    [(MULTIVERSE, "Goal", "Path", "<Conclusion>"), (NPR, "guideline", "step", "<takeaway>")],
    ids=["multiverse", "npr"],
)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_masks_and_positions_are_those_that_were_published(data, language, plan, path, shift_at):
    document = data.draw(documents(language))
    graph = graph_of("?", language.render(document), language.name, ENCODER, EOS)
    tokens, positions, mask = without_echoes(flatten(graph))
    words = [ENCODER.decode_all([token]) for token in tokens]
    wanted, seen = published(words, plan, path, shift_at)
    assert positions == wanted
    assert mask == seen


@settings(max_examples=60, deadline=None)
@given(documents(THREAD_WEAVER))
def test_threads_are_the_chains_of_the_published_tree(document):
    """Every request of the published state machine is one chain of the merged row, and there is nothing else in it."""
    text = THREAD_WEAVER.render(document)
    document = THREAD_WEAVER.parse(text)  # spaces around titles are not kept
    requests: list[list[int]] = []
    context = ENCODER.prompt("?").tokens
    said = ""
    for part in document.parts:
        if isinstance(part, str):
            said += part
            continue
        context = [*context, *ENCODER.forced(said + THREAD_WEAVER.asking(part)).tokens]
        base = [*context, *ENCODER.forced("\n").tokens]
        context = base
        for thread in part.paths:
            body = "".join(thread.parts)
            tokens = [
                *ENCODER.forced(f"<Thread>\n{thread.label}:").tokens,
                *ENCODER.forced(f"{body}</Thread>").tokens,
            ]
            requests.append([*base, *tokens])
            context = [*context, *tokens]
        context = [*context, *ENCODER.forced("\n").tokens]
        said = THREAD_WEAVER.ending(part)
    requests.append([*context, *ENCODER.forced(said).tokens, EOS])
    wanted = {tuple(request[:size]) for request in requests for size in range(1, len(request) + 1)}

    row = merge_graph(graph_of("?", text, "thread_weaver", ENCODER, EOS))
    mask = dense_mask(row)
    found = []
    for i in range(len(row)):
        if not row.echoes[i]:
            seen = sorted(mask[i].nonzero().flatten().tolist(), key=lambda j: row.positions[j])
            assert [row.positions[j] for j in seen] == list(range(row.positions[i] + 1))
            found.append(tuple(row.tokens[j] for j in seen))
    assert len(found) == len(set(found))
    assert set(found) == wanted


# -- as served ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("served")
    tiny_model(vocabulary=320).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


ALONE = {
    "apr": (
        "\n children: free\n spawn: 9 - 4 = 5 left: 5 6 9\n spawn: 6 / 3 = 2 left: 2 4\n join:\n none\n none\n"
        " answer: none",
        ["\n a", "\n answer: none"],
    ),
    "async_think": (
        "a<FORK-1>b</FORK-1>c<FORK-2>dd</FORK-2>e<JOIN-2><RETURN-2>2</RETURN-2>f<JOIN-1><RETURN-1>1</RETURN-1>g",
        ["<RETURN>1</RETURN>", " well <RETURN>2</RETURN>"],
    ),
}
"""Texts of languages whose threads have contexts of their own, and what those say."""


@pytest.mark.parametrize("name", [*BLOCKS, *ALONE])
def test_training_and_serving_compute_the_same_for_every_language(served, name):
    """The parity law for graphs made of texts, nested and with several blocks: every token of every node is scored."""
    from orchestra.runtime.local.engine import LocalEngine
    from orchestra.testing.laws import check_parity

    rng = random.Random(name)

    def block(language: Blocks, labels: list[str], inner: Block | None = None) -> Block:
        paths = [Path(label, [f" {rng.randint(1, 999)} and so on"[: rng.randint(3, 15)]]) for label in labels]
        if inner is not None:
            paths[0].parts += [inner, " then"]
        plan = [Branch(label, "do") for label in labels] if language.plan else []
        return Block("", plan, paths, " so" if language.conclusion else None)

    def graph() -> ThreadGraph:
        if name in ALONE:
            return graph_of(" target: 9", ALONE[name][0], name, ENCODER, EOS, branches=ALONE[name][1])
        language = BLOCKS[name]
        inner = block(language, ["1.1", "1.2"]) if language.nested > 1 else None
        blocks = [block(language, ["1", "2", "3"], inner)]
        if language.trigger:
            blocks.append(block(language, ["1", "2"]))
        parts = [part for one in blocks for part in (one, " and" if language.trigger else "")]
        document = Document([" well"] * bool(language.trigger) + parts + [" done"])
        return graph_of("?", language.render(document), name, ENCODER, EOS)

    async def check() -> None:
        engine = LocalEngine(str(served))
        try:
            made = graph()
            assert len(made.nodes) >= 4
            await check_parity(engine, made)
        finally:
            await engine.close()

    asyncio.run(check())


# -- what is refused ---------------------------------------------------------------------------------------------------


REFUSED = [
    ("x", "klingon", [], "unknown language 'klingon'"),
    (
        "<Parallel>\n<Goal><Outline>one</Outline></Goal>",
        "multiverse",
        [],
        "not a text of multiverse: 1:1: <Parallel> is not closed",
    ),
    ("x", "multiverse", ["y"], "stand in its text"),
    (
        "\n children: free\n spawn: 9 - 4 = 5 left: 5 6\n join:\n none\n",
        "apr",
        ["a", "b"],
        "more children are told than are asked for: 1",
    ),
    (
        "<FORK-1>b</FORK-1><JOIN-1><RETURN-1>b</RETURN-1>",
        "async_think",
        ["c", "d"],
        "forked tasks: 1, but workers that are told: 2",
    ),
]


@pytest.mark.parametrize(("text", "language", "branches", "message"), REFUSED, ids=[case[1] for case in REFUSED])
def test_texts_that_are_no_demonstrations_are_refused(text, language, branches, message):
    with pytest.raises(UsageError, match=message):
        graph_of("?", text, language, ENCODER, EOS, branches=branches)
