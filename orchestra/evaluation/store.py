"""A run folder: manifest, samples and summary, safe against every way a process can end.

`samples.jsonl` is append-only, one line a finished item x repeat, one write call a line. A process that is killed in
that call leaves at most one torn line at the end, which the next start drops. Files that are replaced are written
beside and renamed. docs/evaluation.md tells users what is in them.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, computed_field

from orchestra.errors import OrchestraError, UsageError
from orchestra.outcome import Usage

MANIFEST, SAMPLES, SUMMARY = "manifest.json", "samples.jsonl", "summary.json"
Key = tuple[str, int]


class Record(BaseModel):
    """One finished item x repeat. With `--strategy sample` it is a recorded sample, which `replay:` plays.

    Attributes:
        task: name of the task; empty in folders of the first versions.
        id: the item.
        repeat: which of its samples, from 0.
        seed: the run's seed that produced it.
        answer: as extracted; None if there was none.
        correct: the grade; None when it could not be graded, or the sample failed.
        text: the response.
        finish_reason: `stop`, or `length` if it was cut off; None if it failed.
        stopped_by, usage: as in `Outcome`.
        error: why it failed; a failed sample is not a wrong one.
    """

    task: str = ""
    id: str
    repeat: int
    seed: int
    answer: str | None = None
    correct: bool | None = None
    text: str = ""
    finish_reason: str | None = None
    stopped_by: str | None = None
    usage: Usage = Field(default_factory=Usage)
    error: str | None = None

    @computed_field  # type: ignore[prop-decorator]  # mypy knows no decorator on a property
    @property
    def sampled_tokens(self) -> int:
        """Of the usage, where every reader of recorded samples finds them."""
        return self.usage.sampled_tokens

    @computed_field  # type: ignore[prop-decorator]  # mypy knows no decorator on a property
    @property
    def prompt_tokens(self) -> int:
        """Likewise."""
        return self.usage.prompt_tokens

    @property
    def key(self) -> Key:
        """What makes it one of a run."""
        return self.id, self.repeat

    @property
    def failed(self) -> bool:
        """It ended with an error and has no grade."""
        return self.error is not None


class Plan(BaseModel):
    """What is evaluated, and how: what two runs must share to be one.

    Attributes:
        task: name of the task.
        parameters: what determines its items.
        strategy: spec string.
        engine: URL; another URL of the same model may go on with the run.
        engines: URLs of further engines by alias.
        limit: number of items.
        repeats: samples an item.
        seed: all samples' seeds are derived from it.
        temperature, top_p, max_tokens: passed to every generation.
        budget: spec string; of each sample.
    """

    model_config = ConfigDict(frozen=True)

    task: str
    parameters: dict[str, Any] = Field(default_factory=dict)
    strategy: str
    engine: str = "demo"
    engines: dict[str, str] = Field(default_factory=dict)
    limit: int
    repeats: int = 1
    seed: int = 0
    temperature: float | None = None
    top_p: float = 1.0
    max_tokens: int | None = None
    budget: str | None = None


class Manifest(BaseModel):
    """How the samples of a folder came about.

    Attributes:
        plan: what was asked for.
        facts: what the engine says about itself.
        versions: of everything that could matter.
        created: when the run was first started (UTC).
    """

    plan: Plan
    facts: dict[str, Any] = Field(default_factory=dict)
    versions: dict[str, str] = Field(default_factory=dict)
    created: str = Field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    def differences(self, later: Manifest) -> list[str]:
        """What keeps `later` from going on with this run, one phrase each.

        `limit` and `repeats` may grow: what is stored then is a part of what is asked for.
        """
        found = []
        old, new = self.plan.model_dump(), later.plan.model_dump()
        for name, value in old.items():
            if name in ("limit", "repeats"):
                if new[name] < value:
                    found.append(f"{name} {value} there, only {new[name]} here")
            elif name != "engine" and new[name] != value:
                found.append(f"{name} {value!r} there, {new[name]!r} here")
        # The same model may lie elsewhere on another machine; engines that can tell give its fingerprint.
        compared = ["fingerprint", "dtype", "rate"]
        if self.plan.engine != later.plan.engine and "fingerprint" not in self.facts:
            compared.append("model")
        for name in compared:
            there, here = self.facts.get(name), later.facts.get(name)
            if there != here:
                found.append(f"engine's {name} {there!r} there, {here!r} here")
        return found


class RunStore:
    """A run folder open for writing, by one process at a time.

    Attributes:
        folder: the run folder.
        manifest: of the folder.
        records: what is stored, by item and repeat.
        dropped: bytes of a torn last line that opening dropped.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        """Start a run in `folder`, or go on with the one that is there. Failed samples are forgotten, to be retried.

        Raises:
            UsageError: the folder cannot be written, is in use, holds something else, or another run.
        """
        self.folder = folder
        self.records: dict[Key, Record] = {}
        self.dropped = 0
        with _as_usage_error(folder):
            folder.mkdir(parents=True, exist_ok=True)
            strangers = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
            if strangers and MANIFEST not in strangers:
                raise UsageError(f"{folder} is not a run folder: it has files, but no {MANIFEST}")
            self._lock = _lock(folder / ".lock")
        try:
            with _as_usage_error(folder):
                self._open(manifest)
        except BaseException:
            os.close(self._lock)
            raise

    def _open(self, manifest: Manifest) -> None:
        path = self.folder / MANIFEST
        if path.exists():
            stored = read_manifest(self.folder)
            if differences := stored.differences(manifest):
                raise UsageError(f"{self.folder} holds another run: {'; '.join(differences)}. Choose another --out")
            manifest = manifest.model_copy(update={"created": stored.created})
        self.manifest = manifest
        write_atomically(path, manifest.model_dump_json(indent=2) + "\n")
        samples = self.folder / SAMPLES
        whole = 0
        if samples.exists():
            self.records, whole, size = _read_samples(samples)
            self.dropped = size - whole
            if failed := [key for key, record in self.records.items() if record.failed]:
                for key in failed:
                    del self.records[key]
                lines = [record.model_dump_json() + "\n" for record in self.records.values()]
                write_atomically(samples, "".join(lines))
                whole = samples.stat().st_size
        self._file = os.open(samples, os.O_WRONLY | os.O_CREAT, 0o644)
        os.ftruncate(self._file, whole)
        os.lseek(self._file, 0, os.SEEK_END)
        self._end = whole

    def append(self, record: Record) -> None:
        """Store a finished sample: when this returns, killing the process cannot lose it.

        Raises:
            OrchestraError: it could not be written whole, for instance on a full disk; the file is as it was before.
            ValueError: this item and repeat is stored already.
        """
        if record.key in self.records:
            raise ValueError(f"item {record.id!r}, repeat {record.repeat} is stored already")
        line = (record.model_dump_json() + "\n").encode()
        try:
            if os.write(self._file, line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            # What is left of a half-written line would be dropped by the next start as well.
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, self._end)
                os.lseek(self._file, self._end, os.SEEK_SET)
            raise OrchestraError(
                f"cannot write {self.folder / SAMPLES}: {error.strerror}; {len(self.records)} samples are saved"
            ) from error
        self._end += len(line)
        self.records[record.key] = record

    def finish(self, summary: str) -> None:
        """Write `summary.json` and make everything durable.

        Raises:
            OrchestraError: it could not be written.
        """
        try:
            os.fsync(self._file)
            write_atomically(self.folder / SUMMARY, summary + "\n")
        except OSError as error:
            raise OrchestraError(f"cannot write {self.folder / SUMMARY}: {error.strerror}") from error

    def close(self) -> None:
        """Close the files and let others write; idempotent."""
        if self._lock >= 0:
            os.close(self._file)
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a run folder.

    Raises:
        UsageError: there is none, or it is damaged.
    """
    path = folder / MANIFEST
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except OSError as error:
        raise UsageError(f"{folder} is not a run folder: cannot read {MANIFEST}: {error.strerror}") from error
    except ValidationError as error:
        raise UsageError(f"{path} is damaged: {error.errors()[0]['msg']}") from error


def read_records(folder: Path) -> list[Record]:
    """The samples of a run folder, also of one that is still running.

    Raises:
        UsageError: there are none, or a line other than a torn last one is damaged.
    """
    try:
        return list(_read_samples(folder / SAMPLES)[0].values())
    except OSError as error:
        raise UsageError(f"{folder} is not a run folder: cannot read {SAMPLES}: {error.strerror}") from error


def write_atomically(path: Path, text: str) -> None:
    """Replace a file as a whole: whoever reads it, even after a crash, finds the old or the new text.

    Raises:
        OSError: it cannot be written; the old file is untouched.
    """
    beside = path.with_name(f".{path.name}.new")
    with beside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def _read_samples(path: Path) -> tuple[dict[Key, Record], int, int]:
    """The records, the bytes up to the end of the last whole line, and all bytes."""
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    records: dict[Key, Record] = {}
    for number, line in enumerate(data[:whole].split(b"\n")[:-1], 1):
        try:
            record = Record.model_validate_json(line)
        except ValidationError as error:
            raise UsageError(f"{path}, line {number} is damaged; remove the line to go on without it") from error
        records[record.key] = record
    return records, whole, len(data)


def _lock(path: Path) -> int:
    """An open file that no other process can lock until it is closed."""
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        import fcntl
    except ImportError:  # Windows
        return file
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(file)
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise UsageError(f"another evaluation is writing to {path.parent}") from error
        # Some network file systems cannot lock; that must not keep anyone from evaluating.
        return os.open(path, os.O_RDWR)
    return file


@contextlib.contextmanager
def _as_usage_error(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UsageError(f"cannot write to {folder}: {error.strerror}") from error
