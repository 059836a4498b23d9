"""The evaluation loop: every sample once, in any order, whatever fails."""

from __future__ import annotations

import asyncio
import io
import random
from collections.abc import Callable
from typing import Any

import pytest
from rich.console import Console

from orchestra.errors import EngineError, PromptError, UsageError
from orchestra.evaluation.report import table
from orchestra.evaluation.runner import evaluate, sample_seed
from orchestra.evaluation.store import Plan, Record
from orchestra.evaluation.summary import Summary, summarise
from orchestra.evaluation.tasks import Item, Task, TaskFile, load_task
from orchestra.outcome import Outcome, Usage

FILE = TaskFile(name="parity", description="", levels=["any"], splits=["test"], items=20)


def parity() -> Task:
    """Is the number even? The fake engine's text says `yes` or `no`."""
    return Task(
        FILE,
        {},
        make=lambda count: [Item(f"n{i}", f"is {i} even", {"answer": "no" if i % 2 else "yes"}) for i in range(count)],
        extract=lambda text: text or None,
        grade=lambda item, answer: None if answer == "?" else answer == item.reference["answer"],
    )


class FakeConnection:
    """Answers from the seed and the prompt alone, after a random delay; counts what runs at a time."""

    def __init__(self, answer: Callable[[str, random.Random], str], delays: int = 0) -> None:
        self.answer = answer
        self.delays = random.Random(delays)
        self.running = self.most = 0
        self.seeds: list[int] = []

    async def run(self, strategy: Any, prompt: str, *, seed: int, extract: Any, **settings: Any) -> Outcome:
        self.running += 1
        self.most = max(self.most, self.running)
        self.seeds.append(seed)
        try:
            await asyncio.sleep(self.delays.random() * 0.003)
            text = self.answer(prompt, random.Random(f"{seed}/{prompt}"))
        finally:
            self.running -= 1
        tokens = 10 + seed % 100
        return Outcome(text=text, answer=extract(text), usage=Usage(sampled_tokens=tokens, critical_path_tokens=tokens))


def coin(prompt: str, rng: random.Random) -> str:
    return rng.choice(["yes", "no"])


def plan(**values: Any) -> Plan:
    return Plan(**({"task": "parity", "strategy": "sample", "limit": 20} | values))


def run(connection: FakeConnection, asked: Plan, **settings: Any) -> list[Record]:
    records: list[Record] = []
    asyncio.run(evaluate(connection, parity(), asked, records.append, **settings))  # type: ignore[arg-type]
    return records


def by_key(records: list[Record]) -> dict[tuple[str, int], Record]:
    assert len({r.key for r in records}) == len(records)
    return {r.key: r for r in records}


def test_every_sample_once_with_bounded_concurrency() -> None:
    connection = FakeConnection(coin)
    records = run(connection, plan(repeats=3), concurrency=7)
    assert set(by_key(records)) == {(f"n{i}", k) for i in range(20) for k in range(3)}
    assert connection.most == 7
    assert len(set(connection.seeds)) == 60


def test_order_and_concurrency_do_not_change_a_sample() -> None:
    runs = [by_key(run(FakeConnection(coin, d), plan(repeats=2), concurrency=c)) for d, c in ((1, 1), (2, 5), (3, 64))]
    assert runs[0] == runs[1] == runs[2]
    summaries = [summarise(plan(repeats=2), r.values()) for r in runs]
    assert summaries[0] == summaries[1] == summaries[2]
    assert by_key(run(FakeConnection(coin), plan(repeats=2, seed=1))) != runs[0]


def test_goes_on_with_what_is_missing() -> None:
    whole = by_key(run(FakeConnection(coin), plan(repeats=2)))
    stored = dict(list(whole.items())[:13])
    rest = run(FakeConnection(coin), plan(repeats=2), skip=stored)
    assert len(rest) == 27
    assert stored | by_key(rest) == whole


def test_a_failing_engine_is_a_failed_sample_not_a_wrong_one() -> None:
    def broken(prompt: str, rng: random.Random) -> str:
        if "is 3 " in prompt or "is 4 " in prompt:
            raise EngineError("connection\nlost")
        return "yes"

    summary = summarise(plan(), records := run(FakeConnection(broken), plan()))
    assert {r.id: r.error for r in records if r.failed} == {"n3": "connection lost", "n4": "connection lost"}
    assert summary.failed == 2
    assert summary.accuracy == 9 / 18
    assert summary.items == 20


