"""Scorers without a run: their specs, how they read what a judge says, and the utilities of minimum Bayes risk."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import orchestra
from orchestra import BestOf, Candidate, Outcome, Sample, SelfConsistency, Strategy, Thread, parse_strategy
from orchestra.errors import SpecError, UsageError
from orchestra.spec import EngineAlias
from orchestra.strategies import Scorer
from orchestra.strategies.scorers import BayesRisk, Checklist, Judge, Logprob, MeanLogprob
from orchestra.strategies.scorers.asking import best_in, rating_in, scores_in, shortened, task
from orchestra.strategies.scorers.base import LOWEST, tell
from orchestra.strategies.scorers.bayes_risk import _grams, _words, chrf, f1
from orchestra.strategies.voting import majority
from orchestra.testing.scripted import ScriptedEngine, replies

# -- specs --

aliases = st.sampled_from(["", "judge", "it's"])
asking: dict[str, Any] = {
    "engine": aliases,
    "max_tokens": st.none() | st.integers(1, 9999),
    "max_chars": st.integers(100, 10**6),
}
scorers = (
    st.builds(Logprob)
    | st.builds(MeanLogprob)
    | st.builds(Checklist, **asking)
    | st.builds(Judge, samples=st.integers(1, 32), temperature=st.floats(0, 2), meta=st.none() | aliases, **asking)
    | st.builds(Judge, samples=st.integers(4, 32), meta=aliases, keep=st.integers(1, 4))
    | st.builds(
        BayesRisk,
        utility=st.sampled_from(["exact", "f1", "chrf", "judge"]),
        evidence=st.integers(0, 64),
        language=st.none() | st.text(max_size=9),
        **asking,
    )
)
best_ofs = st.builds(BestOf, samples=st.integers(1, 64), scorer=scorers, hedged=st.booleans(), min_p=st.floats(0, 1))


@given(st.recursive(best_ofs, lambda inner: st.builds(BestOf, scorer=scorers, drafts=inner), max_leaves=3))
def test_the_three_forms_name_the_same_strategy(chosen: Strategy) -> None:
    assert parse_strategy(chosen.to_spec()) == chosen
    assert parse_strategy(chosen.to_dict()) == chosen
    assert parse_strategy(json.loads(json.dumps(chosen.to_dict()))) == chosen


@given(scorers)
def test_the_three_forms_name_the_same_scorer(scorer: Scorer) -> None:
    assert Scorer.parse(scorer.to_spec()) == Scorer.parse(scorer.to_dict()) == scorer
    assert Scorer.parse(scorer) is scorer


def test_a_scorer_by_name_by_call_and_in_json() -> None:
    chosen = BestOf(samples=8, scorer=Judge(engine="judge", samples=2))
    for form in (
        "best_of(samples=8, scorer=judge(engine='judge', samples=2))",
        {"strategy": "best_of", "samples": 8, "scorer": {"scorer": "judge", "engine": "judge", "samples": 2}},
        {"strategy": "best_of", "samples": 8, "scorer": "judge(engine='judge', samples=2)"},
    ):
        assert parse_strategy(form) == chosen
    for form in ("best_of(scorer=logprob)", "best_of(scorer='logprob')", {"strategy": "best_of", "scorer": "logprob"}):
        assert parse_strategy(form) == BestOf(scorer=Logprob()) == BestOf(scorer="logprob")  # type: ignore[comparison-overlap]
    assert BestOf().to_dict() == {"strategy": "best_of"}


def test_what_a_scorer_needs_is_what_the_strategy_needs() -> None:
    assert parse_strategy("best_of").requirements() == {"logprobs"}
    assert parse_strategy("self_consistency(drafts=best_of(scorer=logprob))").requirements() == {"logprobs"}
    assert not parse_strategy("best_of(scorer=judge)").requirements()
    assert parse_strategy("best_of(drafts=spawn_join, scorer=judge)").requirements() == {"continue"}
    assert not BestOf(reward=len).requirements()
    spec = "self_consistency(drafts=best_of(scorer=judge(engine='a', meta='b')))"
    assert parse_strategy(spec).aliases() == {"a", "b"}
    assert parse_strategy("best_of(scorer=judge)").aliases() == {""}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("best_of(scorer=jugde)", r"unknown scorer 'jugde'; did you mean 'judge'.*mean_logprob"),
        ("best_of(scorer=sample)", "unknown scorer 'sample'"),
        ("best_of(scorer=reward)", "unknown scorer 'reward'"),
        ("self_consistency(drafts=judge)", "unknown strategy 'judge'"),
        ("judge", "unknown strategy 'judge'"),
        ("best_of(scorer=judge(sample=3))", "judge: unknown parameter 'sample'; did you mean 'samples'"),
        ("best_of(scorer=judge(samples=0))", "judge: samples = 0"),
        ("best_of(scorer=judge(samples=4, keep=2))", "keep=2 needs meta"),
        ("best_of(scorer=judge(samples=4, meta='', keep=5))", "at most samples=4"),
        ("best_of(scorer=bayes_risk(utility=bleu))", "'exact', 'f1', 'chrf' or 'judge'"),
        ("best_of(scorer=3)", "a scorer spec is like 'judge"),
        ("best_of(scorer='judge(')", "does not parse"),
        ("best_of(scorer=judge(engine=judge))", "valid string"),
        ("best_of(hedged=true, drafts=spawn_join)", r"drafts=sample\(...\)"),
        ("best_of(reward=3)", "callable"),
        ({"strategy": "best_of", "scorer": {"strategy": "judge"}}, "a scorer spec is like"),
        ({"scorer": "judge"}, "a strategy spec is like"),
    ],
)
def test_bad_specs(spec: Any, message: str) -> None:
    with pytest.raises(SpecError, match=message) as caught:
        parse_strategy(spec)
    assert "\n" not in str(caught.value)


@given(st.text(max_size=60))
def test_any_text_parses_or_is_a_spec_error(text: str) -> None:
    with contextlib.suppress(SpecError):
        assert isinstance(Scorer.parse(text), Scorer)


class Shortest(Scorer):
    """A user's own: the shortest text."""

    but_not_below: int = 0
    engine: EngineAlias = ""

    def weigh(self, candidate: Candidate) -> float:
        return -float(max(len(candidate.text), self.but_not_below))


