"""Evaluation runs as training data: which samples, and of each the thread that gave the answer and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from orchestra.cli import main
from orchestra.errors import UsageError
from orchestra.evaluation.store import Record, read_records
from orchestra.evaluation.traces import TRACES, Trace, read_traces
from orchestra.graph import Edge, Span, ThreadGraph
from orchestra.training.flatten import Row, flatten
from orchestra.training.rejection import chosen, demonstrations


def span(origin: Any, *tokens: int) -> Span:
    return Span(
        origin, list(tokens), len(tokens), "x" * len(tokens), [-1.0] * len(tokens) if origin == "sampled" else []
    )


def learned(row: Row) -> list[int]:
    return [token for token, weight in zip(row.tokens, row.weights, strict=True) if weight]


def test_a_vote_teaches_the_sample_that_won() -> None:
    graph = ThreadGraph()
    root = graph.add(spans=[span("prompt", 1, 2)])
    for sample in ((3, 4), (5, 6)):
        node = graph.add([Edge(root.id, 2)], spans=[span("sampled", *sample)])
    row = flatten(chosen(graph, Edge(node.id, 2)))
    assert row.tokens == [1, 2, 5, 6]
    assert learned(row) == [5, 6]


def test_children_whose_results_were_written_down_are_learned_too() -> None:
    graph = ThreadGraph()
    parent = graph.add(spans=[span("prompt", 1), span("sampled", 2, 3)])
    child = graph.add(waits=[parent.id], spans=[span("prompt", 4), span("sampled", 5)])
    stranger = graph.add(waits=[parent.id], spans=[span("prompt", 4), span("sampled", 7)])
    judged = graph.add(waits=[child.id], spans=[span("prompt", 4), span("sampled", 9)], engine="judge")
    after = graph.add([Edge(parent.id, 3)], waits=[child.id, judged.id], spans=[span("forced", 5), span("sampled", 8)])
    row = flatten(chosen(graph, Edge(after.id, 2)))
    assert learned(row) == [2, 3, 5, 8]
    assert stranger.tokens[1] not in row.tokens
    assert judged.tokens[1] not in row.tokens


def test_drafts_that_were_only_shown_in_a_prompt_are_not_learned() -> None:
    graph = ThreadGraph()
    draft = graph.add(spans=[span("prompt", 1), span("sampled", 2)])
    final = graph.add(waits=[draft.id], spans=[span("prompt", 1, 2), span("sampled", 3)])
    assert flatten(chosen(graph, Edge(final.id, 3))).tokens == [1, 2, 3]


def test_what_a_thread_took_back_is_not_learned() -> None:
    graph = ThreadGraph()
    first = graph.add(spans=[span("prompt", 1), span("sampled", 2, 3, 99)])  # it ended, and was told to go on
    last = graph.add([Edge(first.id, 3)], spans=[span("forced", 7), span("sampled", 8, 99)])
    graph.check_integrity()
    kept = chosen(graph, Edge(last.id, 2))
    kept.check_integrity()
    assert learned(flatten(kept)) == [2, 3, 8, 99]


def test_a_graph_without_token_ids_gives_no_row() -> None:
    graph = ThreadGraph()
    node = graph.add(spans=[span("prompt", 1), Span("sampled", [], 3, "abc")])
    with pytest.raises(UsageError, match="does not tell token ids"):
        chosen(graph, Edge(node.id, 4))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("torch")
    out = tmp_path_factory.mktemp("runs") / "spawn"
    words = ["eval", "countdown", "--strategy", "spawn_join(children=2)", "--limit", "4", "--repeats", "3"]
    assert main([*words, "--temperature", "1", "--level", "hard", "--out", str(out), "--traces"]) == 0
    return out


def test_the_shortest_correct_samples_of_each_item_are_taken(run: Path) -> None:
    records = read_records(run)
    right = [record for record in records if record.correct]
    assert 0 < len(right) < len(records)
    for per_item in (1, 2):
        found = demonstrations(run, per_item=per_item)
        assert (found.samples, found.correct, found.unusable) == (len(records), len(right), {})
        for item in {record.id for record in right}:
            best = sorted(r.usage.critical_path_tokens for r in right if r.id == item)[:per_item]
            assert [one.usage.critical_path_tokens for one, _ in found.rows if one.id == item] == best
    cheapest = demonstrations(run, order="tokens").rows
    for record, _ in cheapest:
        assert record.usage.sampled_tokens == min(r.usage.sampled_tokens for r in right if r.id == record.id)
    longest = max(len(row) for _, row in demonstrations(run, per_item=3).rows)
    assert demonstrations(run, per_item=3, longest=longest - 1).unusable == {f"more than {longest - 1} tokens": 1}


def test_a_row_holds_all_that_was_sampled_for_the_answer(run: Path) -> None:
    traces = {trace.key: trace for trace in read_traces(run)}
    for record, row in demonstrations(run, per_item=3).rows:
        assert sum(weight != 0 for weight in row.weights) == record.usage.sampled_tokens
        assert len(traces[record.key].graph.nodes) >= len(row.views)


def test_a_torn_trace_is_passed_over(run: Path, tmp_path: Path) -> None:
    from orchestra.evaluation.traces import Traces
    from orchestra.outcome import Outcome

    whole = (run / TRACES).read_bytes()
    (tmp_path / TRACES).write_bytes(whole + whole[:100])
    before = list(read_traces(run))
    assert list(read_traces(tmp_path)) == before
    Traces(tmp_path).append(Record(id="new", repeat=0, seed=0), Outcome(graph=before[0].graph))
    assert list(read_traces(tmp_path)) == [*before, Trace(("new", 0), before[0].graph)]


def test_the_data_set_has_a_card_and_trains(run: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    pytest.importorskip("trl")
    from orchestra.training import sft
    from orchestra.training.rejection import make_from_run
    from orchestra.training.sft_config import SupervisedConfig

    found = make_from_run(run, tmp_path / "data", per_item=2, command="orchestra data make RUN")
    card = (tmp_path / "data" / "README.md").read_text()
    assert f"| 12, {found.correct}, {found.kept} |" in card
    assert "spawn_join(children=2)" in card
    made = datasets.load_from_disk(str(tmp_path / "data"))
    assert [Row.from_columns(example) for example in made] == [row for _, row in found.rows]
    assert set(made["item"]) == {record.id for record, _ in found.rows}
    model = str(Path(sft.__file__).parents[1] / "assets" / "embedded")
    told: dict[str, Any] = {"model": model, "data": str(tmp_path / "data"), "steps": 2, "batch": 2, "packing": 700}
    sft.train_sft(SupervisedConfig(output=str(tmp_path / "run"), log_every=1, **told))
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert log[0]["loss"] < 0.3  # it was the model's own text


def test_a_run_without_traces_says_how_to_have_them(tmp_path: Path, run: Path) -> None:
    for name in ("manifest.json", "samples.jsonl"):
        (tmp_path / name).write_bytes((run / name).read_bytes())
    with pytest.raises(UsageError, match="evaluate with --traces"):
        demonstrations(tmp_path)
