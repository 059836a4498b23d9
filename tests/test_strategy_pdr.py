"""Parallel-Distill-Refine: what each call is shown, what it costs, and what nonsense does to it."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from typing import Any

import pytest

import orchestra
from orchestra import Outcome
from orchestra.outcome import Candidate
from orchestra.runtime.connect import open_engine
from orchestra.strategies.distillers import parse_selection, selection_prompt, summary_prompt
from orchestra.strategies.workspace import Draft, by_support, informed, latest, solution
from orchestra.testing.scripted import ScriptedEngine
from orchestra.testing.strategies import check_strategy

DRAFTS = [
    " <think> hm hm </think> so answer: 1 $",
    " <think> hm </think> answer: 2 $",
    " <think> </think> it is answer: 2 $",
]
DISTILLERS = ["global_summary", "shared_top_k", "per_sample_top_k", "random_k"]
LENGTHS = [8, 6, 7]  # tokens, the end of sequence included
SOLUTIONS = ["so answer: 1", "answer: 2", "it is answer: 2"]


def size(text: Any) -> int:
    """Tokens of a text on the scripted engine."""
    return len(re.findall(r"\s*\S+|\s+$", text))


class Script:
    """Plays drafts by fork index in a first round, then what it is told; remembers what every call was shown."""

    def __init__(self, refined: str = " refined answer: 3 $", judged: str | Callable[[str], str] = " selected: 3, 1 $"):
        self.refined, self.judged, self.shown = refined, judged, []
        self.engine = ScriptedEngine(self.say)

    def say(self, context: str, path: tuple[int, ...]) -> str:
        self.shown.append(context)
        if "Do not answer this now" in context:
            return self.judged(context) if callable(self.judged) else self.judged
        return self.refined if "earlier attempts" in context else DRAFTS[path[-1] % 3]

    def run(self, spec: Any, prompt: Any = "go", **settings: Any) -> Outcome:
        async def main() -> Outcome:
            async with orchestra.connect(self.engine, settings.pop("engines", None)) as connection:
                return await connection.run(spec, prompt, **settings)

        outcome = asyncio.run(asyncio.wait_for(main(), 20))
        outcome.graph.check_integrity()
        return outcome

    @property
    def judgements(self) -> list[str]:
        return [context for context in self.shown if "Do not answer this now" in context]

    @property
    def refinements(self) -> list[str]:
        return [context for context in self.shown if "earlier attempts" in context]


def attempts(*texts: str) -> str:
    return "\n\n".join(f"Attempt {i}:\n{text}" for i, text in enumerate(texts, 1))


def spec(distiller: str, widths: str = "[3, 2]", **more: Any) -> str:
    extra = "".join(f", {key}={value!r}" for key, value in more.items())
    return f"pdr(widths={widths}, distiller={distiller!r}{extra})"


# -- two rounds and the last one, by hand ----------------------------------------------------------------------------

ALL = [Draft(text, None) for text in SOLUTIONS]
REFINED = " refined answer: 3"  # 3 tokens and the end of sequence: 4
SECOND = [Draft("refined answer: 3", None)] * 2


def test_global_summary() -> None:
    """Calls: 3 drafts; a summary; 2 drafts; a summary; the last one. Each round waits for the one before."""
    script = Script(judged=" <think> x </think> agreed: 2 $")
    outcome = script.run(spec("global_summary"))
    first, second = (informed("go", "agreed: 2"),) * 2
    sums = [summary_prompt("go", drafts, 4096) for drafts in (ALL, SECOND)]
    assert script.judgements == sums
    assert script.refinements == [first, first, second]
    assert outcome.answer == "3"
    said = 6  # of a summary: five words and the end of sequence
    assert outcome.usage.requests == 3 + 1 + 2 + 1 + 1
    assert outcome.usage.critical_path_tokens == 8 + said + 4 + said + 4
    assert outcome.usage.sampled_tokens == sum(LENGTHS) + said + 2 * 4 + said + 4
    chain = (1 + 8) + (size(sums[0]) + said) + (size(first) + 4) + (size(sums[1]) + said) + (size(second) + 4)
    assert outcome.usage.sequential_tokens == chain
    assert outcome.usage.total_tokens == chain + (1 + 6) + (1 + 7) + (size(first) + 4)


def test_shared_top_k() -> None:
    """One call selects for all; of the second round's two drafts both are taken, so nobody is asked."""
    script = Script()
    outcome = script.run(spec("shared_top_k"))
    selection = selection_prompt("go", ALL, 2)
    first = informed("go", attempts("it is answer: 2", "so answer: 1"))
    second = informed("go", attempts("refined answer: 3", "refined answer: 3"))
    assert script.judgements == [selection]
    assert script.refinements == [first, first, second]
    assert [r.sampling.temperature for r in script.engine.requests] == [0.6] * 3 + [0.0] + [0.6] * 3
    assert outcome.usage.critical_path_tokens == 8 + 4 + 4 + 4  # "selected:", "3,", "1" and the end of sequence
    chain = (1 + 8) + (size(selection) + 4) + (size(first) + 4) + (size(second) + 4)
    assert outcome.usage.sequential_tokens == chain
    assert outcome.usage.total_tokens == chain + (1 + 6) + (1 + 7) + (size(first) + 4)


