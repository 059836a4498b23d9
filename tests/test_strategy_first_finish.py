"""First, last and shortest thinking: who wins, who is cancelled when, and what that costs."""

from __future__ import annotations

import math
import random
from itertools import accumulate
from pathlib import Path
from statistics import NormalDist

import pytest
from voters import PROMPT, Grouped, charged, laws_on, laws_on_the_embedded_model, replayed, run, votes

from orchestra.errors import SpecError
from orchestra.runtime.connect import open_engine
from orchestra.spec import parse_strategy
from orchestra.testing.scripted import Script, ScriptedEngine, replies, words

# -- the first k -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("first", "answer", "path"), [(1, "1", 3), (2, "1", 4), (3, "2", 6), (4, "2", 7)])
def test_first_finish_votes_over_the_first_k(first: int, answer: str, path: int) -> None:
    """In the order of the finish the answers are 1, 2, 2, 2: of the first two the earlier one wins the tie."""
    script = replies(" x x x answer: 2 $", " answer: 1 $", " x answer: 2 $", " x x x x answer: 2 $")
    outcome = run(f"first_finish(samples=4, first={first})", script)
    assert outcome.answer == answer
    assert outcome.usage.critical_path_tokens == path
    assert votes(outcome) == [("1", 1), ("2", 1), ("2", 1), ("2", 1)][:first]
    # Who is ranked before the winner at equal length may go on to one token more; by index, 0 loses to 1 and 2.
    assert charged(outcome) == {1: [4, 3, 3, 3], 2: [5, 3, 4, 4], 3: [6, 3, 4, 6], 4: [6, 3, 4, 7]}[first]


def test_of_equal_lengths_the_lower_index_wins() -> None:
    script = replies(" x x x answer: 0 $", " x answer: 1 $", " x answer: 2 $")
    for by in ("tokens", "time"):
        assert run(f"first_finish(samples=3, by='{by}')", script).answer == "1"


def test_a_sample_that_is_cut_off_has_ended() -> None:
    script = replies(" x x x\n answer: none $", " x x x answer: 1 $")
    outcome = run("first_finish(samples=2)", script, max_tokens=5)
    assert (outcome.finish_reason, outcome.answer, outcome.usage.critical_path_tokens) == ("length", None, 5)


# -- the last k --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("last", "answer"), [(1, "7"), (2, "7"), (3, "1"), (5, "1")])
def test_last_finish_votes_over_the_k_longest(last: int, answer: str) -> None:
    """Lengths 4, 7, 5, 6 and 3: the answers from the longest on are 7, 1, 1, 1, 1; of two the longest wins the tie."""
    script = replies(*(" x" * n + f" answer: {a} $" for n, a in [(1, 1), (4, 7), (2, 1), (3, 1), (0, 1)]))
    engine = Grouped(script)
    outcome = run(f"first_finish(samples=5, last={last})", engine=engine)
    assert engine.groups == [5]  # nothing is raced
    assert outcome.answer == answer
    assert [candidate.tokens for candidate in outcome.candidates] == [7, 6, 5, 4, 3]
    assert [weight for _, weight in votes(outcome)] == [1.0] * last + [0.0] * (5 - last)
    assert (outcome.usage.sampled_tokens, outcome.usage.critical_path_tokens) == (25, 7)


def test_of_equal_lengths_the_higher_index_ends_later() -> None:
    script = replies(" x answer: 0 $", " x answer: 1 $", " answer: 2 $")
    outcome = run("first_finish(samples=3, last=1)", script)
    assert (outcome.answer, votes(outcome)) == ("1", [("1", 1), ("0", 0), ("2", 0)])


def test_a_long_sample_without_an_answer_takes_its_place_and_has_no_vote() -> None:
    script = replies(" x x x x\n answer: none $", " x answer: 1 $", " answer: 2 $")
    assert run("first_finish(samples=3, last=2)", script).answer == "1"
    assert run("first_finish(samples=3, last=1)", script).answer is None


# -- the shortest thinking ---------------------------------------------------------------------------------------------


