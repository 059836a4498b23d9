"""The command line, from its words to its exit code: bad input is one clear line, nothing is lost."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestra.cli import demo, main
from orchestra.cli.strategies import attributes
from orchestra.evaluation.store import read_records

ROOT = Path(__file__).resolve().parent.parent
PROMPT = "numbers: 3 7 8 12 target: 54"
PROGRAM = [sys.executable, "-m", "orchestra"]

PIPED: Any = {"capture_output": True, "text": True, "cwd": ROOT}  # the package need not be installed

Main = Callable[..., tuple[int, str, str]]


@pytest.fixture
def orchestra(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Main:
    """Run a command in an empty folder: its exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")

    def call(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(word) for word in words])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


WRONG = [
    (["run", PROMPT, "-s", "spawn_jion"], "unknown strategy 'spawn_jion'; did you mean 'spawn_join'"),
    (["run", PROMPT, "-s", "first_finish(sample=8)"], "did you mean 'samples'"),
    (["run", PROMPT, "-s", "first_finish(samples=0)"], "samples"),
    (["run", PROMPT, "-s", "first_finish(samples=1000000000)"], "samples"),
    (["run", PROMPT, "-s", "first_finish(samples=2, first=3)"], "first=3 of samples=2"),
    (["run", PROMPT, "-s", "__import__('os').system('true')"], "spec"),
    (["run", PROMPT, "-s", "sample("], "does not parse"),
    (["run", PROMPT, "-s", ""], "does not parse"),
    (["run", PROMPT, "-e", "warp:9"], "unknown engine 'warp'"),
    (["run", PROMPT, "--alias", "judge"], "NAME=URL"),
    (["run", PROMPT, "--alias", "judge=demo", "--alias", "judge=demo"], "twice"),
    (["run", PROMPT, "--alias", "judge=warp:9"], "unknown engine 'warp'"),
    (["run", PROMPT, "-s", "pdr(engine='j')", "--alias", "judge=demo"], "unknown engine alias 'j'"),
    (["run", PROMPT, "-e", "demo?colour=red"], "unknown engine parameter 'colour'"),
    (["run", PROMPT, "-e", "sglang:"], "sglang://HOST:PORT"),
    (["run", PROMPT, "-e", "sglang://me:secret@127.0.0.1:1"], "holds no key"),
    (["run", PROMPT, "-e", "openai://127.0.0.1:1?colour=red"], "unknown engine parameter 'colour'"),
    (["run", PROMPT, "-e", "local:./no/such/folder"], "no/such/folder"),
    (["run", PROMPT, "-e", "local:"], "needs a model"),
    (["run", PROMPT, "--budget", "tokens=5"], "unknown parameter 'tokens'"),
    (["run", PROMPT, "--budget", "sampled_tokens=0"], "sampled_tokens"),
    (["run", PROMPT, "--budget", "critical_path_tokens"], "budget"),
    (["run", PROMPT, "--temperature", "-1"], "--temperature"),
    (["run", PROMPT, "--temperature", "nan"], "--temperature"),
    (["run", PROMPT, "--temperature", "warm"], "'--temperature': input should be a valid number"),
    (["run", PROMPT, "--top-p", "0"], "--top-p"),
    (["run", PROMPT, "--max-tokens", "0"], "--max-tokens"),
    (["run", PROMPT, "--seed", "-1"], "--seed"),
    (["run", PROMPT, "--seed", str(2**70)], "--seed"),
    (["run", PROMPT, "--json", "--live"], "--json and --live"),
    (["run", PROMPT, "--trace", "no/folder/trace.json"], "no/folder"),
    (["run", PROMPT, "--nonsense"], "No such option"),
    (["run"], "Missing argument"),
    (["run", ""], "empty"),
    (["run", "   "], "empty"),
    (["run", "What is the capital of France?"], "vocabulary"),
    (["run", "numbers: " + "3 " * 6000 + "target: 54"], "4096"),
    (["run", PROMPT, "--system", "Be brief."], "template"),
    (["conduct"], "No such command"),
    (["eval"], "Missing argument"),
    (["eval", "countdwn"], "unknown task 'countdwn'; did you mean 'countdown'"),
    (["eval", "../countdown"], "unknown task"),
    (["eval", "countdown", "--level", "huge"], "unknown level 'huge'"),
    (["eval", "countdown", "--split", "train"], "unknown split 'train'"),
    (["eval", "countdown", "--repeats", "0"], "--repeats"),
    (["eval", "countdown", "--limit", "0"], "--limit"),
    (["eval", "countdown", "--limit", "5000", "--repeats", "5000"], "samples, more than"),
    (["eval", "countdown", "--concurrency", "0"], "--concurrency"),
    (["eval", "countdown", "-s", "nonesuch"], "unknown strategy"),
    (["eval", "countdown", "--budget", "sampled_tokens=many"], "sampled_tokens"),
    (["eval", "countdown", "-e", "warp:9"], "unknown engine"),
    (["eval", "countdown", "--limit", "1", "--out", "/dev/null/run"], "cannot write to /dev/null/run"),
    (["train", "sft", "no.yaml"], "no configuration file no.yaml"),
]