def test_per_sample_top_k() -> None:
    """Each draft of the second round begins with a selection of its own; the two stand side by side."""
    picks = iter([" selected: 3, 1 $", " I take selected: 2, 3 $"])
    script = Script(judged=lambda _: next(picks))
    outcome = script.run(spec("per_sample_top_k"))
    selection = selection_prompt("go", ALL, 2)
    one, two = (informed("go", attempts(SOLUTIONS[a], SOLUTIONS[b])) for a, b in ((2, 0), (1, 2)))
    last = informed("go", attempts("refined answer: 3", "refined answer: 3"))
    assert script.judgements == [selection] * 2
    assert sorted(script.refinements) == sorted([one, two, last])
    assert outcome.usage.critical_path_tokens == 8 + 6 + 4 + 4
    member = [size(selection) + said + size(prompt) + 4 for said, prompt in ((4, one), (6, two))]
    assert outcome.usage.sequential_tokens == (1 + 8) + max(member) + (size(last) + 4)
    assert outcome.usage.total_tokens == 3 + sum(LENGTHS) + sum(member) + size(last) + 4
    judges = [r for r in script.engine.requests if r.node.text.strip().startswith(("selected", "I take"))]
    assert {r.sampling.temperature for r in judges} == {0.6}, "greedy, all would select the same"


def test_random_k() -> None:
    """No calls but the drafts; members draw for themselves, and the same seed draws the same."""
    seen = []
    for seed in (0, 0, 1, 2, 3, 4):
        script = Script()
        outcome = script.run(spec("random_k"), seed=seed)
        assert script.judgements == []
        first, last = script.refinements[:2], script.refinements[2]
        pairs = {informed("go", attempts(a, b)): (a, b) for a in SOLUTIONS for b in SOLUTIONS if a != b}
        assert all(prompt in pairs for prompt in first)
        seen.append([pairs[prompt] for prompt in first])
        assert last == informed("go", attempts("refined answer: 3", "refined answer: 3"))
        assert outcome.usage.critical_path_tokens == 8 + 4 + 4
        longest = max(map(size, first)) + 4
        assert outcome.usage.sequential_tokens == (1 + 8) + longest + (size(last) + 4)
        assert outcome.usage.total_tokens == 3 + sum(LENGTHS) + sum(map(size, first)) + 2 * 4 + size(last) + 4
    assert seen[0] == seen[1]
    assert len({str(pairs) for pairs in seen}) > 2
    assert any(one != two for one, two in seen)


# -- the workspace ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("distiller", DISTILLERS)
@pytest.mark.parametrize("limit", [1, 3, 4, 7, 12, 40, 1000])
def test_the_workspace_is_bounded_and_rebuilt_and_has_no_thinking(distiller: str, limit: int) -> None:
    long = " <think> secret </think>" + "".join(f" r{i}" for i in range(60)) + " answer: 3 $"
    script = Script(refined=long, judged=" <think> secret </think> selected: 1, 2" + " n" * 50 + " $")
    outcome = script.run(spec(distiller, "[3, 3]", workspace_tokens=limit))
    around = informed("go", "@").split("@")
    for context in script.refinements:
        workspace = context.removeprefix(around[0]).removesuffix(around[1])
        assert around[0] + workspace + around[1] == context
        assert size(workspace) <= limit
        assert "secret" not in workspace
        assert workspace.count("Attempt ") <= 2
    if limit == 1000:
        assert len(script.refinements) == 3 + 1
        assert "so answer" not in script.refinements[-1], "the first round's drafts are still there"
    if limit == 40 and distiller != "global_summary":
        assert workspace.count("answer: 3") == 2, "a draft is cut at its beginning"
        assert size(workspace) > 30, "there was room for more"
    if limit == 12 and distiller == "global_summary":
        assert workspace.startswith("selected: 1, 2 n"), "a summary is cut at its end"
    if limit == 1 and distiller != "global_summary":
        assert script.refinements == [], "what does not fit at all is no workspace"
    assert (outcome.answer == "3") == bool(script.refinements)


