"""Run folders: what is stored survives any end of the process, and nothing else gets mixed in."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from orchestra.errors import OrchestraError, UsageError
from orchestra.evaluation.store import (
    MANIFEST,
    SAMPLES,
    SUMMARY,
    Manifest,
    Plan,
    Record,
    RunStore,
    read_manifest,
    read_records,
    write_atomically,
)

HERE = Path(__file__).parent
ENVIRONMENT = os.environ | {"PYTHONPATH": str(HERE.parent)}
PLAN = Plan(task="countdown", strategy="sample", limit=10, repeats=2)


def manifest(plan: Plan = PLAN, **changes: object) -> Manifest:
    return Manifest(plan=plan.model_copy(update=changes), facts={"model": "m"})


def record(i: int, **values: object) -> Record:
    return Record(id=f"item-{i}", repeat=i % 2, seed=i, text="αβγ\n\r\u2028 \x00 end", correct=i % 3 == 0, **values)


def test_round_trip(tmp_path: Path) -> None:
    with RunStore(tmp_path / "a" / "run", manifest()) as store:
        for i in range(5):
            store.append(record(i))
        store.finish('{"accuracy": 1}')
    assert read_records(tmp_path / "a" / "run") == [record(i) for i in range(5)]
    assert read_manifest(tmp_path / "a" / "run").plan == PLAN
    assert json.loads((tmp_path / "a" / "run" / SUMMARY).read_text()) == {"accuracy": 1}
    for line in (tmp_path / "a" / "run" / SAMPLES).read_text().split("\n")[:-1]:
        assert json.loads(line)["text"] == record(0).text


def test_resumes_wherever_a_kill_has_cut_the_file(tmp_path: Path) -> None:
    with RunStore(tmp_path, manifest()) as store:
        for i in range(3):
            store.append(record(i))
    samples = tmp_path / SAMPLES
    data = samples.read_bytes()
    ends = [i + 1 for i, byte in enumerate(data) if byte == ord("\n")]
    for cut in sorted({*range(0, len(data), 5), *range(ends[0] - 3, ends[0] + 4), *ends}):
        samples.write_bytes(data[:cut])
        kept = sum(end <= cut for end in ends)
        with RunStore(tmp_path, manifest()) as store:
            assert len(store.records) == kept
            assert store.dropped == cut - ([0, *ends][kept])
            store.append(record(7))
        assert read_records(tmp_path) == [*(record(i) for i in range(kept)), record(7)]


def test_a_torn_line_is_not_a_record_for_readers_either(tmp_path: Path) -> None:
    with RunStore(tmp_path, manifest()) as store:
        store.append(record(1))
    with (tmp_path / SAMPLES).open("a") as file:
        file.write('{"id": "item-2", "rep')
    assert [r.id for r in read_records(tmp_path)] == ["item-1"]


def test_damage_in_the_middle_is_named(tmp_path: Path) -> None:
    with RunStore(tmp_path, manifest()) as store:
        store.append(record(1))
        store.append(record(2))
    lines = (tmp_path / SAMPLES).read_text().split("\n")
    (tmp_path / SAMPLES).write_text("\n".join([lines[0], "garbage", lines[1], ""]))
    with pytest.raises(UsageError, match="line 2 is damaged"):
        RunStore(tmp_path, manifest())


def test_stores_nothing_twice(tmp_path: Path) -> None:
    with RunStore(tmp_path, manifest()) as store:
        store.append(record(1))
        with pytest.raises(ValueError, match="stored already"):
            store.append(record(1))
    assert len(read_records(tmp_path)) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"strategy": "spawn_join"}, "strategy 'sample' there, 'spawn_join' here"),
        ({"seed": 7}, "seed 0 there, 7 here"),
        ({"task": "aime24"}, "task 'countdown' there, 'aime24' here"),
        ({"parameters": {"level": "hard"}}, "parameters {} there, {'level': 'hard'} here"),
        ({"temperature": 1.0}, "temperature None there, 1.0 here"),
        ({"budget": "requests=1"}, "budget None there, 'requests=1' here"),
        ({"limit": 9}, "limit 10 there, only 9 here"),
        ({"repeats": 1}, "repeats 2 there, only 1 here"),
    ],
)
def test_another_run_is_refused_with_the_difference(tmp_path: Path, change: dict[str, object], message: str) -> None:
    with RunStore(tmp_path, manifest()) as store:
        store.append(record(1))
    before = (tmp_path / MANIFEST).read_text()
    with pytest.raises(UsageError) as caught:
        RunStore(tmp_path, manifest(**change))
    assert message in str(caught.value)
    assert (tmp_path / MANIFEST).read_text() == before
    assert len(read_records(tmp_path)) == 1
    RunStore(tmp_path, manifest()).close()  # the refusal has given the lock back


def test_another_model_is_refused_wherever_it_lies(tmp_path: Path) -> None:
    there = PLAN.model_copy(update={"engine": "local:there"})
    RunStore(tmp_path, manifest()).close()
    RunStore(tmp_path, Manifest(plan=there, facts={"model": "m"})).close()
    with pytest.raises(UsageError, match="engine's model 'm' there, 'n' here"):
        RunStore(tmp_path, Manifest(plan=PLAN, facts={"model": "n"}))


def test_a_fingerprint_says_which_model_it_is(tmp_path: Path) -> None:
    there = PLAN.model_copy(update={"engine": "local:there"})
    RunStore(tmp_path, Manifest(plan=PLAN, facts={"model": "m", "fingerprint": "1"})).close()
    RunStore(tmp_path, Manifest(plan=there, facts={"model": "n", "fingerprint": "1"})).close()
    with pytest.raises(UsageError, match="engine's fingerprint '1' there, '2' here"):
        RunStore(tmp_path, Manifest(plan=there, facts={"model": "n", "fingerprint": "2"}))


def test_more_items_and_repeats_go_on(tmp_path: Path) -> None:
    with RunStore(tmp_path, manifest()) as store:
        store.append(record(1))
    with RunStore(tmp_path, manifest(limit=20, repeats=4)) as store:
        assert len(store.records) == 1
    assert read_manifest(tmp_path).plan.limit == 20


def test_failed_samples_are_tried_again(tmp_path: Path) -> None:
    with RunStore(tmp_path, manifest()) as store:
        store.append(record(1))
        store.append(record(2, error="connection lost"))
        store.append(record(3))
    with RunStore(tmp_path, manifest()) as store:
        assert sorted(store.records) == [("item-1", 1), ("item-3", 1)]
        store.append(record(2))
    assert [r.id for r in read_records(tmp_path)] == ["item-1", "item-3", "item-2"]


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    with RunStore(tmp_path, manifest()), pytest.raises(UsageError, match="another evaluation is writing"):
        RunStore(tmp_path, manifest())
    RunStore(tmp_path, manifest()).close()


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match="not a run folder"):
        RunStore(tmp_path, manifest())
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UsageError, match="cannot write to"):
            RunStore(folder, manifest())


def test_damaged_manifest(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text("{")
    with pytest.raises(UsageError, match=r"manifest\.json is damaged"):
        RunStore(tmp_path, manifest())


def test_replacing_a_file_fails_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, "new")
    assert path.read_text() == "old"


WRITER = """
    import resource, signal, sys
    from pathlib import Path
    from orchestra.errors import OrchestraError
    from test_evaluation_store import manifest, record
    from orchestra.evaluation.store import RunStore

    store = RunStore(Path(sys.argv[1]), manifest())
    {before}
    for i in range(int(sys.argv[2])):
        key = record(i).key
        if key not in store.records:
            store.append(record(i))
            {after}
