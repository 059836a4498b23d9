"""Specs: three forms of one thing, round trips, and one clear line for what is wrong."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestra import FirstFinish, Sample, SelfConsistency, Strategy, Thread, parse_budget, parse_strategy, strategy
from orchestra.errors import SpecError, UsageError
from orchestra.strategies import registry

samples = st.builds(
    Sample,
    temperature=st.none() | st.floats(0, 5),
    max_tokens=st.none() | st.integers(1, 10_000),
    stop=st.lists(st.text(max_size=5), max_size=2),
)
nested = st.recursive(
    samples,
    lambda inner: (
        st.builds(SelfConsistency, samples=st.integers(1, 64), drafts=inner)
        | st.builds(FirstFinish, samples=st.integers(3, 64), first=st.integers(1, 3), drafts=inner)
    ),
    max_leaves=4,
)


@given(nested)
def test_the_three_forms_name_the_same_strategy(chosen: Strategy) -> None:
    assert parse_strategy(chosen.to_spec()) == chosen
    assert parse_strategy(chosen.to_dict()) == chosen
    assert parse_strategy(chosen) is chosen


def test_every_registered_strategy_can_be_named_bare_and_states_what_it_is() -> None:
    for name, kind in registry().items():
        if kind.__module__.startswith("orchestra.strategies."):
            assert parse_strategy(name) == kind()
            assert kind.__doc__


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("fist_finish", "did you mean 'first_finish'"),
        ("sample(temp=1)", r"unknown parameter 'temp'.*temperature"),
        ("first_finish(samples=0)", "samples = 0: .*greater than or equal to 1"),
        ("first_finish(samples=1000000000)", "less than or equal to 4096"),
        ("first_finish(samples=2, first=3)", "first=3 of samples=2"),
        ("first_finish(8)", "given by name"),
        ("sample(temperature=1, temperature=2)", "does not parse|given twice"),
        ("sample(**{})", "not allowed"),
        ("self_consistency(drafts=nothing)", "unknown strategy 'nothing'"),
        ("__import__('os').system('true')", "names, numbers"),
        ("sample(temperature=1+1)", "names, numbers"),
        ("lambda: 1", "names, numbers"),
        ("sample(", "does not parse"),
        ("", "does not parse"),
        ("[1, 2]", "a strategy spec is like"),
        ("(" * 4000, "does not parse"),
        ("-" * 9000 + "1", "names, numbers|does not parse"),
        ("x" * 20_000, "at most"),
        ({"samples": 3}, "a strategy spec is like"),
        (7, "a strategy spec is like"),
    ],
)
def test_bad_specs(spec: object, message: str) -> None:
    with pytest.raises(SpecError, match=message) as caught:
        parse_strategy(spec)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


@given(st.text(max_size=60))
def test_any_text_parses_or_is_a_spec_error(text: str) -> None:
    with contextlib.suppress(SpecError):
        assert isinstance(parse_strategy(text), Strategy)


def test_budgets() -> None:
    assert parse_budget("sampled_tokens=10, wall_seconds=1.5").wall_seconds == 1.5
    for bad in ("tokens=1", "sampled_tokens=0", "wall_seconds=-1", "10", "sampled_tokens=x"):
        with pytest.raises(SpecError):
            parse_budget(bad)


def test_a_users_own_strategy() -> None:
    @strategy
    async def two_views(thread: Thread, sides: int = 2, note: str = "") -> Thread:
        """Looks twice."""
        return await thread.fork(sides)[0].generate()

    assert parse_strategy("two_views(sides=3)") == two_views(sides=3)
    assert two_views.__doc__ == "Looks twice."
    assert parse_strategy("self_consistency(drafts=two_views(note='a, b'))").to_spec().count("two_views") == 1
    with pytest.raises(SpecError, match="valid integer"):
        parse_strategy("two_views(sides=many)")
    with pytest.raises(UsageError, match="built-in strategy 'sample'"):

        @strategy
        async def sample(thread: Thread) -> Thread:
            return thread

    with pytest.raises(UsageError, match="coroutine function"):
        strategy(lambda thread: thread)  # type: ignore[arg-type,return-value]
    assert parse_strategy("sample") == Sample()