class Odd(Scorer):
    """One that compares, and gives what it is told to."""

    scores: list[float]

    async def __call__(self, thread: Thread, candidates: Sequence[Candidate]) -> list[float]:
        return self.scores


def run(spec: Any, *texts: str) -> Outcome:
    return orchestra.run(spec, "go", engine=ScriptedEngine(replies(*texts)))


def test_a_users_own_scorer() -> None:
    texts = (" answer: aaaa $", " answer: bb $", " answer: c $")
    assert run("best_of(samples=3, scorer=shortest)", *texts).answer == "c"
    assert run("best_of(samples=3, scorer=shortest(but_not_below=11))", *texts).answer == "bb"
    assert run(BestOf(samples=3, scorer=Shortest()), *texts).answer == "c"
    assert run("best_of(samples=3, scorer=odd(scores=[1, 3, 2]))", *texts).answer == "bb"
    with pytest.raises(UsageError, match="odd gave 2 scores for 3 candidates"):
        run("best_of(samples=3, scorer=odd(scores=[1, 2]))", *texts)
    with pytest.raises(UsageError, match="unknown engine alias 'nowhere'"):
        run("best_of(samples=3, scorer=shortest(engine='nowhere'))", *texts)
    with pytest.raises(UsageError, match="built-in scorer 'judge'"):
        type("Judge", (Scorer,), {"__module__": __name__})
    with pytest.raises(UsageError, match="cannot be called scorer"):
        type("Taken", (Scorer,), {"__module__": __name__, "__annotations__": {"scorer": int}})


def test_scores_that_are_no_numbers_come_last_and_survive_json() -> None:
    candidates = [Candidate(text=text, answer=text) for text in "abcd"]
    tell(candidates, [float("nan"), float("-inf"), float("inf"), 1])
    assert [c.weight for c in candidates] == [LOWEST, LOWEST, -LOWEST, 1]
    assert Candidate.model_validate_json(candidates[0].model_dump_json()) == candidates[0]
    assert (
        run(BestOf(samples=2, reward=lambda text: float("nan") if "1" in text else -1e300), " 1 $", " 2 $").text == " 2"
    )


# -- what a judge says --