def test_drafts_without_a_solution_do_not_enter() -> None:
    def say(context: str, path: tuple[int, ...]) -> str:
        shown.append(context)
        return (" <think> for ever", " <think> a </think>$", " b answer: 7 $")[path[-1] % 3]

    shown: list[str] = []
    script = Script()
    script.engine = ScriptedEngine(say)
    script.run(spec("random_k", "[3]", k=3), max_tokens=9)
    assert shown[-1] == informed("go", attempts("b answer: 7"))
    shown.clear()
    script.engine = ScriptedEngine(lambda context, path: (shown.append(context), " <think> for ever")[1])
    outcome = script.run(spec("shared_top_k", "[2, 2]"))
    assert shown == ["go"] * 5, "without a usable draft the next round starts from an empty workspace"
    assert outcome.answer is None


def test_a_channel_that_the_template_opened_and_nobody_closed_is_all_thinking() -> None:
    shown: list[str] = []

    def say(context: str, path: tuple[int, ...]) -> str:
        shown.append(context)
        return (" still thinking 5 $", " hm </think> it is 4 $")[path[-1] % 2]

    script = Script()
    script.engine = ScriptedEngine(say)
    script.run(
        "pdr(widths=[2], distiller='random_k')",
        [{"role": "user", "content": "go"}, {"role": "assistant", "content": "<think>"}],
    )
    assert attempts("it is 4") in shown[-1]
    assert "still" not in shown[-1]
    assert solution("still thinking", True) == ""
    assert solution("still unfinished", False) == "still unfinished"


def test_prompts_have_the_form_of_the_runs_prompt_and_judges_may_live_elsewhere() -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "go"}]
    script, judge = Script(), Script()
    for distiller in ("global_summary", "shared_top_k", "per_sample_top_k"):
        outcome = script.run(spec(distiller, engine="judge"), messages, engines={"judge": judge.engine})
        assert outcome.answer == "3"
    assert script.judgements == []
    assert judge.refinements == []
    assert len(judge.judgements) == 2 + 1 + 2
    assert all(context.startswith("Be brief.\ngo\n\n") for context in judge.shown + script.refinements)
    assert {node.engine for node in outcome.graph.nodes} == {"", "judge"}


def test_a_wrong_alias_is_an_error_before_anything_is_drawn() -> None:
    script = Script()
    for asked in ("pdr(engine='judg')", "refine(engine='judg')"):
        with pytest.raises(orchestra.OrchestraError, match="unknown engine alias 'judg'; did you mean 'judge'"):
            script.run(asked, engines={"judge": Script().engine})
    assert script.shown == []


# -- nonsense, budgets, choices --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("selected: 2, 1", [1, 0]),
        ("thinking of 3\nSelected: 3,1.", [2, 0]),
        ("selected: 1, 2\nno:\n**selected: 3, 2**", [2, 1]),
        ("selected: 1", None),
        ("selected: 1, 1", None),
        ("selected: 1, 2, 3", None),
        ("selected: 0, 1", None),
        ("selected: 4, 1", None),
        ("selected: -1, 2", None),
        ("selected: 1.5, 2", None),
        ("selected: " + "9" * 5000, None),
        ("selected: , ,", None),
        ("selected:", None),
        ("I like 1 and 2", None),
        ("", None),
        ("selected: 1, 2" + "x" * 5000, None),
    ],
)
def test_a_selection_is_parsed_strictly(text: str, expected: list[int] | None) -> None:
    assert parse_selection(text, 3, 2) == expected


