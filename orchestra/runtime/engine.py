"""The engine protocol: what a strategy's threads ask of whatever runs the model."""

from __future__ import annotations

import abc
import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple, Self, TypedDict

from orchestra.graph import Edge, Node, Span, ThreadGraph, View
from orchestra.runtime.clock import REAL, Clock
from orchestra.runtime.sampling import Capability as Capability
from orchestra.runtime.sampling import Sampling as Sampling


class Message(TypedDict):
    """One chat message."""

    role: str
    content: str


Prompt = str | Sequence[Message]


@dataclass(frozen=True, slots=True)
class Request:
    """One generation: fill `node`, whose context and forced tokens are set, with sampled tokens.

    The engine reads `graph` (append-only, nodes before `node` that have ended never change) and does not write to it:
    the run writes the deltas into `node`. Everything random is a function of (seed, path, position).

    Attributes:
        graph: the run's graph; its identity names the run on the engine until `release`.
        node: the node to fill.
        sampling: see `Sampling`.
        seed: the run's seed.
        path: the thread's fork path.
        chunk: wake the reader every so many tokens (1 for races and live views); 0: nobody looks before the end.
        depth: sampled tokens on the heaviest chain that ends where the node begins: its clock in a race by tokens.
        item: the evaluation's item that the run works on, as `TASK/ID` or `ID`; empty if it is none.
        repeat: which of the item's samples the run is.
        gang: what a concurrent node is generated in; the gang says what it reads.
    """

    graph: ThreadGraph
    node: Node
    sampling: Sampling
    seed: int = 0
    path: tuple[int, ...] = ()
    chunk: int = 0
    depth: int = 0
    item: str = ""
    repeat: int = 0
    gang: Gang | None = None

    @property
    def context(self) -> list[Edge]:
        """The node's context edges."""
        return self.node.context


@dataclass(slots=True)
class Delta:
    """What was decoded since the last delta of the same generation.

    Attributes:
        tokens: sampled ids (empty on engines that do not tell; `count` is always right).
        count: number of sampled tokens.
        text: their text. Held back while a character is incomplete.
        logprobs: raw log-probabilities of the sampled tokens (nats, temperature 1, nothing truncated).
        top: per token the alternatives `{id: raw logprob}`, when asked for.
        finish_reason: set on the last delta: `stop`, `length`, `cancelled`, or `paused` (see `generate_in_step`).
        matched: the stop string or id that ended it; None for end-of-sequence.
        eos: the last token is the model's end-of-sequence: it is counted, but not part of the text.
        cached_tokens: context tokens that were on the engine before this request.
        tempered: the same under the law that the tokens were drawn from, when asked for.
        views: with the last delta of a concurrent node: what its tokens read, for `Node.views`.
        notes: what the engine knows besides, for `Node.notes` (JSON values).
    """

    tokens: list[int] = field(default_factory=list)
    count: int = 0
    text: str = ""
    logprobs: list[float] = field(default_factory=list)
    top: list[Mapping[int, float]] = field(default_factory=list)
    finish_reason: str | None = None
    matched: str | int | None = None
    eos: bool = False
    cached_tokens: int = 0
    tempered: list[float] = field(default_factory=list)
    views: list[View] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)

    def merge(self, later: Delta) -> None:
        """Append `later` in place."""
        self.tokens += later.tokens
        self.count += later.count
        self.text += later.text
        self.logprobs += later.logprobs
        self.tempered += later.tempered
        self.top += later.top
        self.finish_reason = later.finish_reason
        self.matched = later.matched
        self.eos = later.eos
        self.cached_tokens += later.cached_tokens
        self.views += later.views
        self.notes.update(later.notes)


class Step(NamedTuple):
    """What the members of a lock-step group have drawn in one step.

    Attributes:
        members: those that drew, by index, ascending; the others have ended.
        tokens: their tokens.
        logprobs: the raw log-probabilities.
        tempered: those under the laws that they were drawn from; nan if not asked for.
        ended: whether the generation ended with this token.
    """

    members: list[int]
    tokens: list[int]
    logprobs: list[float]
    tempered: list[float]
    ended: list[bool]


Look = Callable[[Step], bool]
"""Sees each step of a lock-step group; True stops all members there. Called on the engine's own thread, between two of
its steps: it must be quick, and touch nothing but what belongs to it."""