@pytest.mark.parametrize(
    ("finish_reason", "stopped_by", "expected"),
    [
        ("stop", None, "stop"),
        ("stop", "requests", "stop"),  # whole, though others were cut off
        ("length", None, "length"),
        ("cancelled", None, "length"),
        (None, "wall_seconds", "length"),
        (None, None, "stop"),
    ],
)
def test_a_record_says_whose_it_is_and_whether_it_is_whole(
    finish_reason: str | None, stopped_by: str | None, expected: str
) -> None:
    asked: list[tuple[str, int]] = []

    class Ending(FakeConnection):
        async def run(self, *args: Any, item: str, repeat: int, **settings: Any) -> Outcome:
            asked.append((item, repeat))
            outcome = await super().run(*args, **settings)
            return outcome.model_copy(update={"finish_reason": finish_reason, "stopped_by": stopped_by})

    records = run(Ending(coin), plan(limit=2, repeats=2))
    assert sorted(asked) == [("parity/n0", 0), ("parity/n0", 1), ("parity/n1", 0), ("parity/n1", 1)]
    for record in records:
        assert (record.task, record.finish_reason, record.stopped_by) == ("parity", expected, stopped_by)
        assert record.sampled_tokens == record.usage.sampled_tokens > 0


def test_what_cannot_be_graded_is_not_wrong() -> None:
    summary = summarise(plan(), run(FakeConnection(lambda p, _: "?" if "is 2 " in p else "yes"), plan()))
    assert summary.ungraded == 1
    assert summary.failed == 0
    assert summary.accuracy == 9 / 19


def test_a_prompt_that_cannot_be_taken_ends_it_at_once() -> None:
    def refuses(prompt: str, rng: random.Random) -> str:
        if "is 5 " in prompt:
            raise PromptError("too long")
        return "yes"

    connection = FakeConnection(refuses)
    records: list[Record] = []
    with pytest.raises(PromptError, match="too long"):
        asyncio.run(evaluate(connection, parity(), plan(repeats=50), records.append, concurrency=4))  # type: ignore[arg-type]
    assert len(records) < 50
    assert connection.running == 0


def test_a_record_that_cannot_be_stored_ends_it_at_once() -> None:
    def full(record: Record) -> None:
        raise UsageError("full")

    connection = FakeConnection(coin)
    with pytest.raises(UsageError, match="full"):
        asyncio.run(evaluate(connection, parity(), plan(), full))  # type: ignore[arg-type]
    assert connection.running == 0


@pytest.mark.parametrize(("values", "concurrency"), [({"repeats": 0}, 1), ({}, 0)])
def test_nothing_to_do_is_refused(values: dict[str, int], concurrency: int) -> None:
    with pytest.raises(UsageError, match="at least 1"):
        run(FakeConnection(coin), plan(**values), concurrency=concurrency)


def test_seeds_are_the_same_for_ever() -> None:
    # Recorded once: a change would make every stored run impossible to go on with.
    assert sample_seed(0, "small-3-7-8-12-54", 0) == 45292862030219
    assert len({sample_seed(s, i, r) for s in range(9) for i in "abcde" for r in range(9)}) == 405


def test_summary_of_known_samples() -> None:
    def one(item: str, repeat: int, answer: str | None, correct: bool, path: int) -> Record:
        usage = Usage(
            sampled_tokens=2 * path,
            critical_path_tokens=path,
            sequential_tokens=path + 40,
            requests=2,
            wall_seconds=1.0,
        )
        return Record(id=item, repeat=repeat, seed=0, answer=answer, correct=correct, usage=usage)

    records = [
        one("a", 0, "5", True, 50),
        one("a", 1, "5", True, 70),
        one("a", 2, "9", False, 90),
        one("a", 3, None, False, 400),
        one("b", 0, "1", False, 100),
        one("b", 1, "1", False, 100),
        one("b", 2, "2", True, 100),
        one("b", 3, "1", False, 100),
    ]
    summary = summarise(plan(repeats=4, limit=2), records)
    assert summary.accuracy == 3 / 8
    assert summary.stderr == pytest.approx(((1 / 2) ** 2 * 2 * 2 / 1) ** 0.5 / 8)
    assert summary.maj_at_k == {4: 0.5}
    assert summary.pass_at_k == {1: 3 / 8, 2: pytest.approx((1 - 1 / 6 + 0.5) / 2), 4: 1.0}
    assert summary.critical_path_tokens == 1010 / 8
    assert summary.sampled_tokens == 2020 / 8
    assert summary.accuracy_within[64] == 1 / 8
    assert summary.accuracy_within[96] == 2 / 8
    assert summary.accuracy_within[128] == 3 / 8
    assert max(summary.accuracy_within) == 512
    # With the 40 tokens of input they take 90, 110, ... 440: one more window for all.
    assert [summary.accuracy_within_sequential[size] for size in (64, 96, 128, 192)] == [0, 1 / 8, 2 / 8, 3 / 8]
    assert max(summary.accuracy_within_sequential) == 512
    assert summary.sequential_tokens == 1010 / 8 + 40
    assert summary.requests == 2


