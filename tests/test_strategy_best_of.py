"""Best-of-N and what it chooses by: control flow counted by hand on scripts, the laws, and a real model."""

from __future__ import annotations

import asyncio
import itertools
import re
from collections.abc import Callable
from typing import Any

import pytest

import orchestra
from orchestra import BestOf, Outcome
from orchestra.errors import CapabilityError, UsageError
from orchestra.runtime.connect import open_engine
from orchestra.runtime.engine import Capability, Request
from orchestra.strategies.scorers import Judge
from orchestra.testing.scripted import Script, ScriptedEngine, replies
from orchestra.testing.strategies import check_strategy

DRAFTS = (" a answer: 1 $", " b b answer: 2 $", " c answer: 3 $", " d answer: 2 $")  # 4, 5, 4 and 4 tokens
SHOWN = re.compile(r"<response (\d+)>\n(.*?)\n</response \1>", re.DOTALL)


def run(
    spec: Any, script: Script, prompt: Any = "go", judge: ScriptedEngine | None = None, **settings: Any
) -> tuple[Outcome, list[Request]]:
    """Run it; the requests that the run's own engine got. Two engines' tokens are counted once."""
    engine = ScriptedEngine(script)
    before = judge.load().sampled_tokens if judge else 0

    async def main() -> Outcome:
        async with orchestra.connect(engine, {"judge": judge} if judge else None) as connection:
            return await connection.run(spec, prompt, **settings)

    outcome = asyncio.run(asyncio.wait_for(main(), 20))
    computed = engine.load().sampled_tokens + (judge.load().sampled_tokens - before if judge else 0)
    assert outcome.usage.sampled_tokens == outcome.graph.count("sampled") == computed
    return outcome, engine.requests


def shown(context: str) -> list[str]:
    """The responses in the order of a judge's prompt."""
    return [text for _, text in SHOWN.findall(context)]


def scoring(score: Callable[[str, int], object], words: Callable[[int], int] = lambda _: 0) -> ScriptedEngine:
    """A judge that gives each response `score(response, call)`; before that it says `words(call)` words."""
    calls = itertools.count()

    def script(context: str, path: tuple[int, ...]) -> str:
        call = next(calls)
        lines = [f"\nResponse {i}: {score(text, call)}" for i, text in enumerate(shown(context), 1)]
        return " so" * words(call) + "".join(lines) + " $"

    return ScriptedEngine(script)


def answers(outcome: Outcome) -> dict[str | None, float]:
    return {candidate.answer: candidate.weight for candidate in outcome.candidates}


# -- rewards and log-probabilities --


def test_an_answer_goes_first_then_the_score() -> None:
    texts = replies(" answer: none $", " answer: bb $", " answer: aaaa $")
    assert run(BestOf(samples=3, reward=len), texts)[0].answer == "aaaa"
    assert run(BestOf(samples=3, reward=lambda text: -len(text)), texts)[0].answer == "bb"
    lengths = replies(" answer: 1 long $", " answer: 2 $")  # the scripted engine gives every token -1 nat
    for form in ("'logprob'", "logprob"):
        assert run(f"best_of(samples=2, scorer={form})", lengths)[0].answer == "2"
    assert run("best_of(samples=2, scorer=mean_logprob)", lengths)[0].answer == "1 long"


def test_without_any_answer_the_best_of_all_is_taken() -> None:
    outcome, _ = run(BestOf(samples=2, reward=len), replies(" answer: none $", "\n\n answer: none $"))
    assert (outcome.answer, outcome.text) == (None, "\n\n answer: none")


def test_of_equal_scores_the_most_frequent_answer_is_taken() -> None:
    outcome, _ = run(BestOf(samples=4, reward=lambda _: 0.5), replies(*DRAFTS))
    assert outcome.answer == "2"
    outcome, _ = run(BestOf(samples=4, reward=lambda text: float("2" not in text)), replies(*DRAFTS))
    assert outcome.answer == "1"  # scores first


def test_drafts_that_are_no_one_thread_have_no_log_probability_and_come_last() -> None:
    outcome, _ = run("best_of(samples=2, drafts=self_consistency(samples=2))", replies(" answer: 1 $", " answer: 1 $"))
    assert outcome.answer == "1"
    assert {c.logprob for c in outcome.candidates} == {None}