def thinker(*samples: tuple[int, str], tag: str = "</think>") -> Script:
    """Fork k thinks so many tokens, the tag included, then says its solution."""

    def script(context: str, path: tuple[int, ...]) -> str:
        thinking, solution = samples[path[-1]]
        return solution if tag in context else " t" * (thinking - 1) + f" {tag}{solution}"

    return script


FOUR = thinker(
    (5, " so it is answer: 2 $"), (3, " s s s s answer: 1 $"), (4, " answer: 2 $"), (9, " answer: 3 $")
)  # solutions of 6, 7, 3 and 3 tokens


@pytest.mark.parametrize(
    ("m", "answer", "tokens", "path"),
    [
        (1, "1", [4, 3 + 7, 3, 3], 3 + 7),
        (2, "1", [5, 3 + 7, 4 + 3, 4], 4 + 7),
        (3, "2", [5 + 6, 3 + 7, 4 + 3, 5], 5 + 7),
        (4, "2", [5 + 6, 3 + 7, 4 + 3, 9 + 3], 9 + 7),
    ],
)
def test_short_m_lets_those_that_thought_shortest_finish(m: int, answer: str, tokens: list[int], path: int) -> None:
    """The longest solution belongs to the shortest thinking: the race ends at the thinking, not at the answer."""
    outcome = run(f"first_finish(samples=4, first={m}, until='thinking')", FOUR)
    assert outcome.answer == answer  # 1, 2, 2, 3 in the order of the thinking; ties to the shortest
    assert charged(outcome) == tokens
    assert outcome.usage.critical_path_tokens == path
    assert [candidate.tokens for candidate in outcome.candidates] == [10, 7, 11, 12][:m]
    assert outcome.candidates[0].text == " t t </think> s s s s answer: 1"


def test_the_end_of_thinking_can_be_another_word() -> None:
    script = thinker((4, " answer: 4 $"), (2, " x x x answer: 2 $"), tag="<|done|>")
    assert run("first_finish(samples=2, until='thinking', thinking_end='<|done|>')", script).answer == "2"


def test_a_sample_that_ends_without_the_end_of_thinking_has_finished_there() -> None:
    def script(context: str, path: tuple[int, ...]) -> str:
        return " answer: 8 $" if path[-1] == 1 else thinker((5, " answer: 2 $"))(context, path)

    outcome = run("first_finish(samples=2, first=2, until='thinking')", script)
    assert votes(outcome) == [("8", 1), ("2", 1)]
    assert outcome.usage.requests == 3


def test_max_tokens_hold_for_thinking_and_solution_together() -> None:
    spec = "first_finish(samples=1, until='thinking')"
    script = thinker((5, " s answer: 2 $"))
    for most, text, reason in [
        (4, " t t t t", "length"),  # cut off in its thinking
        (5, " t t t t </think>", "length"),  # nothing left for the solution
        (7, " t t t t </think> s answer:", "length"),
        (9, " t t t t </think> s answer: 2", "stop"),
    ]:
        outcome = run(spec, script, max_tokens=most)
        assert (outcome.text, outcome.finish_reason) == (text, reason), most
        assert outcome.candidates[0].tokens == outcome.usage.sampled_tokens == min(most, 9)
    limited = run("first_finish(samples=1, until='thinking', drafts=sample(max_tokens=7))", script, max_tokens=90)
    assert limited.usage.sampled_tokens == 7


def test_stop_strings_of_the_run_and_of_the_drafts_hold_too() -> None:
    script = thinker((5, " s END x $"))
    for settings, spec in [
        ({"stop": "END"}, "first_finish(samples=1, until='thinking')"),
        ({}, "first_finish(samples=1, until='thinking', drafts=sample(stop=['END']))"),
    ]:
        assert run(spec, script, **settings).text == " t t t t </think> s END"
    in_thinking = run("first_finish(samples=1, until='thinking')", script, stop=["t t"])
    assert (in_thinking.text, in_thinking.usage.requests) == (" t t", 1)
    assert run("first_finish(samples=1, until='thinking')", script, stop="</think>").usage.requests == 2


