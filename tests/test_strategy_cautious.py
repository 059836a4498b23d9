"""Cautious decoding: its rule by hand, its choice on a real model against dense forwards, its laws."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import pytest
import torch
from engines import opened

import orchestra
from orchestra import Outcome
from orchestra.errors import SpecError
from orchestra.runtime.engine import Engine
from orchestra.strategies.cautious import Cautious, entropy
from orchestra.testing import check_parity, check_strategy
from orchestra.testing.scripted import ScriptedEngine


async def ask(engine: Engine, spec: Any, prompt: str, **settings: Any) -> Outcome:
    async with orchestra.connect(engine) as connection:
        return await connection.run(spec, prompt, **settings)


def run(engine: Engine, spec: Any, prompt: str = "go", **settings: Any) -> Outcome:
    return asyncio.run(asyncio.wait_for(ask(engine, spec, prompt, **settings), 30))


@pytest.mark.parametrize(
    ("value", "count"),
    [
        (0.0, 1),
        (0.01, 1),
        (0.157, 1),
        (0.30, 1),
        (0.31, 2),
        (0.75, 4),
        (0.76, 5),
        (1.34, 8),
        (1.36, 9),
        (1.5, 10),
        (9, 10),
    ],
)
def test_trials_grow_with_the_entropy(value: float, count: int) -> None:
    """(H - 0.01) / 1.49 * 10, rounded down, from 1 to 10."""
    assert Cautious().trials_at(value) == count


def test_other_bounds_and_numbers() -> None:
    assert [Cautious(trials=4, min_entropy=1, max_entropy=3).trials_at(h) for h in (0.5, 1.9, 2.0, 2.6, 3, 7)] == [
        1,
        1,
        2,
        3,
        4,
        4,
    ]
    with pytest.raises(SpecError, match="min_entropy=2 is not below max_entropy"):
        run(ScriptedEngine(top=lambda *_: {" $": 0.0}), "cautious(min_entropy=2)")


def test_the_tail_counts_as_one_outcome() -> None:
    assert entropy([0.0]) == 0
    assert entropy([math.log(0.25)] * 4) == pytest.approx(math.log(4))
    half = [math.log(0.5)]
    assert entropy(half) == pytest.approx(math.log(2))
    true = -0.5 * math.log(0.5) - 4 * 0.125 * math.log(0.125)
    assert entropy(half) <= true <= entropy(half) + 0.5 * math.log(4)


# -- the choice, on a script -------------------------------------------------------------------------------------------


def played(chances: dict[str, float], says: list[str], after: dict[str, float]) -> ScriptedEngine:
    """The first word has `chances`; fork k says text k; `after` has the log-probabilities of all other words."""

    def top(context: str, position: int) -> dict[str, float]:
        if position == 1:
            return {word: math.log(chance) for word, chance in chances.items()}
        return {" end": -0.001} if "." in context else after

    return ScriptedEngine(lambda context, path: " end $" if "." in context else says[path[0] % len(says)], top=top)


SURE = {" x.": -0.1, " y.": -0.5, " z.": -0.3, " end": -0.1}


@pytest.mark.parametrize(
    ("trials", "requests", "text"),
    [(2, 2, " b y. end"), (4, 3, " c z. end"), (5, 4, " a x. end"), (20, 15, " a x. end")],
)
def test_the_least_perplexed_of_as_many_trials_as_the_entropy_asks_for_is_kept(
    trials: int, requests: int, text: str
) -> None:
    """H = log 3: floor(1.0886 / 1.49 * trials) of them, which say in turn b y, c z and a x.

    After the first word, as likely in each, y has log-probability -.5, z -.3 and x -.1.
    """
    engine = played(dict.fromkeys((" a", " b", " c"), 1 / 3), [" b y.", " c z.", " a x."], SURE)
    outcome = run(engine, f"cautious(trials={trials})")
    assert outcome.text == text
    assert outcome.usage.requests == requests, "and one for the end, of which the model is sure"
    assert outcome.usage.critical_path_tokens == (4 if requests == 2 else 6), "the first trial comes before the others"


def test_where_the_model_is_sure_one_trial_is_enough() -> None:
    engine = played({" a": 0.999, " b": 0.001}, [" b y."], SURE)
    assert run(engine, "cautious").usage.requests == 2


def test_a_stop_of_the_run_ends_the_text() -> None:
    engine = played({" a": 1.0}, [" a x."], SURE)
    outcome = run(engine, "cautious", stop=".")
    assert (outcome.text, outcome.finish_reason, outcome.usage.requests) == (" a x.", "stop", 1)


def test_what_a_budget_leaves_is_the_text_so_far() -> None:
    engine = played(dict.fromkeys((" a", " b", " c"), 1 / 3), [" b y.", " c z.", " a x."], SURE)
    for most, text in ((1, " b"), (3, " b y."), (7, " a x. end")):
        outcome = run(engine, "cautious(trials=5)", budget=f"sampled_tokens={most}")
        assert (outcome.text, outcome.stopped_by) == (text, "sampled_tokens")


# -- on real models ----------------------------------------------------------------------------------------------------


def test_every_choice_is_the_one_that_dense_forwards_make(tiny: str) -> None:
    """Of each stretch: the entropy of all the model could say, the number of trials, and which of them goes on."""
    marks = [chr(code) for code in range(33, 127) if code % 4]
    strategy = Cautious(trials=4, max_entropy=4.0, top=400, punctuation=marks, max_tokens=40)

    async def main() -> None:
        async with opened(tiny) as engine:
            outcome = await ask(engine, strategy, "the answer is", temperature=1.5, ignore_eos=True)
            model, graph = engine.plain_model(), outcome.graph
            await check_parity(engine, graph)
            stretches: dict[tuple[Any, ...], list[Any]] = {}
            for node in graph.nodes:
                if node.count("sampled"):
                    stretches.setdefault(tuple(node.context), []).append(node)
            assert len(stretches) > 3
            counts = set()
            for (edge,), trials in stretches.items():
                before = graph.path_tokens(edge.parent, edge.length)
                with torch.no_grad():
                    rows = [
                        model(torch.tensor([[*before, *t.tokens]])).logits[0].double().log_softmax(-1) for t in trials
                    ]
                first = rows[0][len(before) - 1]
                assert len(trials) == strategy.trials_at(-float((first.exp() * first).sum()))
                counts.add(len(trials))
                perplexities = [
                    -float(row[range(len(before) - 1, len(row) - 1), t.tokens].mean())
                    for row, t in zip(rows, trials, strict=True)
                ]
                best = trials[perplexities.index(min(perplexities))]
                going_on = [key for key in stretches if key[0].parent in {t.id for t in trials}]
                assert [key[0].parent for key in going_on] in ([best.id], [])
            assert len(counts) > 1
            assert outcome.thread is not None
            (end,) = await outcome.thread._stem.edges()
            said = graph.path_tokens(*end)[len(graph.nodes[0]) :]
            assert len(said) <= 40
            whole = await outcome.thread.decode(said)
            assert outcome.text.replace("\ufffd", "") == whole.replace("\ufffd", "")

    asyncio.run(asyncio.wait_for(main(), 100))


SPEC = "cautious(trials=3, max_entropy=3, punctuation=['e', 'a', ' '], max_tokens=16)"


def test_the_laws_hold() -> None:
    engine = played(dict.fromkeys((" a", " b", " c"), 1 / 3), [" b y.", " c z.", " a x."], SURE)
    asyncio.run(asyncio.wait_for(check_strategy(engine, "cautious(trials=5)", "go"), 60))


def test_the_laws_hold_on_a_real_model(tiny: str) -> None:
    async def main() -> None:
        async with opened(tiny) as engine:
            await check_strategy(engine, SPEC, "the answer is")

    asyncio.run(asyncio.wait_for(main(), 100))