def test_the_mean_is_over_the_tokens_that_have_a_log_probability() -> None:
    def script(context: str, path: tuple[int, ...]) -> str:
        children = " spawn: 3 + 7 = 10 left: 8 10 12\n join:"
        return " answer: 5 $" if len(path) > 1 or "answer" in context else children

    outcome, _ = run("best_of(samples=2, drafts=spawn_join)", script, "numbers: 3 7 8 12 target: 54")
    assert [c.weight for c in outcome.candidates] == [-1.0, -1.0]  # of several generations, the last


class Rated:
    """An object that is awaited."""

    async def __call__(self, text: str) -> float:
        await asyncio.sleep(0.02)
        return float(len(text))


async def rated(text: str) -> float:
    return await Rated()(text)


@pytest.mark.parametrize("reward", [rated, Rated()])
def test_a_reward_may_be_a_coroutine_function(reward: Any) -> None:
    """What it waits for is real: a budget in simulated seconds does not run out meanwhile."""
    outcome, _ = run(BestOf(samples=4, reward=reward), replies(*DRAFTS), budget="wall_seconds=60")
    assert (outcome.answer, outcome.stopped_by) == ("2", None)
    assert answers(outcome)["1"] == len(" a answer: 1")
    with pytest.raises(UsageError, match="async def"):
        run(BestOf(samples=2, reward=lambda text: reward(text)), replies(*DRAFTS))


def test_log_probabilities_are_asked_for_where_they_score() -> None:
    for spec, expected in [("best_of", True), (BestOf(reward=len), False), ("best_of(scorer=bayes_risk)", False)]:
        assert {request.sampling.logprobs for request in run(spec, replies(*DRAFTS))[1]} == {expected}
    engine = ScriptedEngine(replies(" x $"))
    engine.capabilities -= {Capability.LOGPROBS}
    with pytest.raises(CapabilityError, match="best_of needs logprobs"):
        orchestra.run("best_of", "go", engine=engine)
    assert orchestra.run("best_of(scorer=bayes_risk)", "go", engine=engine).text == " x"


# -- hedged --


def test_hedged_samples_are_one_greedy_and_the_rest_hot() -> None:
    def drawn(spec: str, **settings: Any) -> list[tuple[float, float]]:
        _, requests = run(spec, replies(*DRAFTS), **settings)
        return [(r.sampling.temperature, r.sampling.min_p) for r in sorted(requests, key=lambda r: r.path)]

    hedged = "best_of(samples=3, hedged=true, scorer=logprob"
    assert drawn(f"{hedged})") == [(0.0, 0.0), (0.7, 0.0), (0.7, 0.0)]
    assert drawn(f"{hedged}, min_p=0.2)") == [(0.0, 0.2), (0.7, 0.2), (0.7, 0.2)]
    assert drawn(f"{hedged}, drafts=sample(temperature=1.0))") == [(0.0, 0.0), (1.0, 0.0), (1.0, 0.0)]
    assert drawn(f"{hedged})", temperature=0.9) == [(0.0, 0.0), (0.9, 0.0), (0.9, 0.0)]
    assert drawn("best_of(samples=1, hedged=true)") == [(0.0, 0.0)]
    outcome, _ = run(f"{hedged})", replies(*DRAFTS))
    assert [c.answer for c in outcome.candidates] == ["1", "2", "3"]
    assert outcome.usage.critical_path_tokens == 5


# -- judge --


def test_a_judge_on_another_engine() -> None:
    """Scores follow the response, wherever it is shown: 2 wins with 3 x 9. Call k says k words and 3 x 4 + 1 more."""
    judge = scoring(lambda text, _: 9 if "b b" in text else 4, words=lambda call: call)
    spec = "best_of(samples=4, scorer=judge(engine='judge', samples=3, max_tokens=50))"
    outcome, requests = run(spec, replies(*DRAFTS), judge=judge, temperature=0.8)
    assert [c.weight for c in outcome.candidates] == [12, 27, 12, 12]
    assert outcome.text == " b b answer: 2"
    assert len(requests) == 4
    assert [(r.sampling.temperature, r.sampling.max_tokens) for r in judge.requests] == [(0.5, 50)] * 3
    assert outcome.usage.requests == 4 + 3
    assert outcome.usage.sampled_tokens == (4 + 5 + 4 + 4) + 3 * 13 + (0 + 1 + 2)
    assert outcome.usage.critical_path_tokens == 5 + 15  # the longest draft, then the longest judgement


