"""The language of asynchronous thinking: an organiser forks sub-queries to workers, thinks on, and joins them later.

Chi et al. 2025, arXiv 2510.26658. With what the runtime forces in square brackets::

    First two things at once. <FORK-1>How many primes are below 50?</FORK-1><FORK-2>And from 50 to 100?</FORK-2>
    Meanwhile ... <JOIN-1>[<RETURN-1>15</RETURN-1>] ... <JOIN-2>[<RETURN-2>10</RETURN-2>] So 25.

A worker is a thread with a context of its own. What it hands back stands in its last ``<RETURN>...</RETURN>``; one
that writes none hands back its whole solution. A number may be used again once it was joined. The paper shows what
comes back only in its figures, so the tags around it are ours.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from orchestra.answers import split_reasoning
from orchestra.protocols.base import Branch, Fork, Problem, Protocol, Reader
from orchestra.protocols.lexer import Lexer, Token

MOST_WORKERS = 16
UNJOINED = "is never joined"
"""What a reader notes of a worker that the organiser did not wait for."""
_RETURN = ("<RETURN>", "</RETURN>")


@dataclass
class Task:
    """A sub-query that was forked, and what came back.

    Attributes:
        label: the worker's number.
        query: what it was asked.
        result: what it handed back; None if nobody joined it.
    """

    label: str
    query: str
    result: str | None = None


@dataclass(frozen=True, slots=True)
class Joined:
    """Where the organiser waited for a worker, and had its result written down."""

    label: str


@dataclass
class Organised:
    """A text of the organiser: plain text, tasks where they were forked, joins where they were waited for."""

    parts: list[str | Task | Joined] = field(default_factory=list)


class AsyncThinkProtocol(Protocol[Organised]):
    """See the module."""

    name = "async_think"
    paper = "Chi et al. 2025, arXiv 2510.26658"

    @property
    def tags(self) -> tuple[str, ...]:
        """See `Protocol.tags`."""
        labels = range(1, MOST_WORKERS + 1)
        return tuple(
            tag
            for i in labels
            for tag in (f"<FORK-{i}>", f"</FORK-{i}>", f"<JOIN-{i}>", f"<RETURN-{i}>", f"</RETURN-{i}>")
        )

    @staticmethod
    def stops(workers: int) -> tuple[str, ...]:
        """Where the runtime has something to do."""
        return tuple(stop for i in range(1, workers + 1) for stop in (f"</FORK-{i}>", f"<JOIN-{i}>"))

    @staticmethod
    def returned(label: str, result: str | None) -> str:
        """What is forced after a join: the result, or that there is none."""
        end = f"</RETURN-{label}>"
        return f"<RETURN-{label}>{'none' if result is None else result.replace(end, '')}{end}"

    @staticmethod
    def result(worker: str) -> str | None:
        """What a worker hands back: its last complete `<RETURN>`, else its solution; None if that is empty."""
        text = split_reasoning(worker).solution
        head, end, _ = text.rpartition(_RETURN[1])
        _, start, inside = head.rpartition(_RETURN[0])
        return ((inside if end and start else text).strip()) or None

    def reader(self) -> AsyncThinkReader:
        """See `Protocol.reader`."""
        return AsyncThinkReader()

    def render(self, document: Organised) -> str:
        """See `Protocol.render`."""
        results: dict[str, str | None] = {}
        out = ""
        for part in document.parts:
            if isinstance(part, Task):
                results[part.label] = part.result
                out += f"<FORK-{part.label}>{part.query}</FORK-{part.label}>"
            elif isinstance(part, Joined):
                out += f"<JOIN-{part.label}>" + self.returned(part.label, results.get(part.label))
            else:
                out += part
        return out


class AsyncThinkReader(Reader[Organised]):
    """See `Reader`; besides the last fork it tells the last wait.

    Attributes:
        wait: label of the worker that the text waits for now; None if it does not.
    """

    def __init__(self) -> None:
        self.problems: list[Problem] = []
        self.document = Organised()
        self.wait: str | None = None
        labels = range(1, MOST_WORKERS + 1)
        self._lexer = Lexer(f"{verb}-{i}" for verb in ("FORK", "JOIN", "RETURN") for i in labels)
        self._inside: Token | None = None
        self._words = ""
        self._open: dict[str, Task] = {}  # forked and not joined

    def feed(self, text: str) -> Fork | None:
        """See `Reader.feed`."""
        self.wait = None
        fork: Fork | None = None
        for token in self._lexer.feed(text):
            task = self._take(token)
            if task is not None:
                fork = Fork((Branch(task.label, task.query),))
        return fork

    def close(self) -> Organised:
        """See `Reader.close`."""
        for token in self._lexer.close():
            self._take(token)
        self._give_up()
        for task in self._open.values():
            self.problems.append(Problem(self._lexer.at, f"worker {task.label} {UNJOINED}"))
        return self.document

    def _take(self, token: Token) -> Task | None:
        verb, _, label = token.name.partition("-")
        inside = self._inside
        if inside is not None and token.kind == "close" and token.name == inside.name:
            words, self._inside, self._words = self._words, None, ""
            if verb == "RETURN":
                self._returned(label, words, inside)
                return None
            return self._fork(label, words, inside)
        if inside is not None and token.kind != "text" and not inside.name.startswith("RETURN"):
            self._give_up()  # a sub-query holds no tags; what came back may hold any
            inside = None
        if inside is not None or token.kind == "text":
            self._write(token.text)
        elif token.kind == "close":
            self._complain(token, "closes nothing")
        elif verb == "JOIN":
            self._join(label, token)
        else:
            self._inside = token
        return None

    def _fork(self, label: str, query: str, token: Token) -> Task | None:
        if label in self._open:
            self._complain(token, "is at work already", token.text + query + f"</{token.name}>")
        elif not query.strip():
            self._complain(token, "asks nothing", token.text + query + f"</{token.name}>")
        else:
            task = self._open[label] = Task(label, query)
            self.document.parts.append(task)
            return task
        return None

    def _join(self, label: str, token: Token) -> None:
        self.wait = label
        if label in self._open:
            self.document.parts.append(Joined(label))
        else:
            self._complain(token, "waits for nobody")

    def _returned(self, label: str, words: str, token: Token) -> None:
        task = self._open.pop(label, None)
        if task is not None and self.document.parts[-1] == Joined(label):
            task.result = None if words == "none" else words
        else:
            self._complain(token, "comes from nobody", token.text + words + f"</{token.name}>")

    def _give_up(self) -> None:
        """An element that was begun turns out to have no end."""
        if self._inside is not None:
            token, words, self._inside, self._words = self._inside, self._words, None, ""
            self._complain(token, "is not closed", token.text + words)

    def _write(self, text: str) -> None:
        parts = self.document.parts
        if self._inside is not None:
            self._words += text
        elif parts and isinstance(parts[-1], str):
            parts[-1] += text
        else:
            parts.append(text)

    def _complain(self, token: Token, message: str, text: str | None = None) -> None:
        self.problems.append(Problem(token.at, f"{token.text} {message}"))
        self._write(token.text if text is None else text)


ASYNC_THINK = AsyncThinkProtocol()
