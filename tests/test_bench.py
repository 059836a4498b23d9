"""The commands that measure: they run on tiny cases and print what they say. No figure is compared with another."""

from __future__ import annotations

import json

import pytest
import torch

from orchestra.benchmarks import attention, generate
from orchestra.benchmarks.models import model_folder
from orchestra.benchmarks.report import Column, Report
from orchestra.benchmarks.runners import NEVER_SHARED, Work
from orchestra.cli import main
from orchestra.runtime.attention.cost import in_place


@pytest.fixture(autouse=True)
def _wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "250")


def words_of(table: str, first: str) -> list[str]:
    """The words of the line that begins with `first`."""
    return next(line for line in table.splitlines() if line.strip().startswith(first)).split()


def test_bench_attention_prints_ours_beside_both_forms_of_sdpa(capsys, tmp_path):
    out = tmp_path / "attention.json"
    sizes = ["--readers", "2,3", "--prefix", "5,64", "--tails", "4", "--heads", "4", "--key-heads", "2", "--dim", "8"]
    assert main(["bench", "attention", *sizes, "--dtype", "float32", "--seconds", "0", "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    for heading in ("in place, ms", "copied, ms", "SDPA, ms", "folded SDPA, ms", "ours over SDPA", "GB/s", "GFLOP/s"):
        assert heading in shown
    assert words_of(shown, "float32")[:4] == ["float32", "2", "5", "copied"]
    found = json.loads(out.read_text())
    assert [(row["readers"], row["prefix"]) for row in found["rows"]] == [(2, 5), (2, 64), (3, 5), (3, 64)]
    assert found["machine"]["torch"] == torch.__version__
    for row in found["rows"]:
        assert row["over_sdpa"] == pytest.approx(row["sdpa_ms"] / row["copied_ms"])
    assert "| float32 | 2 | 5 | copied |" in out.with_suffix(".md").read_text()


def test_bench_attention_measures_the_way_that_the_cost_rule_chooses():
    case = attention.Case(16, 600, 8, 4, 4, 32, torch.float32)
    assert in_place(case.prefix, case.readers, case.token_bytes)
    (row,) = attention.rows([case], torch.device("cpu"), seconds=0)
    assert row["chosen"] == "in place"
    assert row["over_folded"] == pytest.approx(row["folded_ms"] / row["in_place_ms"])
    read = (600 + 16 * 8) * 2 * 4 * 32 * 4
    assert row["gigabytes"] * row["in_place_ms"] * 1e6 == pytest.approx(read)
    assert row["gigaflops"] * row["in_place_ms"] * 1e6 == pytest.approx(4 * 16 * 4 * 32 * 608)


def test_the_grid_leaves_out_replicas_that_do_not_fit():
    cases = attention.grid(
        (8, 256), (16, 16384), (torch.float32,), tails=64, heads=32, key_heads=8, dim=128, max_bytes=8e9
    )
    assert [(case.readers, case.prefix) for case in cases] == [(8, 16), (8, 16384), (256, 16)]
    assert cases[1].replica_bytes == 8 * (16384 + 64) * 2 * 8 * 128 * 4


def test_bench_generate_prints_ours_beside_a_peer_on_the_same_work(capsys, tmp_path):
    out = tmp_path / "generate.json"
    work = ["--samples", "3", "--prompt", "9", "--tokens", "5", "--threads", "1", "--peers", "transformers"]
    assert main(["bench", "generate", "--model", "tiny-shape", *work, "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    for heading in ("threads", "tokens/s", "decoding, tokens/s", "to first tokens, s", "peak, GB", "ours is"):
        assert heading in shown
    ours, peer = json.loads(out.read_text())["rows"]
    assert (ours["runner"], peer["runner"]) == ("ours", "transformers")
    for row in (ours, peer):
        assert row["rate"] * row["seconds"] == pytest.approx(3 * 5)
        assert row["decode_rate"] * (row["seconds"] - row["first"]) == pytest.approx(3 * 4)
        assert 0 < row["first"] < row["seconds"]
    assert peer["ratio"] == pytest.approx(ours["rate"] / peer["rate"])


@pytest.mark.slow
def test_bench_generate_tree_shares_both_levels_one_or_none(capsys):
    work = ["--samples", "2", "--prompt", "40", "--branches", "2", "--second", "10", "--tokens", "3", "--threads", "1"]
    assert main(["bench", "generate", "tree", "--model", "tiny-shape", *work]) == 0
    shown = capsys.readouterr().out
    for way in ("both levels shared", "first level", "replicated"):
        assert "40 + 2 x 10 x 4 x 3" in " ".join(words_of(shown, way))


def test_the_tree_copies_the_second_level_only_where_it_says_so():
    token_bytes = 1024
    both, one, none = (
        way.works[0].copy_bytes for way in generate.tree("folder", "float32", 16, [8], 4096, 512, 64, token_bytes)
    )
    assert both is None
    assert in_place(4096, 128, token_bytes, one)
    assert not in_place(512, 16, token_bytes, one)
    assert none == NEVER_SHARED
    assert not in_place(4096, 128, token_bytes, none)


def test_works_have_prompts_of_their_own():
    works = [Work("folder", "float32", 1, 20, 4, seed=seed) for seed in (1, 2)]
    first, second = (work.ids(100, 20) for work in works)
    assert first == works[0].ids(100, 20)
    assert first != second
    assert len(first) == 20
    assert max(first) < 100


def test_bench_hogwild_prints_each_layout_beside_independent_threads(capsys):
    options = ["--model", "tiny-shape", "--workers", "2", "--tokens", "6", "--repeats", "1", "--prompt", "10"]
    assert main(["bench", "hogwild", *options]) == 0
    shown = capsys.readouterr().out
    assert "of independent threads" in shown
    assert words_of(shown, "independent threads")[2] == "12"
    for layout in ("combined", "interleaved", "contiguous"):
        assert words_of(shown, f"hogwild, {layout}")[2] == "12"


def test_bench_power_prints_particles_beside_plain_samples(capsys, tmp_path):
    out = tmp_path / "power.json"
    sizes = ["--model", "tiny-shape", "--particles", "3", "--prompt", "8,16", "--tokens", "12", "--every", "4"]
    assert main(["bench", "power", *sizes, "--moves", "1", "--repeats", "1", "--out", str(out)]) == 0
    assert "x as many samples" in capsys.readouterr().out
    rows = json.loads(out.read_text())["rows"]
    ways = ["3 plain samples", "one plain sample", "power_smc, never", "power_smc, by weights", "power_smc, every 4"]
    ways.append("power_mh, 1 moves")
    assert [(row["prompt"], row["way"]) for row in rows] == [(n, way) for n in (8, 16) for way in ways]
    for row in rows[:6]:
        assert row["plain"] == pytest.approx(row["seconds"] / rows[0]["seconds"])
        assert row["tokens"] == 12 * {"one plain sample": 1, "power_mh, 1 moves": row["tokens"] / 12}.get(row["way"], 3)
    assert [row["resamplings"] for row in rows[:5]] == [None, None, 0, rows[3]["resamplings"], 2]


def test_bench_streams_prints_each_number_beside_one_stream_and_separate_sequences(capsys, tmp_path):
    out = tmp_path / "streams.json"
    sizes = ["--model", "tiny-shape", "--streams", "2,3", "--threads", "1", "--tokens", "6", "--prompt", "10"]
    assert main(["bench", "streams", *sizes, "--repeats", "1", "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    for heading in ("ms a token", "of one stream", "keys and values, MB", "prefixes, MB"):
        assert heading in shown
    found = {row["way"]: row for row in json.loads(out.read_text())["rows"]}
    assert list(found) == ["one stream", "2 streams", "3 streams", "3 sequences"]
    alone = found.pop("one stream")
    assert alone["ratio"] is None
    for row in found.values():
        assert row["ratio"] == pytest.approx(row["milliseconds"] / alone["milliseconds"])
    # Keys and values of all tokens in all streams, and the prefixes, which do not grow.
    token = 2 * 2 * 2 * 8 * 4  # layers, key heads, keys and values, dimension, float32
    assert alone["megabytes"] == pytest.approx((10 + 6) * token / 1e6)
    assert found["3 streams"]["megabytes"] == pytest.approx(3 * (10 + 6) * token / 1e6)
    assert found["3 sequences"]["megabytes"] == pytest.approx(3 * (10 + 6) * token / 1e6)
    assert found["3 streams"]["prefix_megabytes"] == pytest.approx(3 * 48 * token / 1e6)


def test_bench_client_prints_ours_beside_a_bare_loop(capsys):
    assert main(["bench", "client", "--samples", "4", "--milliseconds", "5", "--repeats", "1"]) == 0
    shown = capsys.readouterr().out
    assert "CPU, s per 1000" in shown
    assert len(words_of(shown, "bare aiohttp")) == 6  # no ratio to itself
    assert words_of(shown, "Orchestra")[1] == "self_consistency(samples=4)"


def test_a_missing_figure_is_a_dash_in_table_and_page():
    columns = (Column("name", "name"), Column("rate", "rate", ".1f"))
    facts = {"cpu": "one", "cores": 1, "threads": 1, "torch": "2", "load": 0.0}
    report = Report("title", columns, facts, rows=[{"name": "a", "rate": 1.25}, {"name": "b"}])
    assert "| a | 1.2 |\n| b | - |" in report.markdown()


def test_a_built_model_is_removed_again_and_speaks_any_text():
    from pathlib import Path

    from transformers import AutoTokenizer

    with model_folder("tiny-shape", "float32") as folder:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert tokenizer.decode(tokenizer("Alice [1]:").input_ids) == "Alice [1]:"
    assert not Path(folder).exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["attention", "--readers", "x"], "--readers is one or more numbers"),
        (["attention", "--dtype", "float7"], "unknown dtype 'float7'"),
        (["attention", "--heads", "3", "--key-heads", "2"], "multiple of --key-heads"),
        (["attention", "--max-bytes", "1"], "--max-bytes"),
        (["attention", "--device", "nowhere"], "device 'nowhere' is not available"),
        (["generate", "--peers", "nobody"], "unknown peer 'nobody'"),
        (["generate", "--model", "nothing"], "nothing"),
        (["hogwild", "--out", "/nowhere/at/all.json"], "cannot write"),
        (["streams", "--streams", "1,2"], "above 1"),
    ],
)
def test_wrong_use_is_one_line(capsys, words, said):
    assert main(["bench", *words]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
