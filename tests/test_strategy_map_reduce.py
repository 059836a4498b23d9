"""Multiverse and its relatives: control flow, counted by hand; the traps of the originals, each by name."""

from __future__ import annotations

import re
from typing import Any

import pytest
from playing import after, play

from orchestra import Outcome, ThreadGraph
from orchestra.errors import CapabilityError, SpecError
from orchestra.protocols import BLOCKS, MULTIVERSE, transcript
from orchestra.runtime.engine import Capability
from orchestra.spec import parse_strategy
from orchestra.testing.scripted import ScriptedEngine

PLAN = " think <Parallel><Goal> two <Outline>1: A</Outline> <Outline>2: B</Outline></Goal>"  # 7 tokens
CONCLUDES = ("<Conclusion>", " sum</Conclusion></Parallel> answer: 5 $")  # 4 tokens with the end
SIMPLE = after(
    CONCLUDES,
    ("<Path>\n1:", " a b</Path>"),  # 2 tokens
    ("<Path>\n2:", " a b c</Path>"),  # 3 tokens
    ("go", PLAN),
)
TEXT = PLAN + "<Path>\n1: a b</Path><Path>\n2: a b c</Path><Conclusion> sum</Conclusion></Parallel> answer: 5"


def sampled(graph: ThreadGraph) -> list[int]:
    return [node.count("sampled") for node in graph.nodes if node.count("sampled")]


@pytest.mark.parametrize("join", ["auto", "reuse", "recompute"])
def test_two_paths(join: str) -> None:
    """Plan 7, paths 2 and 3, conclusion 4. The critical path takes the longer path."""
    outcome = play(f"map_reduce(join={join!r})", SIMPLE)
    assert outcome.text == transcript(outcome.graph) == TEXT
    assert outcome.answer == "5"
    assert MULTIVERSE.validate(outcome.text) == []
    plan, first, second, end = sampled(outcome.graph)
    assert (first, second, end) == (2, 3, 4)
    assert outcome.usage.sampled_tokens == plan + 2 + 3 + 4
    assert outcome.usage.critical_path_tokens == plan + 3 + 4
    copied = first + second + 2 * 2 if join == "recompute" else 0  # each header is two words
    assert outcome.usage.forced_tokens == 2 * 2 + copied + 1


def test_reuse_is_what_the_engine_can_and_recompute_what_it_cannot() -> None:
    assert any(len(node.context) == 2 for node in play("map_reduce", SIMPLE).graph.nodes)
    plain = ScriptedEngine(SIMPLE, reuse_join=False)
    assert all(len(node.context) < 2 for node in play("map_reduce", plain).graph.nodes)
    with pytest.raises(CapabilityError, match="map_reduce needs reuse_join"):
        play("map_reduce(join='reuse')", plain)
    deaf = ScriptedEngine(SIMPLE)
    deaf.capabilities -= {Capability.CONTINUE}
    with pytest.raises(CapabilityError, match="map_reduce needs continue"):
        play("map_reduce", deaf)


def nested(context: str, path: tuple[int, ...]) -> str:
    """Path 1 opens a block of its own, of paths 1.1 and 1.2; path 2 is longer than it."""
    if context.endswith("<Conclusion>"):
        return " in</Conclusion></Parallel> so</Path>" if path else " out</Conclusion></Parallel> answer: 9 $"
    return after(
        ("<Path>\n1.1:", " x</Path>"),
        ("<Path>\n1.2:", " x x x x</Path>"),
        ("<Path>\n1:", " w <Parallel><Goal><Outline>1.1:C</Outline><Outline>1.2:D</Outline></Goal>"),
        ("<Path>\n2:", " y y y y y y y y y</Path>"),
        ("go", PLAN),
    )(context, path)


@pytest.mark.parametrize("join", ["reuse", "recompute"])
def test_nested_blocks(join: str) -> None:
    """Path 1: 2 + max(1, 4) + 2 = 8 tokens in a row; path 2: 9. So the block takes 9, and the inner one none of it."""
    outcome = play(f"map_reduce(join={join!r})", nested)
    assert outcome.answer == "9"
    assert MULTIVERSE.validate(outcome.text) == []
    outer, inner = MULTIVERSE.parse(outcome.text).blocks
    assert [path.label for path in outer.paths] == ["1", "2"]
    assert [path.label for path in inner.paths] == ["1.1", "1.2"]
    plan = 7
    assert outcome.usage.critical_path_tokens == plan + max(2 + 4 + 2, 9) + 4
    assert outcome.usage.sampled_tokens == plan + (2 + 1 + 4 + 2) + 9 + 4
    shorter = play("map_reduce", lambda c, p: nested(c, p).replace(" y y y y y y y y y", " y"))
    assert shorter.usage.critical_path_tokens == plan + (2 + 4 + 2) + 4


def test_the_plan_is_seven_tokens() -> None:
    assert sampled(play("map_reduce", SIMPLE).graph)[0] == 7