@pytest.mark.parametrize(("words", "message"), WRONG, ids=[" ".join(words)[:60] for words, _ in WRONG])
def test_bad_input_is_one_line_and_exit_code_2(orchestra: Main, words: list[str], message: str) -> None:
    code, out, err = orchestra(*words)
    assert code == 2
    assert out == ""
    assert err.startswith("orchestra: ")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    assert len(err) < 1000  # what other tests have registered in this process is listed too
    assert message.lower() in err.lower()


def test_missing_extra_says_which_one(orchestra: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr("orchestra.extras.find_spec", lambda name: None if name == "torch" else real(name))
    for words in (["run", PROMPT], ["eval", "countdown"], ["train", "sft", "x.yaml"]):
        code, out, err = orchestra(*words)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert f"orchestra-lm[{'train' if words[0] == 'train' else 'local'}]" in err


def test_bad_training_configuration(orchestra: Main, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("stepz: 3\n")
    code, _, err = orchestra("train", "sft", "c.yaml")
    assert (code, err.count("\n")) == (2, 1)
    assert "stepz" in err
    (tmp_path / "c.yaml").write_text("output: nowhere\n")
    code, _, err = orchestra("train", "sft", "c.yaml", "--resume")
    assert (code, err) == (2, "orchestra: nothing to resume: there is no checkpoint in nowhere\n")


def test_a_defect_is_one_line_without_debug(orchestra: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: object, text: str) -> None:
        raise ZeroDivisionError("by\nzero")

    monkeypatch.setattr("orchestra.spec.parse_strategy", broken)
    monkeypatch.setattr("orchestra.spec.parse_strategy", lambda spec: broken(None, spec))
    code, _, err = orchestra("run", PROMPT)
    assert (code, err) == (1, "orchestra: internal error: ZeroDivisionError: by zero (--debug shows where)\n")
    with pytest.raises(ZeroDivisionError):
        main(["run", PROMPT, "--debug"])


def test_help(orchestra: Main) -> None:
    code, out, err = orchestra("--help")
    assert (code, err) == (0, "")
    for name in ("run", "eval", "demo", "tasks", "strategies", "engines", "train"):
        assert name in out
        assert orchestra(name, "--help")[0] == 0
    assert orchestra()[1].startswith(out[:10])


def test_lists(orchestra: Main) -> None:
    code, out, _ = orchestra("strategies")
    assert code == 0
    for word in ("spawn_join", "first_finish", "Needs continue", "2505.18149", "scorer", "bayes_risk", "2504.02495"):
        assert word in out
    assert "samples=8" in out
    code, out, _ = orchestra("strategies", "first_finish")
    assert code == 0
    for word in ("samples=8", "drafts=sample", "how many race", "any engine", "2505.18149"):
        assert word in out
    assert "spawn_join" not in out
    assert out.index("samples=8") < out.index("first=1") < out.index("drafts=sample")  # as its docstring has it
    assert "scorer=mean_logprob" in orchestra("strategies", "best_of")[1]
    assert "temperature=0.5" in orchestra("strategies", "judge")[1]
    code, _, err = orchestra("strategies", "jugde")
    assert code == 2
    assert "did you mean 'judge'" in err
    assert "small, hard" in orchestra("tasks")[1]
    engines = orchestra("engines")[1]
    for word in ("demo", "sglang://HOST:PORT", "openai://HOST:PORT", "replay:FILE.jsonl", "patience=120", "key_file"):
        assert word in engines
    code, out, _ = orchestra("engines", "demo")
    assert code == 0
    assert "fingerprint" in out
    assert "reuse_join" in out
    assert orchestra("engines", "warp:9")[0] == 2


def test_the_list_of_strategies_fits_a_narrow_terminal(orchestra: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = orchestra("strategies")[1].splitlines()
    assert max(map(len, lines)) <= 80
    assert len(lines) < 8 * sum(line.startswith(" ") and line[1:2].isalpha() for line in lines)


def test_attributes_of_a_docstring() -> None:
    text = "What.\n\nAttributes:\n    a, b: two\n        lines.\n    c: one.\n\nOther: no."
    assert attributes(text) == {"a": "two lines.", "b": "two lines.", "c": "one."}
    assert attributes("What.") == {}


def test_run(orchestra: Main, tmp_path: Path) -> None:
    code, out, err = orchestra("run", PROMPT, "-s", "spawn_join", "--max-tokens", "200", "--trace", "trace.json")
    assert code == 0
    assert "children: free" in out
    assert "critical path" in err
    trace = json.loads((tmp_path / "trace.json").read_text())
    assert trace["graph"]["nodes"]
    assert trace["usage"]["sampled_tokens"] >= trace["usage"]["critical_path_tokens"] > 0
    again = orchestra("run", PROMPT, "-s", "spawn_join", "--max-tokens", "200")
    assert again[1] == out


def test_run_as_json_and_within_a_budget(orchestra: Main) -> None:
    code, out, err = orchestra("run", PROMPT, "--json", "--budget", "sampled_tokens=20")
    assert (code, err) == (0, "")
    outcome = json.loads(out)
    assert outcome["stopped_by"] == "sampled_tokens"
    assert outcome["usage"]["sampled_tokens"] == 20
    assert "graph" not in outcome


def test_run_within_a_pattern_or_a_schema(orchestra: Main, tmp_path: Path) -> None:
    code, out, _ = orchestra("run", PROMPT, "--regex", r"( \d+){2} hit", "--temperature", 2)
    assert (code, re.match(r" \d+ \d+ hit\n", out) is not None) == (0, True)
    schema = tmp_path / "schema.json"
    code, _, err = orchestra("run", PROMPT, "--json-schema", schema)
    assert (code, "cannot read --json-schema" in err) == (2, True)
    schema.write_text('{"type": "object"}')
    code, _, err = orchestra("run", PROMPT, "--json-schema", schema)  # a model of numbers has no braces
    assert (code, "no token of this model can begin what satisfies the json_schema" in err) == (2, True)


def test_run_reads_stdin() -> None:
    done = subprocess.run([*PROGRAM, "run", "-", "--json", "--max-tokens", "5"], input=PROMPT, **PIPED, check=True)
    assert json.loads(done.stdout)["text"]
    empty = subprocess.run([*PROGRAM, "run", "-"], input="", **PIPED, check=False)
    assert (empty.returncode, empty.stderr.count("\n")) == (2, 1)


def test_live_without_a_terminal_is_lines(orchestra: Main) -> None:
    code, out, _ = orchestra("run", PROMPT, "-s", "self_consistency(samples=2)", "--live", "--max-tokens", "50")
    assert code == 0
    assert "\x1b" not in out
    assert any(line.startswith("[") and "thread 0" in line for line in out.splitlines())


def test_live_in_a_terminal() -> None:
    words = ["run", PROMPT, "-s", "self_consistency(samples=3)", "--live", "--max-tokens", "50"]
    code, screen = in_terminal([*PROGRAM, *words])
    assert code == 0
    assert "\x1b[" in screen
    assert "▪" in screen
    assert "critical path" in screen


def in_terminal(words: list[str]) -> tuple[int, str]:
    """Exit code and all output of a command that believes to be in a terminal."""
    ours, theirs = pty.openpty()
    environment = os.environ | {"COLUMNS": "100", "LINES": "30", "TERM": "xterm-256color"}
    process = subprocess.Popen(words, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, cwd=ROOT)
    os.close(theirs)
    output = b""
    while True:
        ready, _, _ = select.select([ours], [], [], 0.1)
        if ready:
            try:
                output += os.read(ours, 65536)
            except OSError:  # the other end is closed
                break
        elif process.poll() is not None:
            break
    os.close(ours)
    return process.wait(), output.decode(errors="replace")


def test_eval_writes_a_run_folder_and_goes_on(orchestra: Main, tmp_path: Path) -> None:
    words = ["eval", "countdown", "-s", "spawn_join", "--out", "run", "--repeats", "2", "--max-tokens", "200"]
    code, out, err = orchestra(*words, "--limit", "3")
    assert code == 0
    assert "±" in out
    assert "spawn_join" in out
    assert "6/6" in err
    first = read_records(tmp_path / "run")
    code, _, err = orchestra(*words, "--limit", "5")
    assert code == 0
    assert "going on in run: 6 of 10" in err
    records = read_records(tmp_path / "run")
    assert records[:6] == first
    assert len({record.key for record in records}) == len(records) == 10
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    for key in ("task", "strategy", "items", "repeats", "accuracy", "stderr", "maj_at_k", "pass_at_k", "ungraded"):
        assert key in summary
    for key in ("sampled_tokens", "critical_path_tokens", "wall_seconds", "failed"):
        assert summary[key] >= 0
    assert (summary["items"], summary["repeats"]) == (5, 2)
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["plan"]["strategy"] == "spawn_join"
    assert manifest["facts"]
    assert manifest["versions"]["python"]

    code, out, err = orchestra(*words, "--limit", "5", "--seed", "1")
    assert (code, out) == (2, "")
    assert "seed 0 there, 1 here" in err


def test_judges_live_on_engines_of_their_own(orchestra: Main, tmp_path: Path, tiny: str) -> None:
    spec = "best_of(samples=2, scorer=judge(engine='judge', samples=1))"
    judge = ["-s", spec, "--alias", f"judge=local:{tiny}", "--max-tokens", 20]
    code, out, _ = orchestra("run", PROMPT, "--json", *judge)
    assert code == 0
    assert json.loads(out)["usage"]["requests"] == 3  # two drafts, one judgement
    line = ["eval", "countdown", "--limit", 2, "--out", tmp_path / "run", "-s", spec, "--max-tokens", 20]
    assert orchestra(*line, "--alias", f"judge=local:{tiny}")[0] == 0
    records = read_records(tmp_path / "run")
    assert [record.usage.requests for record in records] == [3, 3]
    code, _, err = orchestra(*line, "--alias", "judge=demo")
    assert code == 2
    assert "engines" in err


def test_eval_within_a_critical_path(orchestra: Main, tmp_path: Path) -> None:
    code, _, _ = orchestra("eval", "countdown", "--limit", "4", "--budget", "critical_path_tokens=60", "--out", "run")
    assert code == 0
    records = read_records(tmp_path / "run")
    assert all(record.usage.critical_path_tokens <= 60 for record in records)
    assert "critical_path_tokens" in {record.stopped_by for record in records}


def test_eval_does_not_depend_on_concurrency(orchestra: Main, tmp_path: Path) -> None:
    kept = []
    for concurrency in (1, 8):
        folder = f"run{concurrency}"
        words = ["--limit", "4", "--out", folder, "--concurrency", str(concurrency), "--max-tokens", "150"]
        assert orchestra("eval", "countdown", "--level", "hard", "-s", "sample(temperature=1.0)", *words)[0] == 0
        kept.append({r.key: (r.text, r.usage.sampled_tokens) for r in read_records(tmp_path / folder)})
    assert kept[0] == kept[1]


def start(folder: Path) -> subprocess.Popen[str]:
    words = ["eval", "countdown", "--limit", "24", "--max-tokens", "150", "--concurrency", "4", "--out", str(folder)]
    return subprocess.Popen([*PROGRAM, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)


def wait_for_samples(folder: Path, count: int, process: subprocess.Popen[str]) -> None:
    samples = folder / "samples.jsonl"
    while process.poll() is None and (not samples.exists() or samples.read_bytes().count(b"\n") < count):
        time.sleep(0.01)


def test_ctrl_c_saves_what_is_finished_and_kill_loses_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = start(folder)
    wait_for_samples(folder, 3, process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, ""), err
    assert err.count("\n") == 1
    saved = read_records(folder)
    assert f"interrupted: {len(saved)} of 24 samples are saved; the same line with --out {folder} goes on" in err
    assert 3 <= len(saved) < 24

    process = start(folder)
    wait_for_samples(folder, len(saved) + 3, process)
    process.kill()
    process.communicate()
    assert read_records(folder)[: len(saved)] == saved

    for each in (folder, tmp_path / "whole"):
        process = start(each)
        out, err = process.communicate()
        assert (process.returncode, out.count("±")) == (0, 1), err
    records = read_records(folder)
    assert {r.key: r.text for r in records} == {r.key: r.text for r in read_records(tmp_path / "whole")}
    assert len(records) == 24


def test_output_that_nobody_reads(tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", "-c", f"{' '.join(map(repr, PROGRAM))} strategies | head -1 >/dev/null; exit ${{PIPESTATUS[0]}}"],
        **PIPED,
        check=False,
    )
    assert done.stderr == ""


def check_demo(orchestra: Main) -> None:
    code, out, _ = orchestra("demo", "--items", "2")
    assert code == 0
    for word in (
        "spawn_join",
        "sample",
        "first_finish(samples=8)",
        "critical_path_tokens ≤",
        "hard · 2 items",
        "orchestra eval",
    ):
        assert word in out


def test_demo_in_short(orchestra: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "_MOST_TOKENS", 60)
    monkeypatch.setattr(demo, "ROWS", [*demo.ROWS[:4], demo.ROWS[6]])
    check_demo(orchestra)


@pytest.mark.slow
def test_demo(orchestra: Main) -> None:
    began = time.monotonic()
    check_demo(orchestra)
    assert time.monotonic() - began < 240
