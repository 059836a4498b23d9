"""The published APR text: a strategy that serves it makes, call by call, what the symbolic solver writes."""

from __future__ import annotations

import random

import pytest
from playing import play

from orchestra.protocols import apr_published
from orchestra.testing.scripted import EOS
from orchestra.training.apr_search import Trace, apr, check_solution, problems


def traces(count: int, rounds: int) -> list[Trace]:
    rng = random.Random(rounds)
    found = (apr(problem, rng) for problem in problems(rng))
    chosen = []
    for trace in found:
        if min(2, len(trace.children)) == rounds:
            chosen.append(trace)
            if len(chosen) == count:
                return chosen
    raise AssertionError


@pytest.mark.parametrize("rounds", [0, 1, 2])
def test_the_strategy_makes_the_calls_that_the_solver_demonstrates(rounds: int) -> None:
    for trace in traces(2, rounds):
        known = {call.prompt: call.completion for group in trace.children for call in group}
        mains = [call.prompt + call.completion for call in trace.main]
        contexts: list[str] = []

        def script(
            context: str,
            path: tuple[int, ...],
            known: dict[str, str] = known,
            mains: list[str] = mains,
            contexts: list[str] = contexts,
        ) -> str:
            contexts.append(context)
            if context in known:
                return f"{known[context]} {EOS}"
            (whole,) = [main for main in mains if main.startswith(context)][:1]
            return f"{whole[len(context) :]} {EOS}"

        outcome = play({"strategy": "spawn_join", "language": "published"}, script, trace.main[0].prompt)
        assert outcome.text.rstrip() == trace.main[-1].completion.rstrip()
        assert set(known) <= set(contexts)
        told = apr_published.solution(outcome.text) or ""
        assert check_solution(trace.main[0].prompt, told) == trace.solved


def test_blocks_that_ask_for_nothing_known_are_plain_text() -> None:
    said = "\n<Start Sub Search 0 at level 1> Moving to Node #0,9\n<End Calling Sub Searches>"

    def script(context: str, path: tuple[int, ...]) -> str:
        if "End Calling" in context:
            return f"\nNo solution found. {EOS}"
        return said if context.endswith("<Calling Sub Searches>") else f"\n<Calling Sub Searches>{said}"

    outcome = play(
        {"strategy": "spawn_join", "language": "published"}, script, "Current State: 5:[1, 4], Operations: []"
    )
    assert outcome.text.count("<Calling Sub Searches>") == 1
    assert outcome.text.endswith("No solution found.")