def test_two_blocks_one_after_the_other() -> None:
    def script(context: str, path: tuple[int, ...]) -> str:
        if context.endswith("<Conclusion>") and context.count("<Goal>") == 1:
            return " one</Conclusion></Parallel> again <Parallel><Goal><Outline>1: C</Outline></Goal>"
        return SIMPLE(context if not context.endswith("</Goal>") else "go", path)

    outcome = play("map_reduce", script)
    first, second = MULTIVERSE.parse(outcome.text).blocks
    assert (len(first.paths), len(second.paths)) == (2, 1)
    assert outcome.answer == "5"


def test_at_most_so_many_paths_are_run() -> None:
    plan = "<Parallel><Goal>" + "".join(f"<Outline>{i}: x</Outline>" for i in range(1, 1001)) + "</Goal>"
    script = after(CONCLUDES, (":", " x</Path>"), ("go", plan))
    outcome = play("map_reduce", script)
    assert len(MULTIVERSE.parse(outcome.text).blocks[0].paths) == 64
    assert len(MULTIVERSE.parse(play("map_reduce(paths=3)", script).text).blocks[0].paths) == 3
    assert outcome.answer == "5"


def test_a_path_that_is_cut_off_is_closed_and_joined() -> None:
    script = after(CONCLUDES, ("1:", " x x x x x </Path>"), ("2:", " y $"), ("go", PLAN))
    outcome = play("map_reduce(path_tokens=3)", script)
    assert "<Path>\n1: x x x</Path><Path>\n2: y</Path><Conclusion>" in outcome.text
    assert MULTIVERSE.validate(outcome.text) == []
    assert outcome.answer == "5"


# -- the languages ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "script", "text", "critical"),
    [
        (
            "map_reduce(language='multiverse_engine')",
            after(("<Conclusion>\n", " s</Conclusion></Parallel> 5 $"), ("1:", " a</Path>"), ("2:", " b b</Path>"),
                  ("go", PLAN)),
            PLAN + "\n<Path>\n1: a</Path>\n<Path>\n2: b b</Path>\n<Conclusion>\n s</Conclusion></Parallel> 5",
            7 + 2 + 3,
        ),
        (
            "map_reduce(language='npr')",
            after(("<takeaway>", " s</takeaway> 5 $"), ("1:", " a</step>"), ("2:", " b b</step>"),
                  ("go", " <guideline><plan>1: A</plan><plan>2: B</plan></guideline>")),
            " <guideline><plan>1: A</plan><plan>2: B</plan></guideline><step>1: a</step><step>2: b b</step>"
            "<takeaway> s</takeaway> 5",
            3 + 2 + 3,
        ),
        (
            "map_reduce(language='parallel_r1', paths=2)",
            after(("<Summary>", " s</Summary> 5 $"), ("<Path>", " a</Path>"), ("go", " hm <Parallel>")),
            " hm <Parallel><Path> a</Path><Path> a</Path></Parallel><Summary> s</Summary> 5",
            2 + 1 + 3,
        ),
        (
            "map_reduce(language='para_thinker', paths=2)",
            after(("<summary>", " s</summary> 5 $"), ("<think1>", " a</think1>"), ("<think2>", " b b</think2>")),
            "<think1> a</think1><think2> b b</think2><summary> s</summary> 5",
            2 + 3,
        ),
    ],
)  # fmt: skip
def test_each_language(spec: str, script: Any, text: str, critical: int) -> None:
    outcome = play(spec, script)
    assert outcome.text == text
    assert outcome.answer == "5"
    assert outcome.usage.critical_path_tokens == critical
    language = BLOCKS[parse_strategy(spec).language]  # type: ignore[attr-defined]
    assert language.validate(outcome.text) == []
    document = language.parse(outcome.text)
    assert language.parse(language.render(document)) == document


def test_unknown_languages_are_refused() -> None:
    with pytest.raises(SpecError, match="language"):
        parse_strategy("map_reduce(language='thread_weaver')")


# -- what models write that nobody taught them -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "turn",
    [
        " <Parallel><Goal></Goal> answer: 5 $",
        " </Goal> </Goal> </Goal> answer: 5 $",
        " <Parallel><Goal><Outline>no label</Outline></Goal> answer: 5 $",
        " say `<Parallel><Goal><Outline>1: x</Outline></Goal>` so answer: 5 $",
        ' the tag "<Goal>" and "</Goal>" mean: answer: 5 $',
        " <Goal><Outline>1: x</Outline></Goal> answer: 5 $",
    ],
)
def test_a_lost_request_on_zero_outlines(turn: str) -> None:
    """Trap: the original loses a request whose plan has no outlines. Here it is plain text, and the model goes on."""
    engine = ScriptedEngine(lambda context, _: turn if context == "go" else turn[len(context) - 2 :])
    outcome = play("map_reduce", engine)
    assert outcome.text == turn.removesuffix(" $")
    assert outcome.answer == "5"
    assert all(len(request.path) == 0 for request in engine.requests)