def test_summary_of_nothing_is_valid_json() -> None:
    summary = summarise(plan(), [Record(id="a", repeat=0, seed=0, error="gone")])
    assert summary.accuracy is None
    assert "NaN" not in summary.model_dump_json()


def test_countdown_is_bound_to_its_code() -> None:
    task = load_task("countdown", level="small", split="test")
    items = task.items(20)
    assert items[:5] == task.items(5)
    assert items != load_task("countdown", level="small", split="dev").items(20)
    assert len({item.id for item in items}) == 20
    from orchestra.evaluation.countdown import solve

    for item in items:
        steps = solve(item.reference["numbers"], item.reference["target"])
        assert steps is not None
        text = f"thinking\n answer: {' , '.join(map(str, steps))}\n"
        assert task.grade(item, task.extract(text)) is True
        assert task.grade(item, task.extract("answer: none")) is False
        assert task.grade(item, "1 + 1 = 2") is False


def test_unknown_task_level_and_split() -> None:
    with pytest.raises(UsageError, match="unknown task 'countdwn'; did you mean 'countdown'"):
        load_task("countdwn")
    with pytest.raises(UsageError, match="unknown level 'huge'"):
        load_task("countdown", level="huge")
    with pytest.raises(UsageError, match="unknown split 'train'"):
        load_task("countdown", split="train")
    with pytest.raises(UsageError, match="unknown task"):
        load_task("../countdown")


def test_table_says_all_in_eighty_columns() -> None:
    one = summarise(plan(repeats=2), run(FakeConnection(coin), plan(repeats=2)))
    wide = {"strategy": "self_consistency(samples=8)", "critical_path_tokens_p95": 2048, "sampled_tokens": 12345}
    other = one.model_copy(update=wide | {"parameters": {"level": "hard"}, "failed": 3, "ungraded": 1})
    budget = one.model_copy(update={"budget": "critical_path_tokens=384,requests=9"})
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(table([one, budget, other]))
    text = console.export_text()
    for word in ("20 items × 2", "hard · 20 items × 2", "self_consistency(samples=8)", "critical_path_tokens ≤ 384"):
        assert word in text
    for word in ("maj@2", "pass@2", "±", "12,345", "2,048", "seconds", "3 failed", "1 ungraded"):
        assert word in text
    assert "…" not in text


def test_table_shows_both_budgets_where_input_is_read_again() -> None:
    def one(strategy: str, sequential: int, total: int, requests: int) -> Summary:
        tokens = {"sampled_tokens": 60_000 * requests, "critical_path_tokens": 96_000, "requests": requests}
        tokens |= {"sequential_tokens": 96_000 + sequential, "total_tokens": 60_000 * requests + total}
        usage = Usage.model_validate(tokens)
        records = [Record(id=f"n{i}", repeat=0, seed=0, answer="5", correct=i < 7, usage=usage) for i in range(9)]
        return summarise(plan(strategy=strategy), records)

    def shown(*summaries: Summary) -> str:
        console = Console(width=80, record=True, file=io.StringIO())
        console.print(table(summaries))
        return console.export_text()

    plain = one("self_consistency(samples=29)", 300, 29 * 300, 29)
    pdr = one("pdr(widths=[16,8,4], distiller='per_sample_top_k', k=2)", 76_000, 442_000, 57)
    text = shown(plain)
    assert "B_seq" not in text
    text = shown(plain, pdr)
    for word in ("B_seq", "B_total", "172,000", "3,862,000", "96,300", "1,748,700", "±"):
        assert word in text
    assert "…" not in text
    # Two calls in a row and nothing else: the least that is a chain.
    assert "B_seq" in shown(one("refine(rounds=1)", 700, 700, 2))
