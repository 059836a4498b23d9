"""Which rows a step is trained on: a function of the seed and the step alone, in the shares that were asked for."""

from __future__ import annotations

from collections import Counter

import pytest

datasets = pytest.importorskip("datasets")

from orchestra.training.batches import RowBatches, Rows, Schedule, hold_out  # noqa: E402
from orchestra.training.flatten import Row  # noqa: E402


def rows_of(first: int, count: int, share: float | None = None) -> Rows:
    """Rows whose first token says which they are, and whose second whether they are plain."""
    columns = [Row.sequence([first + i, 0], [0, 1]).columns() for i in range(count)]
    plain = [Row.sequence([first + i, 1], [0, 1]).columns() for i in range(count)]
    plain = [{f"plain.{name}": value for name, value in row.items()} for row in plain]
    return Rows(datasets.Dataset.from_list([one | other for one, other in zip(columns, plain, strict=True)]), share)


def drawn(batches: RowBatches, steps: int) -> list[int]:
    return [row.tokens[0] for step in range(steps) for row in batches.batch(step)]


def test_every_row_is_seen_once_an_epoch_in_an_order_of_its_own() -> None:
    batches = RowBatches([rows_of(0, 7), rows_of(100, 5)], 4, seed=3)
    assert batches.epoch == 12
    epochs = [drawn(batches, 9)[i : i + 12] for i in (0, 12, 24)]
    everything = sorted([*range(7), *range(100, 105)])
    assert all(sorted(epoch) == everything for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    again = RowBatches([rows_of(0, 7), rows_of(100, 5)], 4, seed=3)
    assert [row.tokens for row in again.batch(5)] == [row.tokens for row in batches.batch(5)]  # without what was before
    assert drawn(RowBatches([rows_of(0, 7), rows_of(100, 5)], 4, seed=4), 3) != epochs[0]


def test_without_shuffling_the_order_is_that_of_the_data() -> None:
    batches = RowBatches([rows_of(0, 3), rows_of(100, 2)], 2, seed=3, shuffle=False)
    assert drawn(batches, 5) == [0, 1, 2, 100, 101] * 2


def test_sources_have_their_shares_and_go_on_where_they_were() -> None:
    batches = RowBatches([rows_of(0, 4, 1.0), rows_of(100, 12, 3.0), rows_of(200, 4, 4.0)], 8, seed=1)
    counted = Counter(token // 100 for token in drawn(batches, 5 * batches.epoch // 8))
    total = sum(counted.values())
    assert [counted[i] / total for i in range(3)] == pytest.approx([1 / 8, 3 / 8, 4 / 8], abs=0.06)
    seen = Counter(token for token in drawn(batches, 4 * batches.epoch // 8) if 100 <= token < 200)
    assert max(seen.values()) - min(seen.values()) <= 1  # nothing of a source twice before all of it once


@pytest.mark.parametrize(("first", "last"), [(0.0, 1.0), (1.0, 0.0), (0.25, 0.25)])
def test_the_share_of_parallel_rows_goes_in_a_line(first: float, last: float) -> None:
    schedule = Schedule(first, last, steps=101)
    assert [schedule.share(step) for step in (0, 50, 100)] == pytest.approx([first, (first + last) / 2, last])
    batches = RowBatches([rows_of(0, 50)], 100, seed=5, schedule=schedule)
    parallel = [sum(not plain for _, _, plain in batches.choose(step)) / 100 for step in range(101)]
    assert sum(row.tokens[1] == 0 for row in batches.batch(50)) / 100 == parallel[50]
    for step, share in enumerate(parallel):
        expected = first + (last - first) * step / 100
        assert share == pytest.approx(expected, abs=4 * (expected * (1 - expected) / 100) ** 0.5 + 1e-9)


def test_what_is_held_out_is_not_trained_on() -> None:
    left, held = hold_out([rows_of(0, 20), rows_of(100, 10)], 6, seed=2)
    out = {row.tokens[0] for row in held}
    assert len(out) == 6
    assert {token // 100 for token in out} == {0, 1}
    assert [len(source) for source in left] == [16, 8]
    assert out | set(drawn(RowBatches(left, 4, seed=2), 6)) == {*range(20), *range(100, 110)}
    assert not out & set(drawn(RowBatches(left, 4, seed=2), 6))
    with pytest.raises(ValueError, match="leaves none to learn from"):
        hold_out([rows_of(0, 2)], 2, seed=2)