@pytest.mark.parametrize(
    ("distiller", "nonsense"),
    [
        *((top, said) for top in ("shared_top_k", "per_sample_top_k") for said in (" whatever $", " selected: 7, 8 $")),
        *((name, said) for name in DISTILLERS[:3] for said in (" <think> selected: 1, 2", "$")),
    ],
)
def test_nonsense_falls_back_to_the_answers_with_most_support(distiller: str, nonsense: str) -> None:
    script = Script(judged=nonsense)
    script.run(spec(distiller, "[3]"))
    assert script.refinements == [informed("go", attempts(SOLUTIONS[1], SOLUTIONS[2]))]


def test_support() -> None:
    drafts = [Draft("a", "1"), Draft("b", None), Draft("c", "2"), Draft("d", " 2"), Draft("e", "3")]
    assert by_support(drafts) == [2, 3, 0, 4, 1]
    assert by_support([]) == []


def test_the_choice_is_the_majority_of_the_last_round_with_an_answer() -> None:
    def one(number: int, answer: str | None) -> Candidate:
        return Candidate(text="", answer=answer, weight=number)

    first = [one(1, "1"), one(1, "2"), one(1, "2")]
    assert latest(first) == 1
    assert latest([one(2, "9"), *first]) == 0
    assert latest([one(2, None), *first]) == 2
    assert latest([one(2, None), one(1, None)]) == 0


def test_candidates_and_budgets() -> None:
    """Drafts take 8, 6 and 7 tokens, their refinements 4: a budget ends the run with the best there is by then."""
    script = Script()
    outcome = script.run(spec("random_k", "[3]"))
    assert [c.answer for c in outcome.candidates] == ["3", "1", "2", "2"]
    assert [c.weight for c in outcome.candidates] == [2, 1, 1, 1]
    for budget, answer, count in [
        ("critical_path_tokens=7", "2", 2),  # the first draft is cut
        ("critical_path_tokens=8", "2", 3),
        ("critical_path_tokens=11", "2", 3),
        ("critical_path_tokens=12", "3", 4),
        ("requests=3", "2", 3),
        ("sampled_tokens=21", "2", 3),
        ("wall_seconds=7.5", "2", 2),
        ("wall_seconds=9", "2", 3),
    ]:
        outcome = Script().run(spec("random_k", "[3]"), budget=budget)
        assert (outcome.answer, len(outcome.candidates)) == (answer, count), budget
        assert bool(outcome.stopped_by) == (answer == "2"), budget


def test_a_last_draft_without_an_answer_does_not_lose_the_others() -> None:
    outcome = Script(refined=" <think> for ever").run(spec("shared_top_k"))
    assert outcome.answer == "2"


def test_drafts_may_be_any_strategy() -> None:
    script = Script()
    outcome = script.run("pdr(widths=[2], drafts=first_finish(samples=2), distiller='random_k')")
    assert outcome.usage.requests == 2 * 2 + 2
    assert script.engine.requests[0].sampling.temperature == 0.6
    script = Script()
    script.run("pdr(widths=[2], drafts=sample(temperature=1), distiller='shared_top_k')")
    assert {r.sampling.temperature for r in script.engine.requests} == {1.0}
    with pytest.raises(orchestra.OrchestraError, match="widths"):
        script.run("pdr(widths=[])")


def test_rsa_is_random_k_of_constant_width() -> None:
    script = Script()
    outcome = script.run(spec("random_k", "[3, 3, 3]"))
    assert outcome.usage.requests == 3 * 3 + 1
    assert all(context.count("Attempt ") == 2 for context in script.refinements)


# -- the laws --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("distiller", DISTILLERS)
def test_laws_on_a_script(distiller: str) -> None:
    asyncio.run(check_strategy(Script().engine, spec(distiller), "go"))


@pytest.mark.parametrize("distiller", DISTILLERS)
def test_laws_on_a_real_model(tiny: str, distiller: str) -> None:
    async def main() -> Outcome:
        engine = open_engine(f"local:{tiny}")
        try:
            asked = spec(distiller, "[3, 2]", workspace_tokens=60)
            return await asyncio.wait_for(check_strategy(engine, asked, "what is it", max_tokens=12), 120)
        finally:
            await engine.close()

    outcome = asyncio.run(main())
    assert any("earlier attempts" in node.text for node in outcome.graph.nodes)
