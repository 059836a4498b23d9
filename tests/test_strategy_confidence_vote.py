"""DeepConf: the measures against brute force, the two modes by hand, and a real model that is stopped."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from voters import PROMPT, charged, laws_on, laws_on_the_embedded_model, run, votes

from orchestra import Candidate, Outcome, Thread, strategy
from orchestra.errors import CapabilityError, SpecError
from orchestra.runtime.connect import open_engine
from orchestra.runtime.engine import Capability, Delta
from orchestra.spec import parse_strategy
from orchestra.strategies.confidence import Confidence, quantile
from orchestra.testing.scripted import Script, ScriptedEngine, _Playing, replies


class Sure(ScriptedEngine):
    """A scripted engine with two alternatives a token, whose mean -log p the word says: `x2.5` is 2.5; 1 otherwise."""

    capabilities = ScriptedEngine.capabilities | {Capability.TOP_LOGPROBS}

    def __init__(self, script: Script) -> None:
        super().__init__(script)
        self.asked: set[int] = set()

    def _next(self, playing: _Playing) -> Delta:
        delta = super()._next(playing)
        self.asked.add(playing.request.sampling.top_logprobs)
        word = delta.text.strip()
        sure = float(word[1:]) if word.startswith("x") else 1.0
        delta.top = [{0: -sure + 0.5, 1: -sure - 0.5}]
        return delta


def says(*samples: tuple[Sequence[float], str]) -> Script:
    """Fork k says tokens of these confidences, then (confidence 1, three tokens) its answer."""
    return replies(*(f"{''.join(f' x{c}' for c in sure)}\n answer: {answer} $" for sure, answer in samples))


# -- the measures ------------------------------------------------------------------------------------------------------


def delta(*confidences: float) -> Delta:
    return Delta(count=len(confidences), top=[{0: -c - 1.0, 1: -c + 1.0} for c in confidences])


def groups(tokens: Sequence[float], window: int) -> list[float]:
    size = min(window, len(tokens))
    return [sum(tokens[i : i + size]) / size for i in range(len(tokens) - size + 1)]


tokens = st.lists(st.floats(0, 50), min_size=1, max_size=60)


@given(tokens, st.integers(1, 70))
def test_the_measures_are_what_they_are_called(given: list[float], window: int) -> None:
    confidence = Confidence(window)
    for first, later in pairwise([0, len(given) // 3, len(given)]):
        confidence.watch(delta(*given[first:later]))
    ranked = sorted(groups(given, window))
    lowest_tenth = ranked[: max(1, len(ranked) // 10)]
    assert confidence.measure("mean") == pytest.approx(sum(given) / len(given), abs=1e-8)
    assert confidence.measure("tail") == pytest.approx(sum(given[-window:]) / len(given[-window:]), abs=1e-8)
    assert confidence.measure("lowest") == pytest.approx(ranked[0], abs=1e-8)
    assert confidence.measure("bottom") == pytest.approx(sum(lowest_tenth) / len(lowest_tenth), abs=1e-8)


@given(tokens, st.integers(1, 20), st.floats(0, 50))
def test_a_trace_falls_at_the_first_full_group_below_the_floor(given: list[float], window: int, floor: float) -> None:
    confidence = Confidence(window, floor)
    at = next((i for i, token in enumerate(given) if confidence.watch(delta(token))), None)
    means = groups(given, window) if len(given) >= window else []
    if any(abs(mean - floor) < 1e-6 for mean in means):
        return  # too close to call
    expected = next((i for i, mean in enumerate(means) if mean < floor), None)
    assert at == (None if expected is None else expected + window - 1)
    assert confidence.fell == (at is not None)


def test_the_bottom_is_a_tenth_of_the_groups() -> None:
    confidence = Confidence(1)
    confidence.watch(delta(*(float(7 * i % 41) for i in range(1, 41))))  # 1 to 40 in some order
    assert confidence.measure("bottom") == pytest.approx((1 + 2 + 3 + 4) / 4)


def test_sliding_sums_do_not_drift() -> None:
    """Equal tokens: no group is lower than another, after however many."""
    confidence = Confidence(7, floor=0.1)
    assert not any(confidence.watch(delta(*[0.1 + 1e-9] * 1000)) for _ in range(20))
    assert confidence.measure("lowest") == confidence.measure("tail") == confidence.measure("bottom")


def test_odd_alternatives_are_defined() -> None:
    confidence = Confidence(4)
    assert [confidence.measure(which) for which in ("mean", "tail", "lowest", "bottom")] == [0.0] * 4
    confidence.watch(Delta(count=2, top=[{}, {5: -2.0}]))  # a token without alternatives says nothing
    assert (len(confidence), confidence.measure("mean")) == (1, 2.0)
    confidence.watch(Delta(count=1, top=[{1: 0.0, 2: -math.inf}]))
    assert 1e5 < confidence.measure("mean") < math.inf


def test_no_alternatives_are_kept() -> None:
    class Counted(dict[int, float]):
        alive = 0

        def __init__(self, values: Mapping[int, float]) -> None:
            super().__init__(values)
            Counted.alive += 1

        def __del__(self) -> None:
            Counted.alive -= 1

    confidence = Confidence(16)
    for _ in range(50):
        confidence.watch(Delta(count=1, top=[Counted({0: -1.0, 1: -3.0})]))
    assert (Counted.alive, len(confidence)) == (0, 50)


def test_a_quantile_is_numpys_percentile() -> None:
    numpy = pytest.importorskip("numpy")
    for values in ([3.0], [1.0, 2.0], [5.0, 1.0, 4.0, 4.0, 9.5], [0.1] * 7):
        for share in (0.0, 0.1, 0.25, 0.9, 1.0):
            assert quantile(values, share) == pytest.approx(float(numpy.percentile(values, 100 * share)))


# -- all samples to their end ------------------------------------------------------------------------------------------

FOUR = says(([2, 2, 2, 2], "a"), ([9, 9, 9, 9], "b"), ([4, 4, 1, 1], "a"), ([3, 3, 3, 8], "a"))


@pytest.mark.parametrize(
    ("measure", "keep", "weights", "answer"),
    [
        # Tokens: four as said, then 1, 1, 1 of the answer. Groups of 4, so that the lowest ends at the last token of
        # all but the third, which has (4 + 1 + 1 + 1) / 4 and then 1.
        ("lowest", 1, [1.25, 3.0, 1.0, 2.75], "a"),
        ("lowest", 0.5, [0, 3.0, 0, 2.75], "b"),
        ("lowest", 0.1, [0, 3.0, 0, 0], "b"),
        ("tail", 1, [1.25, 3.0, 1.0, 2.75], "a"),
        ("mean", 1, [11 / 7, 39 / 7, 13 / 7, 20 / 7], "a"),
        ("mean", 0.75, [0, 39 / 7, 13 / 7, 20 / 7], "b"),
        ("bottom", 1, [1.25, 3.0, 1.0, 2.75], "a"),
    ],
)
def test_the_most_confident_vote_with_their_confidence(
    measure: str, keep: float, weights: list[float], answer: str
) -> None:
    engine = Sure(FOUR)
    outcome = run(f"confidence_vote(samples=4, window=4, measure='{measure}', keep={keep}, top=5)", engine=engine)
    assert [weight for _, weight in votes(outcome)] == pytest.approx(weights)
    assert outcome.answer == answer
    assert engine.asked == {5}
    assert (outcome.usage.sampled_tokens, outcome.usage.critical_path_tokens) == (28, 7)


def test_those_without_an_answer_neither_vote_nor_take_a_place() -> None:
    script = says(([2, 2], "a"), ([9, 9], "none"), ([4, 4], "b"))
    outcome = run("confidence_vote(samples=3, keep=0.1, window=2, measure='mean')", engine=Sure(script))
    assert votes(outcome) == [("a", 0), (None, 0), ("b", pytest.approx(11 / 5))]
    script = says(([5, 5], "a"), ([9, 9], "none"), ([4, 4], "b"), ([9, 9], "none"))
    outcome = run("confidence_vote(samples=4, keep=0.5, window=2, measure='mean')", engine=Sure(script))
    assert votes(outcome) == [
        ("a", pytest.approx(13 / 5)),
        (None, 0),
        ("b", 0),
        (None, 0),
    ]  # one of two
    none = run("confidence_vote(samples=3)", engine=Sure(says(([2], "none"))))
    assert (none.answer, len(none.candidates)) == (None, 3)


# -- stopping ----------------------------------------------------------------------------------------------------------

ONLINE = says(
    ([6, 6, 6], "a"), ([4, 4, 4], "b"), ([5, 5, 2], "a"), ([8, 8, 8], "b"),  # warmup: lowest groups 1, see below
    ([2, 2, 2, 2, 2, 2], "c"), ([9, 9, 9], "a"), ([7, 7, 7], "a"), ([7, 1, 1, 7, 7, 7], "c"),
)  # fmt: skip


def test_later_samples_are_stopped_when_a_group_falls_below_the_threshold() -> None:
    """Groups of 4 of the first four (with 1, 1, 1 at the end): 2.25, 1.75, 1.25 and 2.75. Of these keep=0.5 leaves
    those from the middle, 2.0, on: the first and the fourth. The fifth sample ends at its fifth token: 2, 2, 2, 2 does
    not fall below 2 by more than rounding, and then does not either; its answer's first token does it. The eighth has
    7 + 1 + 1 + 7 = 16 and goes on; 1 + 1 + 7 + 7 the same; its end 7 + 1 + 1 + 1 = 10 is no fall."""
    outcome = run("confidence_vote(samples=8, warmup=4, batch=2, window=4, keep=0.5)", engine=Sure(ONLINE))
    assert [w for _, w in votes(outcome)] == pytest.approx([2.25, 0, 0, 2.75, 0, 3.0, 2.5, 2.5])
    assert charged(outcome) == [6, 6, 6, 6, 7, 6, 6, 9]
    assert [candidate.finish_reason for candidate in outcome.candidates].index("cancelled") == 4
    assert outcome.answer == "a"  # 2.25 + 3 + 2.5
    assert outcome.usage.critical_path_tokens == 6 + 7 + 9  # warmup, then two batches of two


def test_what_rounding_sets_apart_is_equal() -> None:
    """The same tokens in another batch come out with other last bits: here 3.00001 against 3."""
    script = says(*[([3.00001] * 4, answer) for answer in "aabb"], ([3.0] * 4, "b"), ([2.9] * 4, "c"))
    outcome = run("confidence_vote(samples=6, warmup=4, window=4)", engine=Sure(script))
    assert [weight > 0 for _, weight in votes(outcome)] == [True] * 5 + [False]


def test_sampling_ends_when_the_answers_agree() -> None:
    agree = says(([6, 6, 6], "a"))
    outcome = run("confidence_vote(samples=64, warmup=4, batch=3, window=4)", engine=Sure(agree))
    assert len(outcome.candidates) == 4
    # One vote of weight 1, all others 1.75: the share of the others is above 0.95 from eleven on, in the third batch.
    mixed = says(([1, 1, 1], "b"), *[([4, 4, 4], "a")] * 63)
    outcome = run("confidence_vote(samples=64, warmup=4, batch=3, window=4, keep=0.9)", engine=Sure(mixed))
    assert len(outcome.candidates) == 4 + 3 * 3
    never = run("confidence_vote(samples=9, warmup=4, batch=3, window=4, consensus=1)", engine=Sure(mixed))
    assert len(never.candidates) == 9


def test_a_budget_that_ends_yields_the_best_so_far() -> None:
    spec = "confidence_vote(samples=8, warmup=4, batch=2, window=4, keep=0.5)"
    outcome = run(spec, engine=Sure(ONLINE), budget="requests=5")
    assert (outcome.stopped_by, outcome.answer) == ("requests", "b")  # 1.75 + 2.75 against 2.25 + 1.25
    assert sorted(c.weight for c in outcome.candidates) == pytest.approx([0, 1.25, 1.75, 2.25, 2.75])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("confidence_vote(drafts=spawn_join)", "drafts=sample.*not spawn_join"),
        ("confidence_vote(batch=4)", "say warmup="),
        ("confidence_vote(consensus=0.9)", "say warmup="),
        ("confidence_vote(samples=16, warmup=16)", "leaves none"),
        ("confidence_vote(keep=0)", "keep"),
        ("confidence_vote(top=1)", "top"),
        ("confidence_vote(measure='middle')", "measure"),
    ],
)
def test_nonsense_is_refused(spec: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        parse_strategy(spec)


def test_an_engine_without_alternatives_is_refused() -> None:
    with pytest.raises(CapabilityError, match="needs top_logprobs"):
        run("confidence_vote", engine=ScriptedEngine(FOUR))


# -- the laws, and a real model ----------------------------------------------------------------------------------------

SPECS = ["confidence_vote(samples=4, window=4, keep=0.5)",
         "confidence_vote(samples=8, window=4, keep=0.5, warmup=4, batch=2, consensus=1)"]  # fmt: skip


@pytest.mark.parametrize("spec", SPECS)
def test_the_laws(spec: str) -> None:
    laws_on(Sure(ONLINE), spec)
    laws_on_the_embedded_model(spec.replace("window=4", "window=16"), max_tokens=60, temperature=1.5)


@strategy
async def watched(thread: Thread, samples: int) -> Outcome:
    """The confidences of all tokens of whole samples, in the place of answers."""

    async def draw(branch: Thread) -> Candidate:
        seen: list[float] = []

        def note(delta: Delta) -> bool:
            seen.extend(-sum(top.values()) / len(top) for top in delta.top)
            return False

        grown = await branch.generate(watch=note, top_logprobs=20)
        return Candidate(text=grown.text, answer=json.dumps(seen))

    candidates = await thread.fork(samples).map(draw)
    return Outcome(candidates=candidates)


def test_the_embedded_model_is_stopped_where_its_confidence_falls() -> None:
    """Against the same samples drawn whole: the same fork paths and seed give the same tokens."""
    settings = {"prompt": PROMPT, "temperature": 2.0, "seed": 3, "max_tokens": 400}
    whole = run(watched(samples=12), engine=open_engine("demo"), **settings).candidates
    spec = "confidence_vote(samples=12, warmup=6, batch=6, window=16, keep=0.5, consensus=1)"
    candidates = run(spec, engine=open_engine("demo"), **settings).candidates
    seen = [json.loads(candidate.answer or "") for candidate in whole]
    floor = quantile([min(groups(confidences, 16)) for confidences in seen[:6]], 0.5)
    late = []
    for index, (candidate, full, confidences) in enumerate(zip(candidates, whole, seen, strict=True)):
        means = groups(confidences, 16) if len(confidences) >= 16 else []
        falls = next((i + 16 for i, mean in enumerate(means) if mean < floor - 1e-3), None)
        if falls is None or index < 6:
            assert candidate.text == full.text
            continue
        assert candidate.weight == 0
        assert full.text.startswith(candidate.text)
        late.append(candidate.tokens - falls)
    assert len(late) >= 3
    assert 0 <= min(late) <= 2  # whoever is told at once stops at once; a busy machine may lag
    assert max(late) <= 16