class Gang(abc.ABC):
    """Generations in lock-step that read each other's tokens while they grow (Hogwild! Inference, arXiv:2504.06261).

    In each step every member feeds its next tokens, all their keys and values are written, and then all attend: token t
    of one sees token t of the others. When a member's generation ends, the others stand still until the gang is
    arranged anew and the member goes on with another node, or leaves. So what is read depends on nothing but the
    program.
    """

    @abc.abstractmethod
    def arrange(self, views: Mapping[int, Sequence[Edge]], settled: int = 0) -> None:
        """Say what concurrent nodes read from their next step on.

        Args:
            views: concurrent node to the nodes that it reads and how many tokens of each, in the order in which they
                are placed one after another from position 0; itself comes last and is not named. Of a node that is
                being generated all is read, whatever the length.
            settled: so many nodes at the beginning of all views have ended and keep their place from now on.
        """

    @abc.abstractmethod
    def leave(self) -> None:
        """One member is fewer: the others do not wait for it."""


class Stream:
    """The deltas of one generation: an async iterator with one reader.

    Unlike an async generator it survives the cancellation of its reader: after `cancel()` it can be read to its end,
    and what was decoded by then is all there, so that nothing that the engine computed goes uncounted.
    Not thread-safe: engines with threads of their own call `push` and `fail` through the reader's event loop.
    """

    def __init__(self, on_cancel: Callable[[], None], chunk: int = 1) -> None:
        self._on_cancel = on_cancel
        self._chunk = chunk
        self._pending = Delta()
        self._error: BaseException | None = None
        self._ended = False
        self._ready = asyncio.Event()
        self._when_ended: Callable[[], None] | None = None

    def push(self, delta: Delta) -> None:
        """Engine side: add a delta; the reader wakes when a chunk is full or the generation has ended."""
        self._pending.merge(delta)
        if delta.finish_reason:
            self._end()
        elif 0 < self._chunk <= self._pending.count:
            self._ready.set()

    def fail(self, error: BaseException) -> None:
        """Engine side: end with an error, after what is pending."""
        self._error = error
        self._end()

    def _end(self) -> None:
        self._ready.set()
        if self._when_ended is not None:
            self._when_ended()

    def when_ended(self, call: Callable[[int], None], index: int) -> None:
        """Reader side: instead of reading delta by delta, be called once with `index` when all is there."""
        self._when_ended = partial(call, index)
        if self._error is not None or self._pending.finish_reason:
            self._when_ended()

    def taken(self) -> tuple[Delta, BaseException | None]:
        """Reader side, after `when_ended` has called: everything as one delta, and the error that ended it."""
        self._ended = True
        delta, self._pending = self._pending, Delta()
        return delta, self._error

    def cancel(self) -> None:
        """Reader side: ask the engine to stop. The stream still ends by itself, with `finish_reason` `cancelled`."""
        if not self._ended:
            self._on_cancel()

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> Delta:
        if self._ended:
            raise StopAsyncIteration
        await self._ready.wait()
        delta, self._pending = self._pending, Delta()
        if self._error is not None:
            if delta.count or delta.text:
                return delta  # first what came before the error; the next call raises it
            self._ended = True
            raise self._error
        self._ready.clear()
        self._ended = delta.finish_reason is not None
        return delta


@dataclass(frozen=True, slots=True)
class Load:
    """What is on an engine now, and what it has done since it was opened.

    Attributes:
        requests: generations queued or running.
        cached_tokens: tokens with keys and values in memory, for runs that have not ended.
        cached_bytes: bytes of those keys and values.
        sampled_tokens: tokens sampled since the engine was opened, cancelled ones included.
        computed_tokens: token positions whose keys and values were computed since then.
        kept_tokens, kept_bytes: what ended runs have left in memory for prompts that begin like theirs.
        peak_bytes: the most bytes of keys and values that ever were in memory.
    """

    requests: int = 0
    cached_tokens: int = 0
    cached_bytes: int = 0
    sampled_tokens: int = 0
    computed_tokens: int = 0
    kept_tokens: int = 0
    kept_bytes: int = 0
    peak_bytes: int = 0


