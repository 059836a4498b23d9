"""`traces.jsonl` of a run folder: the thread graphs of its samples, for those who want to learn from them.

A line is written before the sample's own, so a stored sample has its trace. A line that a killed process left torn is
passed over when traces are read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from orchestra.errors import UsageError
from orchestra.evaluation.store import Key, Record
from orchestra.graph import Edge, ThreadGraph
from orchestra.outcome import Outcome

TRACES = "traces.jsonl"


@dataclass(frozen=True, slots=True)
class Trace:
    """What happened in one sample.

    Attributes:
        key: item and repeat.
        graph: all of it.
        end: where the chosen thread ends; None when the result is no one thread's.
    """

    key: Key
    graph: ThreadGraph
    end: Edge | None = None


class Traces:
    """The traces of a run folder, open for writing."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / TRACES

    def append(self, record: Record, outcome: Outcome) -> None:
        """Write a sample's trace.

        Raises:
            UsageError: it cannot be written.
        """
        end = None if outcome.thread is None else outcome.thread.end
        head = json.dumps({"id": record.id, "repeat": record.repeat, "end": end})
        try:
            with self._path.open("a+b") as file:
                if file.tell() and not self._whole():
                    file.write(b"\n")  # after a torn line
                file.write(f'{head[:-1]}, "graph": {outcome.graph.to_json()}}}\n'.encode())
        except OSError as error:
            raise UsageError(f"cannot write to {self._path}: {error.strerror}") from error

    def _whole(self) -> bool:
        with self._path.open("rb") as file:
            file.seek(-1, 2)
            return file.read() == b"\n"


def read_traces(folder: Path) -> Iterator[Trace]:
    """The traces of a run folder; of a sample that was run again both, the later one last.

    Raises:
        UsageError: there are none.
    """
    try:
        with (folder / TRACES).open("rb") as file:
            for line in file:
                try:
                    told = json.loads(line)
                    end = None if told["end"] is None else Edge(*told["end"])
                    graph = ThreadGraph.from_json(json.dumps(told["graph"]))
                except (ValueError, KeyError, TypeError):
                    continue
                yield Trace((told["id"], told["repeat"]), graph, end)
    except OSError as error:
        raise UsageError(
            f"{folder} has no {TRACES}: evaluate with --traces to keep thread graphs ({error.strerror})"
        ) from error