def test_every_judgement_has_an_order_of_its_own_and_it_is_undone() -> None:
    """The judge prefers whatever stands first: summed over many orders, nobody is preferred much."""
    orders: list[list[str]] = []

    def script(context: str, path: tuple[int, ...]) -> str:
        orders.append(shown(context))
        return "".join(f"\nResponse {i}: {11 - i}" for i in range(1, 5)) + " $"

    spec = "best_of(samples=4, scorer=judge(engine='judge', samples=24))"
    outcome, _ = run(spec, replies(*DRAFTS), judge=ScriptedEngine(script))
    texts = ["a answer: 1", "b b answer: 2", "c answer: 3", "d answer: 2"]
    assert all(sorted(order) == texts for order in orders)
    assert len({tuple(order) for order in orders}) > 10
    assert [c.weight for c in outcome.candidates] == [sum(10 - order.index(text) for order in orders) for text in texts]
    seen = orders[:]
    orders.clear()
    run(spec, replies(*DRAFTS), judge=ScriptedEngine(script))
    assert orders == seen  # same seed, same orders
    orders.clear()
    run(spec, replies(*DRAFTS), judge=ScriptedEngine(script), seed=1)
    assert orders != seen


def test_the_judge_sees_solutions_with_an_answer_and_the_question() -> None:
    drafts = replies(" <think> why 1 </think> answer: 1 $", " <think> answer: 7", " answer: none $", " answer: 2 $")
    seen: list[str] = []
    judge = ScriptedEngine(lambda context, _: seen.append(context) or "Response 1: 3\nResponse 2: 3 $")
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "How many?"}]
    spec = "best_of(samples=4, scorer=judge(engine='judge', samples=1, max_chars=100))"
    outcome, _ = run(spec, drafts, chat, judge)
    assert sorted(shown(seen[0])) == ["answer: 1", "answer: 2"]
    assert "system: Be brief.\n\nuser: How many?" in seen[0]
    assert len(outcome.candidates) == 4
    long = replies(" x" * 300 + " answer: 1 $", " answer: 2 $")
    seen.clear()
    run(spec, long, judge=judge)
    assert "[...]" in seen[0]
    assert sum(map(len, shown(seen[0]))) == 100 + 2 * len(" [...] ")
    assert "answer: 1\n" in seen[0]  # the end is kept


def test_judgements_that_cannot_be_used_are_dropped() -> None:
    """Of four: off the scale, nonsense, one that forgets a response (which gets the mean, 5), and a good one."""

    def script(context: str, path: tuple[int, ...]) -> str:
        reply = [
            lambda text: 99,
            lambda text: "well",
            lambda text: {"a": "none", "b": 9, "c": 5, "d": 1}[text[0]],
            lambda text: {"a": 6, "b": 1, "c": 5, "d": 1}[text[0]],
        ][path[-1] % 4]
        return "".join(f"\nResponse {i}: {reply(text)}" for i, text in enumerate(shown(context), 1)) + " $"

    spec = "best_of(samples=4, scorer=judge(engine='judge'))"
    outcome, _ = run(spec, replies(*DRAFTS), judge=ScriptedEngine(script))
    assert [c.weight for c in outcome.candidates] == [5 + 6, 9 + 1, 5 + 5, 1 + 1]
    assert outcome.answer == "1"


@pytest.mark.parametrize("scorer", ["judge", "checklist", "bayes_risk(utility='judge')", "judge(samples=3, meta='')"])
@pytest.mark.parametrize(
    "nonsense",
    [
        " $",
        " I like them all $",
        " Response 1: 1000\nBest: 99\nScore: 1.5 $",
        " <think>\nResponse 1: 9\nResponse 2: 1\nBest: 1\nScore: 9 $",  # thought, not said
    ],
)
def test_nonsense_leaves_the_choice_to_the_majority(scorer: str, nonsense: str) -> None:
    def script(context: str, path: tuple[int, ...]) -> str:
        return nonsense if "NUMBER" in context else DRAFTS[path[-1]]

    outcome, _ = run(f"best_of(samples=4, scorer={scorer})", script)
    assert outcome.text == " b b answer: 2"
    assert {c.weight for c in outcome.candidates} == {0.0}