class Engine(abc.ABC):
    """Base of all engines. Instances belong to no event loop until first used.

    Attributes:
        name: how error messages and manifests name it.
        capabilities: what it can do; see `Capability`.
        context_length: most tokens along one path, None if unknown.
        openings: what the model's folder says is to be forced after a prompt so that it speaks a language, by that
            language's name; under `drafts`, how drafts are shown to it. Known once the engine is open; mostly empty.
        recorded: it has nothing but recorded samples of items. It is asked for the run's own prompt only, and
            `encode_prompt` gets the run's `item` as a keyword.
    """

    name: str = "engine"
    capabilities: frozenset[Capability] = frozenset()
    context_length: int | None = None
    openings: Mapping[str, str] = MappingProxyType({})
    recorded: bool = False

    @property
    def eos_ids(self) -> frozenset[int]:
        """Ids that end a sequence, as far as they are known: complete in process; servers may tell in time."""
        return frozenset()

    async def open(self) -> Self:
        """Load what is loaded once. Optional: the first use does it, but here errors come early.

        Raises:
            UsageError: there is no such model, or the engine cannot run it.
        """
        return self

    @abc.abstractmethod
    async def encode_prompt(self, prompt: Prompt, **template: Any) -> Span:
        """The prompt as a span of origin `prompt`; messages go through the chat template (`template` passes through).

        Raises:
            PromptError: empty, outside the vocabulary, or messages for a model without a chat template.
        """

    @abc.abstractmethod
    async def encode(self, text: str) -> Span:
        """Text that the orchestrator writes into a thread, as a span of origin `forced`; empty text, empty span."""

    async def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of ids that go on after some text; see `Sampling.skip_special_tokens`.

        Raises:
            CapabilityError: the engine knows no ids.
        """
        from orchestra.errors import CapabilityError

        raise CapabilityError(f"{self.name} cannot decode token ids")

    @abc.abstractmethod
    def generate(self, request: Request) -> Stream:
        """Start a generation. Called on a running event loop; errors arrive through the stream.

        The stream may raise `PromptError` (context longer than the model's) and `EngineError`.
        """

    def generate_group(self, requests: Sequence[Request]) -> list[Stream]:
        """Start generations that differ in nothing but their node and path; engines may serve them together."""
        return [self.generate(request) for request in requests]

    def generate_in_step(self, requests: Sequence[Request], look: Look) -> list[Stream]:
        """Start generations that advance together, one token each a step, until they end or `look` stops them.

        None of them has forced tokens. Those that end leave the others to go on; those that are stopped end with
        `finish_reason` `paused`.

        Raises:
            CapabilityError: the engine cannot.
            UsageError: they are too many.
        """
        from orchestra.errors import CapabilityError

        raise CapabilityError(f"{self.name} cannot advance generations in lock-step; local:PATH can")

    def forget(self, graph: ThreadGraph, nodes: Iterable[int]) -> None:
        """A hint: nobody is likely to read these nodes again, what is kept of them may go. They can be read still."""

    def gang(self, graph: ThreadGraph, members: int) -> Gang:
        """A new gang of a run; it begins when `members` generations have been asked for with it.

        Raises:
            CapabilityError: the engine has no concurrent cache.
        """
        from orchestra.errors import CapabilityError

        raise CapabilityError(f"{self.name} has no concurrent cache; local:PATH has")

    async def score(self, graph: ThreadGraph, node: Node) -> list[float]:
        """Log-probability (nats) of every token of `node` in its context; 0 for a root's first token.

        Raises:
            CapabilityError: the engine cannot score.
        """
        from orchestra.errors import CapabilityError

        raise CapabilityError(f"{self.name} cannot score given text")

    async def update_weights(self, weights: Mapping[str, Any]) -> None:
        """Run by these weights from now on; what was kept of earlier runs is dropped. No run may be in progress.

        Args:
            weights: torch tensors under the names of the model's `state_dict`; they are copied.

        Raises:
            CapabilityError: the engine's weights cannot be changed from here.
            UsageError: they are not the model's: other names or shapes.
            EngineError: a run is in progress, or the engine failed.
        """
        from orchestra.errors import CapabilityError

        raise CapabilityError(
            f"{self.name} cannot be given new weights; local:PATH, sglang:PATH and sglang://HOST:PORT can"
        )

    async def weights_kept(self) -> bool:
        """Whether the engine still has the weights of the last `update_weights`: a server that began anew has not."""
        return True

    def clock(self, graph: ThreadGraph) -> Clock:
        """The clock that generations of the run live by. A simulated engine has one for each run, until `release`."""
        return REAL

    async def release(self, graph: ThreadGraph) -> None:
        """Forget a run: cancel what still runs of it and free what is kept for it. Idempotent."""

    def load(self) -> Load:
        """What is on the engine now."""
        return Load()

    def facts(self) -> dict[str, Any]:
        """What a manifest records: model, sizes, dtype, versions."""
        return {"engine": self.name}

    async def close(self) -> None:
        """End everything; idempotent."""