def test_a_model_that_always_asks_is_let_be() -> None:
    """Every thread asks for three paths for ever. Unbounded, that were 3 x 8 paths of each path of five levels."""
    turn = " <Parallel><Goal><Outline>1: x</Outline><Outline>2: x</Outline><Outline>3: x</Outline></Goal> answer: 5 $"
    engine = ScriptedEngine(lambda *_: turn)
    outcome = play("map_reduce(stops=8)", engine)
    assert outcome.answer == "5"
    paths = {request.path for request in engine.requests}
    assert 100 < len(paths) <= 1 + 1024
    assert outcome.usage.requests <= 9 * len(paths)


def test_a_per_path_budget() -> None:
    """Trap: in the original each path may use up the whole limit. A budget here is shared by all threads of the run."""
    script = after(CONCLUDES, (":", " x" * 50 + "</Path>"), ("go", PLAN))
    whole: Outcome = play("map_reduce", script)
    assert whole.usage.sampled_tokens > 100
    for limit in (1, 6, 20, 70, whole.usage.sampled_tokens):
        outcome = play("map_reduce", script, budget=f"sampled_tokens={limit}")
        assert outcome.usage.sampled_tokens <= limit
        assert (outcome.stopped_by == "sampled_tokens") == (limit < whole.usage.sampled_tokens)
        assert outcome.text.startswith(" think")  # what there is of the thread that everything hangs on
    for limit in (3, 30, whole.usage.critical_path_tokens):
        outcome = play("map_reduce", script, budget=f"critical_path_tokens={limit}")
        assert outcome.usage.critical_path_tokens <= limit


def test_an_off_by_one_between_training_and_serving_positions() -> None:
    """Trap: the published engine serves paths one position later than its trainer taught them.

    The positions of a run equal those of the published training code, which walks the token string with a stack.
    """
    outcome = play("map_reduce(join='reuse')", nested)
    served = positions(outcome.graph)
    assert [word for word, _ in served] == words(outcome.graph)
    assert [at for _, at in served] == published([word for word, _ in served])


def words(graph: ThreadGraph) -> list[str]:
    return [word for word, _ in positions(graph)]


def positions(graph: ThreadGraph) -> list[tuple[str, int]]:
    """The words of a run, tags apart, in the order of the text, each with its position in the graph."""
    order: list[int] = []

    def visit(node: int) -> None:
        if node not in order:
            for edge in graph.nodes[node].context:
                visit(edge.parent)
            order.append(node)

    visit(len(graph.nodes) - 1)
    found: list[tuple[str, int]] = []
    for n in order:
        node = graph.nodes[n]
        at = node.start
        for span in node.spans:
            pieces = split(span.text)
            assert len(pieces) in (span.count, span.count - 1), (pieces, span)  # an end of sequence has no text
            found += [(piece, at + i) for i, piece in enumerate(pieces)]
            at += span.count
    return found


def split(text: str) -> list[str]:
    return re.findall(r"\s*\S+|\s+$", text)


def published(text: list[str]) -> list[int]:
    """Multiverse's position rule, written from its description: frames of blocks, suffixes that are shifted."""
    at = list(range(len(text)))
    frames: list[dict[str, int]] = []

    def shift(index: int, target: int) -> None:
        by = target - at[index]
        for i in range(index, len(at)):
            at[i] += by

    for i, word in enumerate(text):
        if "<Parallel>" in word:
            frames.append({})
        if "</Goal>" in word:
            frames[-1] |= {"goal": at[i], "longest": 0}
        if word.startswith("<Path>"):
            shift(i, frames[-1]["goal"] + 1)
        if "</Path>" in word:
            frames[-1]["longest"] = max(frames[-1]["longest"], at[i] - frames[-1]["goal"])
        if word.startswith("<Conclusion>"):
            shift(i, frames[-1]["goal"] + frames[-1]["longest"] + 1)
        if "</Parallel>" in word:
            frames.pop()
    return at


def test_the_same_shape_by_prompting() -> None:
    """Plan 5 tokens, parts 3 and 4, synthesis 3; on an engine that cannot even continue."""
    engine = ScriptedEngine(
        lambda context, _: (
            "1. first part\n2. second" if "numbered list" in context else " 7 $" if "put them together" in context
            else " a b c $" if "part 2 only" in context else " a b $"
        )
    )  # fmt: skip
    engine.capabilities -= {Capability.CONTINUE}
    outcome = play("map_reduce(plan='prompted', paths=2)", engine)
    assert outcome.answer == "7"
    plan, first, second, end = (request.node.count("sampled") for request in engine.requests)
    assert outcome.usage.critical_path_tokens == plan + max(first, second) + end
    assert outcome.usage.sampled_tokens == plan + first + second + end
    stopped = play("map_reduce(plan='prompted')", engine, budget=f"sampled_tokens={plan + first + second}")
    assert stopped.text == "a b\n\na b c"


def test_when_a_budget_ends_in_a_later_turn_its_text_is_there_too() -> None:
    """Plan 7, paths 2 + 3: of 14 tokens the conclusion gets two."""
    outcome = play("map_reduce", SIMPLE, budget="sampled_tokens=14")
    assert outcome.stopped_by == "sampled_tokens"
    assert outcome.text.endswith("<Conclusion> sum</Conclusion></Parallel> answer:")