def test_a_meta_judge_keeps_the_best_half() -> None:
    """Judgements 1 and 3 are rated 9 and 8, the others 2 and nonsense: only those two count."""
    prefers = ["a", "b", "a", "c"]  # without the meta-judge a has 2 x 10 + 2, b and c have 13

    def judging(context: str, path: tuple[int, ...]) -> str:
        call = path[-1] - 4  # after the drafts
        lines = [f"\nResponse {i}: {10 if text[0] == prefers[call] else 1}" for i, text in enumerate(shown(context), 1)]
        return f" verdict{call} " + "".join(lines) + " $"

    def rating(context: str, path: tuple[int, ...]) -> str:
        call = int(re.findall(r"verdict(\d)", context)[0])
        return [" Score: 2 $", " Score: 9 $", " hm $", " ok fine Score: 3\nScore: 8 $"][call]

    meta = ScriptedEngine(rating)
    judge = ScriptedEngine(judging)

    async def main(spec: str) -> Outcome:
        async with orchestra.connect(ScriptedEngine(replies(*DRAFTS)), {"judge": judge, "meta": meta}) as connection:
            return await connection.run(spec, "go")

    plain = asyncio.run(main("best_of(samples=4, scorer=judge(engine='judge'))"))
    assert answers(plain) == {"1": 22, "2": 4, "3": 13}
    spec = "best_of(samples=4, scorer=judge(engine='judge', meta='meta'))"
    outcome = asyncio.run(main(spec))
    assert [c.weight for c in outcome.candidates] == [2, 11, 11, 2]
    assert outcome.answer == "2"  # equal sums: 2 is the most frequent answer
    assert len(meta.requests) == 4
    assert {r.sampling.temperature for r in meta.requests} == {0.0}
    assert outcome.usage.critical_path_tokens == 5 + 14 + 7  # draft, judgement, rating
    three = asyncio.run(main(spec.replace("meta='meta'", "meta='meta', keep=3")))
    assert [c.weight for c in three.candidates] == [12, 12, 12, 3]  # the rating of 2 beats none
    only = asyncio.run(main(spec.replace("meta='meta'", "meta='meta', keep=4")))
    assert answers(only) == answers(plain)
    assert len(meta.requests) == 8  # nothing to leave out, nothing to ask


def test_an_unknown_engine_is_an_error_before_anything_is_drawn() -> None:
    engine = ScriptedEngine(replies(*DRAFTS))
    for scorer in ("judge(engine='jugde')", "judge(meta='jugde')", "checklist(engine='jugde')"):
        with pytest.raises(UsageError, match="unknown engine alias 'jugde'"):
            orchestra.run(f"self_consistency(drafts=best_of(scorer={scorer}))", "go", engine=engine)
    assert not engine.requests


# -- checklist and minimum Bayes risk --


def test_a_checklist_picks_one_in_one_call() -> None:
    def script(context: str, path: tuple[int, ...]) -> str:
        return f" - short\nBest: Response {shown(context).index('c answer: 3') + 1} $"

    judge = ScriptedEngine(script)
    for seed in range(8):
        spec = "best_of(samples=4, scorer=checklist(engine='judge'))"
        outcome, _ = run(spec, replies(*DRAFTS), judge=judge, seed=seed)
        assert [c.weight for c in outcome.candidates] == [0, 0, 1, 0]
        assert outcome.answer == "3"
        assert outcome.usage.critical_path_tokens == 5 + 6
    assert len(judge.requests) == 8
    assert {r.sampling.temperature for r in judge.requests} == {0.0}


def test_minimum_bayes_risk_takes_what_the_others_agree_with() -> None:
    drafts = replies(" red green blue $", " red green $", " black $")
    outcome, requests = run("best_of(samples=3, scorer=bayes_risk)", drafts)
    assert [c.weight for c in outcome.candidates] == [0.4, 0.4, 0.0]
    assert outcome.text == " red green blue"
    assert len(requests) == 3
    assert outcome.usage.critical_path_tokens == 4


def test_evidence_is_measured_against_but_not_eligible() -> None:
    """Two of three say red; the evidence, in another language, says black."""

    def script(context: str, path: tuple[int, ...]) -> str:
        return " black $" if "Answer in Welsh." in context else [" red $", " red $", " black $"][path[-1] % 3]

    spec = "best_of(samples=3, scorer=bayes_risk(evidence=3, language='Welsh'))"
    outcome, requests = run(spec, script)
    assert [c.weight for c in outcome.candidates] == [1 / 5, 1 / 5, 3 / 5]
    assert outcome.text == " black"
    assert len(outcome.candidates) == 3
    assert sorted(r.sampling.temperature for r in requests) == [0.6, 0.6, 0.6, 0.7, 0.7, 0.7]
    assert outcome.usage.critical_path_tokens == 2 + 2
    assert "language other than" in str(run("best_of(scorer=bayes_risk(evidence=1))", script)[0].graph.to_json())