@pytest.mark.parametrize(
    ("reply", "scores"),
    [
        ("Response 1: 7\nResponse 2: 3\nResponse 3: 10", [7, 3, 10]),
        ("  - **Response 3**: **10**/10\n> response #2 = score: 3\nRESPONSE 1:7.0", [7, 3, 10]),
        ("Response 1: 2\nResponse 1: 9\nResponse 2: 1\nResponse 3: 1", [9, 1, 1]),  # the last word counts
        ("Response 1: 8\nResponse 3: 4", [8, 6, 4]),  # forgotten: the mean
        ("Response 2: 8", [8, 8, 8]),
        ("Response 1: 8\nResponse 9: 99\nResponse 2: 1\nResponse 3: 3", [8, 1, 3]),  # there is no ninth
        ("Response 1: 8\nResponse 2: 0\nResponse 3: 3", None),
        ("Response 1: 8\nResponse 2: 11\nResponse 3: 3", None),
        ("Response 1: 8\nResponse 2: -3\nResponse 3: 3", None),
        ("Response 1: 7.5\nResponse 2: 3\nResponse 3: 3", None),
        ("Response 1: 80\nResponse 2: 95\nResponse 3: 70", None),
        ("I think Response 1: 7 is good", None),
        ("Response 0: 7", None),
        ("Response 1: NUMBER", None),
        ("", None),
    ],
)
def test_scores(reply: str, scores: list[float] | None) -> None:
    assert scores_in(reply, 3) == scores


def test_ratings_and_picks() -> None:
    assert rating_in("Score: 3\nno.\n**Score:** 8/10") == 8
    assert [rating_in(reply) for reply in ("Score: 0", "Score: 11", "Score: 7.5", "a score: 3", "")] == [None] * 5
    assert best_in("Best: Response 1\nBest: Response 3", 3) == 3
    assert best_in("**Best:** 2", 3) == 2
    assert [best_in(reply, 3) for reply in ("Best: Response 4", "Best: 0", "Best: 12", "the best: 1", "")] == [None] * 5


words = st.sampled_from(
    ["response", "Response 1", "Score", "best", ":", " ", "\n", "1", "10", "-", "*", "9" * 400, "٣"]
)


@given(st.text() | st.lists(words).map("".join), st.integers(1, 5))
def test_any_reply_is_scores_in_range_or_none(reply: str, count: int) -> None:
    scores = scores_in(reply, count)
    assert scores is None or (len(scores) == count and all(1 <= score <= 10 for score in scores))
    rating, best = rating_in(reply), best_in(reply, count)
    assert rating is None or 1 <= rating <= 10
    assert best is None or 1 <= best <= count