def test_a_budget_that_ends_in_the_solutions_yields_what_is_finished() -> None:
    outcome = run("first_finish(samples=4, first=2, until='thinking')", FOUR, budget="critical_path_tokens=8")
    assert (outcome.stopped_by, outcome.answer) == ("critical_path_tokens", "2")  # 4 + 3 is done, 4 + 7 is not
    assert outcome.usage.critical_path_tokens == 8


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("first_finish(samples=4, first=5)", "first=5 of samples=4"),
        ("first_finish(samples=4, last=5)", "last=5 of samples=4"),
        ("first_finish(samples=4, first=2, last=2)", "leave first"),
        ("first_finish(samples=4, last=2, by='time')", "leave first"),
        ("first_finish(samples=4, last=2, until='thinking')", "leave first"),
        ("first_finish(until='thinking', drafts=spawn_join)", "drafts=sample.*not spawn_join"),
        ("first_finish(thinking_end='')", "thinking_end"),
    ],
)
def test_nonsense_is_refused(spec: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        parse_strategy(spec)


# -- cancellation and the laws -----------------------------------------------------------------------------------------


def test_the_losers_stop_within_two_steps_of_the_winners_end() -> None:
    """On a real model, in process: eight samples of 300 to 2000 tokens. A machine that is busy may lag once."""
    late = []
    for seed in range(3):
        outcome = run("first_finish(samples=8)", engine=open_engine("demo"), prompt=PROMPT, seed=seed, temperature=1.0)
        winner = outcome.usage.critical_path_tokens
        losers = [node.count("sampled") for node in outcome.graph.nodes if node.finish_reason == "cancelled"]
        assert outcome.candidates[0].tokens == winner
        assert len(losers) >= 3
        late.append(max(losers) - winner)
    assert min(late) <= 2
    assert max(late) <= 16


@pytest.mark.parametrize("options", ["", ", last=2", ", first=2, until='thinking', thinking_end='w4'"])
def test_the_laws(options: str) -> None:
    lengths = words([9, 5, 7, 30])
    laws_on(ScriptedEngine(lambda _, path: lengths[path[-1] % 4]), f"first_finish(samples=4{options})")
    options = options.replace("w4", "=")  # the first result of a step ends the "thinking" of the embedded model
    outcome = laws_on_the_embedded_model(f"first_finish(samples=4{options})", max_tokens=80, temperature=1)
    assert outcome.usage.requests == (6 if "thinking" in options else 4)


# -- theory ------------------------------------------------------------------------------------------------------------


def least_of(n: int, mean: float, deviation: float) -> float:
    """Expected minimum of n normals: the integral of P(all are above t), by the trapezoid rule."""
    normal, steps, reach = NormalDist(), 4000, 10.0
    above = [(1 - normal.cdf(-reach + 2 * reach * i / steps)) ** n for i in range(steps + 1)]
    area = list(accumulate(above))[-1] - (above[0] + above[-1]) / 2
    return mean + deviation * (-reach + area * 2 * reach / steps)


def test_the_winner_of_normal_lengths_takes_what_theory_says(tmp_path: Path) -> None:
    """And the paper's mu - sigma sqrt(2 ln n) is below it: it is what large n come to."""
    assert least_of(2, 0, 1) == pytest.approx(-1 / math.sqrt(math.pi), abs=1e-6)
    source, runs, mean, deviation = random.Random(1), 200, 10_000, 2000
    items = [[(round(source.gauss(mean, deviation)), str(i)) for i in range(16)] for _ in range(runs)]
    for n in (4, 16):
        outcomes = replayed(tmp_path / f"{n}.jsonl", f"first_finish(samples={n})", items)
        taken = [o.usage.critical_path_tokens for o in outcomes]
        assert taken == [min(tokens for tokens, _ in item[:n]) for item in items]
        expected = least_of(n, mean, deviation)
        error = math.sqrt(sum((t - expected) ** 2 for t in taken)) / runs
        assert abs(sum(taken) / runs - expected) < 4 * error
        assert mean - deviation * math.sqrt(2 * math.log(n)) < expected - 8 * error
        spent = sum(o.usage.sampled_tokens for o in outcomes) / runs
        assert abs(spent - n * expected) < 4 * n * error + n  # all run until the first has ended