def test_a_model_as_the_utility() -> None:
    """Every ordered pair is one call: the rating of a response is by its letter, whatever the reference."""

    def script(context: str, path: tuple[int, ...]) -> str:
        response = re.findall(r"<response>\n(.*?)\n</response>", context)[0]
        reference = re.findall(r"<reference>\n(.*?)\n</reference>", context)[0]
        if reference[0] == "d":
            return " no idea $"
        return f" Score: {2 + 'abcd'.index(response[0])} $"

    judge = ScriptedEngine(script)
    spec = "best_of(samples=4, scorer=bayes_risk(utility='judge', engine='judge', evidence=1))"
    outcome, requests = run(spec, replies(*DRAFTS), judge=judge)
    assert [c.weight for c in outcome.candidates] == [2, 3, 4, 5]
    assert len(requests) == 5
    assert len(judge.requests) == 4 * (3 + 1)
    assert (
        outcome.usage.critical_path_tokens == 5 + 4 + 3
    )  # draft, evidence (it says what the first draft says), rating


# -- budgets and laws --


def test_a_budget_that_ends_yields_the_best_so_far() -> None:
    spec = BestOf(samples=4, reward=lambda text: -len(text))
    outcome, _ = run(spec, replies(*DRAFTS), budget="critical_path_tokens=4")
    assert (outcome.answer, outcome.stopped_by) == ("1", "critical_path_tokens")
    judge = scoring(lambda text, call: 9 if text[0] == "c" else 4, words=lambda call: 1 + 20 * call)
    spec = "best_of(samples=4, scorer=judge(engine='judge', samples=2))"
    for limit, weights, answer in [
        (4, {"1": 1.0, "3": 1.0, "2": 1.0}, "1"),  # a draft is cut: the others have not been judged
        (5 + 10, {"1": 1.0, "2": 1.0, "3": 1.0}, "2"),  # no judgement has come: the vote decides
        (5 + 20, {"1": 4.0, "2": 4.0, "3": 9.0}, "3"),  # one has
        (5 + 40, {"1": 8.0, "2": 8.0, "3": 18.0}, "3"),
    ]:
        judge = scoring(lambda text, call: 9 if text[0] == "c" else 4, words=lambda call: 1 + 20 * call)
        outcome, _ = run(spec, replies(*DRAFTS), judge=judge, budget=f"critical_path_tokens={limit}")
        assert (answers(outcome), outcome.answer) == (weights, answer), limit
        assert outcome.usage.critical_path_tokens <= limit
        assert outcome.stopped_by == (None if limit == 45 else "critical_path_tokens")


SCORERS = [
    "logprob",
    "judge(samples=3)",
    "judge(samples=4, meta='')",
    "checklist",
    "bayes_risk(utility='chrf')",
    "bayes_risk(utility='judge', evidence=2)",
]


@pytest.mark.parametrize("scorer", SCORERS)
def test_the_laws_on_a_script(scorer: str) -> None:
    def script(context: str, path: tuple[int, ...]) -> str:
        if "NUMBER" not in context:
            return DRAFTS[path[-1] % 4]
        lines = [f"\nResponse {i}: {1 + len(text) % 10}" for i, text in enumerate(shown(context), 1)]
        return " hm" * (path[-1] % 3) + "".join(lines) + f"\nBest: 2\nScore: {1 + path[-1] % 9} $"

    spec = f"best_of(samples=4, hedged=true, scorer={scorer})"
    asyncio.run(asyncio.wait_for(check_strategy(ScriptedEngine(script), spec, "go"), 60))


@pytest.mark.parametrize("scorer", [*SCORERS[1:4], SCORERS[5]])
def test_the_laws_on_a_real_model(tiny: str, scorer: str) -> None:
    """It writes garbage, as a judge too: a choice is made all the same."""

    async def main() -> Outcome:
        engine = open_engine(f"local:{tiny}")
        try:
            spec = f"best_of(samples=3, scorer={scorer})"
            return await asyncio.wait_for(check_strategy(engine, spec, "Why?", max_tokens=12), 120)
        finally:
            await engine.close()

    outcome = asyncio.run(main())
    assert outcome.text
    assert len(outcome.candidates) == 3


def test_the_judge_and_the_run_may_live_on_different_real_engines(tiny: str) -> None:
    async def main() -> Outcome:
        async with orchestra.connect("demo", {"judge": f"local:{tiny}"}) as connection:
            spec = BestOf(samples=3, scorer=Judge(engine="judge", samples=2, max_tokens=8))
            return await connection.run(spec, "numbers: 3 7 8 12 target: 54", max_tokens=60)

    outcome = asyncio.run(asyncio.wait_for(main(), 120))
    assert outcome.usage.requests == 5
    assert {node.engine for node in outcome.graph.nodes if node.count("sampled")} == {"", "judge"}