"""


def child(before: str = "", after: str = "") -> list[str]:
    code = textwrap.dedent(WRITER).format(before=before, after=after)
    return [sys.executable, "-c", code]


@pytest.mark.skipif(sys.platform == "win32", reason="limits of POSIX")
def test_full_disk_is_one_line_and_resumable(tmp_path: Path) -> None:
    # A limit on the size of files acts as a full disk does: a short write, then an error.
    limit = "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))"
    done = subprocess.run(
        [*child(limit), str(tmp_path), "100"], capture_output=True, text=True, cwd=HERE, env=ENVIRONMENT, check=False
    )
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert "cannot write" in last
    stored = read_records(tmp_path)
    assert f"{len(stored)} samples are saved" in last
    assert 0 < len(stored) < 100
    assert (tmp_path / SAMPLES).read_bytes().endswith(b"\n")
    subprocess.run([*child(), str(tmp_path), "100"], cwd=HERE, env=ENVIRONMENT, check=True)
    assert read_records(tmp_path) == [record(i) for i in range(100)]


def test_full_disk_is_deliberate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    with RunStore(tmp_path, manifest()) as store:
        store.append(record(1))
        monkeypatch.setattr(os, "write", lambda file, data: real(file, data[:10]))
        with pytest.raises(OrchestraError, match="No space left on device; 1 samples are saved"):
            store.append(record(2))
        monkeypatch.undo()
        store.append(record(2))
    assert len(read_records(tmp_path)) == 2


def _kill_and_go_on(folder: Path, kills: int) -> None:
    count = 400
    for k in range(kills):
        process = subprocess.Popen(
            [*child(after="__import__('time').sleep(0.001)"), str(folder), str(count)], cwd=HERE, env=ENVIRONMENT
        )
        before = _size(folder)
        while process.poll() is None and _size(folder) == before:
            time.sleep(0.002)
        time.sleep(0.003 * k % 0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run([*child(), str(folder), str(count)], cwd=HERE, env=ENVIRONMENT, check=True)
    assert read_records(folder) == [record(i) for i in range(count)]


def _size(folder: Path) -> int:
    path = folder / SAMPLES
    return path.stat().st_size if path.exists() else 0


def test_killed_and_started_again(tmp_path: Path) -> None:
    _kill_and_go_on(tmp_path, 4)


@pytest.mark.slow
def test_killed_fifty_times(tmp_path: Path) -> None:
    _kill_and_go_on(tmp_path, 50)