@pytest.mark.parametrize(
    "piece", ["response", "response 1:", "\n" + " " * 9, "*" * 99, "score:=", "1", "\nbest: ", "> \t"]
)
def test_adversarial_replies_take_no_time(piece: str) -> None:
    reply, began = piece * (1_000_000 // len(piece)), time.perf_counter()
    scores_in(reply, 3)
    rating_in(reply)
    best_in(reply, 3)
    assert time.perf_counter() - began < 1


@given(st.lists(st.text(max_size=300), min_size=1, max_size=8), st.integers(0, 600))
def test_solutions_are_shortened_alike_and_no_more_than_they_must_be(texts: list[str], total: int) -> None:
    shown = shortened(texts, total)
    kept = [len(s.replace(" [...] ", "", 1)) if s != t else len(t) for s, t in zip(shown, texts, strict=True)]
    if sum(map(len, texts)) <= total:
        assert shown == texts
        return
    assert sum(kept) <= total
    cut = [size for size, text, s in zip(kept, texts, shown, strict=True) if s != text]
    assert len(set(cut)) == 1
    assert all(size <= cut[0] for size in kept)
    assert total - sum(kept) < len(texts)  # nothing is left unused but a remainder
    for text, s, size in zip(texts, shown, kept, strict=True):
        if s != text:
            head, _, tail = s.partition(" [...] ")
            assert len(text) > size
            assert text.startswith(text[: size // 2])
            assert s == f"{text[: size // 2]} [...] {text[len(text) - (size - size // 2) :]}", (head, tail)


def test_what_was_asked_is_quoted() -> None:
    assert task(" Why? ") == "Why?"
    assert task([{"role": "user", "content": "Why?"}]) == "Why?"
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    assert task(chat) == "system: Be brief.\n\nuser: Why?"  # type: ignore[arg-type]


# -- minimum Bayes risk --

texts = st.text(alphabet="ab c", max_size=12)


def scored(scorer: Scorer, candidates: list[Candidate]) -> list[float]:
    return asyncio.run(scorer(None, candidates))  # type: ignore[arg-type]


@given(st.lists(texts, min_size=2, max_size=6))
def test_f1_against_the_definition(said: list[str]) -> None:
    def brute(one: str, other: str) -> float:
        a, b = one.split(), other.split()
        rest, common = list(b), 0
        for word in a:
            if word in rest:
                rest.remove(word)
                common += 1
        if not a and not b:
            return 1.0
        if not common:
            return 0.0
        precision, recall = common / len(a), common / len(b)
        return 2 * precision * recall / (precision + recall)

    expected = [sum(brute(t, o) for j, o in enumerate(said) if j != i) / (len(said) - 1) for i, t in enumerate(said)]
    assert scored(BayesRisk(), [Candidate(text=text) for text in said]) == pytest.approx(expected)


def test_chrf_by_hand() -> None:
    def of(one: str, other: str) -> float:
        return chrf(_grams(Candidate(text=one)), _grams(Candidate(text=other)))

    assert of("a b c", "abc") == pytest.approx(1)  # white space does not count
    assert of("abc", "abd") == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)
    # "ab" against "abcd": precision 1 and 1; recall 2/4 and 1/3; lengths 3 and 4 exist in one only
    precision, recall = 1.0, (1 / 2 + 1 / 3) / 2
    assert of("ab", "abcd") == pytest.approx(5 * precision * recall / (4 * precision + recall))
    assert (of("", ""), of("a", ""), of("", "a"), of("a", "b")) == (1, 0, 0, 0)


@given(texts, texts)
def test_utilities_are_in_range_and_1_for_equal_texts(one: str, other: str) -> None:
    a, b = Candidate(text=one), Candidate(text=other)
    assert 0 <= f1(_words(a), _words(b)) == f1(_words(b), _words(a)) <= 1
    assert 0 <= chrf(_grams(a), _grams(b)) <= 1 + 1e-12
    assert f1(_words(a), _words(a)) == chrf(_grams(a), _grams(a)) == pytest.approx(1)


@given(st.lists(st.sampled_from(["1", "2", " 2 ", "x Y", "X  y", "4"]), min_size=2, max_size=9))
def test_exact_is_a_majority_vote(answers: list[str]) -> None:
    candidates = [Candidate(text=f"so {answer}", answer=answer) for answer in answers]
    scores = scored(BayesRisk(utility="exact"), candidates)
    counts = Counter(" ".join(answer.split()).lower() for answer in answers)
    expected = [(counts[" ".join(answer.split()).lower()] - 1) / (len(answers) - 1) for answer in answers]
    assert scores == pytest.approx(expected)
    assert BestOf().choose([c.model_copy(update={"weight": 0.0}) for c in candidates]) == majority(candidates)
    tell(candidates, scores)
    assert candidates[BestOf().choose(candidates)].weight == max(scores)


@pytest.mark.parametrize("utility", ["exact", "f1", "chrf"])
def test_equal_texts_have_equal_scores_to_the_bit(utility: str) -> None:
    """Or else rounding, not the vote, would choose between them."""
    rng = random.Random(5)
    for _ in range(40):
        said = [" ".join(rng.choices("abcdefg", k=rng.randint(1, 9))) for _ in range(6)]
        scores = scored(BayesRisk(utility=utility), [Candidate(text=text) for text in [*said, *said[:3]]])
        assert scores[:3] == scores[6:]


def test_thinking_does_not_count_for_the_utility() -> None:
    said = ["<think> a a a </think> x y", "<think> b b </think> x y", "<think> a a a </think> z"]
    assert scored(BayesRisk(), [Candidate(text=text) for text in said]) == [0.5, 0.5, 0.0]


def test_one_candidate_needs_no_model() -> None:
    for scorer in (Judge(), Checklist(), BayesRisk(), BayesRisk(utility="judge")):
        assert scored(scorer, [Candidate(text="a")]) == [1.0]


def test_a_sample_with_settings_may_be_hedged() -> None:
    assert BestOf(hedged=True, drafts=Sample(max_tokens=3)).hedged
    with pytest.raises(ValueError, match="either a scorer or a reward"):
        BestOf(scorer=Judge(), reward=len)
    with pytest.raises(ValueError, match="drafts=sample"):
        BestOf(hedged=True, drafts=SelfConsistency())
