"""What engines behind HTTP share: calls, their tries, and their end.

A *sample* is one generation; a *call* is the request that serves it, or several equal ones at once. A call is driven
by one task that holds a slot, tries again after faults, and goes on where a broken stream stopped. Whatever happens,
each sample's stream ends exactly once.
"""

from __future__ import annotations

import abc
import asyncio
import itertools
import uuid
from collections.abc import Sequence
from functools import partial
from typing import Any, Self

from orchestra.errors import EngineError, OrchestraError, UsageError
from orchestra.graph import ThreadGraph
from orchestra.runtime.engine import Delta, Engine, Load, Request, Stream
from orchestra.runtime.http import Fault, Refused, Server
from orchestra.runtime.sampling import Sampling

_ABORT_WAITS = (0.1, 0.4, 1.5)  # seconds between aborts; then the connection is dropped
_ABORT_SECONDS = 2.0  # for the server to say that it has heard; a frozen one does not
_STEERING_WORDS = ("grammar", "logit_bias", "_penalty")  # in a refusal: the settings are at fault
_NAME = uuid.uuid4().hex[:12]  # of this process, in request ids
_begun = itertools.count(1)  # over all its engines: they may share a server


class Sample:
    """One generation: what was asked for, and what has come so far, over all tries.

    Attributes:
        request: what was asked for.
        stream: where it goes.
        tokens: ids received.
        text: text received.
        cancelled: nobody wants it any more.
        ended: its stream has ended.
        resumed: it goes on after a break.
    """

    __slots__ = ("call", "cancelled", "count", "ended", "request", "resumed", "stream", "text", "tokens")

    def __init__(self, request: Request) -> None:
        self.request = request
        self.stream: Stream
        self.call: Call
        self.tokens: list[int] = []
        self.count = 0
        self.text = ""
        self.cancelled = self.ended = self.resumed = False

    def give(self, delta: Delta) -> None:
        """Pass on what is new."""
        self.tokens += delta.tokens
        self.count += delta.count
        self.text += delta.text
        self.ended = delta.finish_reason is not None
        self.stream.push(delta)

    def fail(self, error: BaseException) -> None:
        """End with an error."""
        if not self.ended:
            self.ended = True
            self.stream.fail(error)


class Call:
    """One HTTP request in work.

    Attributes:
        run: the identity of its graph.
        samples: what it serves; more than one only when they are equal and none has begun.
        rid: the request id, chosen here for each try; empty while nothing is on the server.
        task: drives it.
        error: why it failed.
        state: of the current try; the engine's own.
    """

    __slots__ = ("error", "rid", "run", "samples", "state", "task")

    def __init__(self, samples: list[Sample]) -> None:
        self.run = id(samples[0].request.graph)
        self.samples = samples
        self.rid = ""
        self.task: asyncio.Task[None]
        self.error: OrchestraError | None = None
        self.state: Any = None

    @property
    def live(self) -> list[Sample]:
        """Samples that have not ended."""
        return [sample for sample in self.samples if not sample.ended]


class RemoteEngine(Engine):
    """Base of the engines behind HTTP.

    Attributes:
        server: the way to it.
        group: the most samples that one request may ask for.
    """

    group = 1

    def __init__(self, name: str, server: Server) -> None:
        self.name = name
        self.server = server
        self._calls: dict[int, set[Call]] = {}  # by graph
        self._aborts: set[asyncio.Task[None]] = set()
        self._sampled = 0
        self._opening: asyncio.Task[None] | None = None
        self._closed = False

    # -- what a subclass says ----------------------------------------------------------------------------------------

    @abc.abstractmethod
    async def _meet(self) -> None:
        """Ask the server what it is; tried once, when the engine is opened.

        Raises:
            UsageError, EngineError: it is not what the URL says, or not there.
        """

    @abc.abstractmethod
    async def _try(self, call: Call) -> None:
        """One try: send the request, and give its samples what comes, to their ends.

        Raises:
            Fault: it broke; samples keep what they have.
            Refused, OrchestraError: it cannot work.
        """

    async def _abort(self, rid: str) -> None:
        """Tell the server that nobody wants a request any more. By default dropping the connection says so."""

    def _resumable(self, sample: Sample) -> bool:
        """Whether a sample that has begun can go on after its connection broke."""
        return False

    # -- Engine ------------------------------------------------------------------------------------------------------

    async def open(self) -> Self:
        """Meet the server: tried once, so that a wrong address is an error at once.

        Raises:
            UsageError: it is not what the URL says.
            EngineError: it cannot be reached.
        """
        if self._closed:
            raise EngineError(f"{self.name} is closed")
        if (opening := self._opening) is None:
            opening = self._opening = asyncio.ensure_future(self._open())
        try:
            await asyncio.shield(opening)
        except OrchestraError:
            if self._opening is opening:  # the first of those who waited for it
                self._opening = None
                await self.server.close()
            raise
        return self

    async def _open(self) -> None:
        try:
            await self._meet()
        except Fault as fault:
            raise EngineError(f"cannot reach {self.name}: {fault}; is a server running there?") from fault
        except Refused as refusal:
            raise EngineError(f"{self.name} does not answer as expected: {refusal}") from refusal

    def generate(self, request: Request) -> Stream:
        """See `Engine.generate`."""
        return self._start([self._sample(request)])[0]

    def generate_group(self, requests: Sequence[Request]) -> list[Stream]:
        """See `Engine.generate_group`: as few calls as the server allows."""
        samples = [self._sample(request) for request in requests]
        size = max(1, self.group)
        return [s for i in range(0, len(samples), size) for s in self._start(samples[i : i + size])]

    def _sample(self, request: Request) -> Sample:
        sample = Sample(request)
        sample.stream = Stream(partial(self._cancel, sample), request.chunk)
        return sample

    def _start(self, samples: list[Sample]) -> list[Stream]:
        call = Call(samples)
        for sample in samples:
            sample.call = call
        self._calls.setdefault(call.run, set()).add(call)
        call.task = asyncio.get_running_loop().create_task(self._drive(call))
        call.task.add_done_callback(partial(self._end, call))
        return [sample.stream for sample in samples]

    def load(self) -> Load:
        """See `Engine.load`; what this client has on the server."""
        running = sum(len(call.live) for calls in self._calls.values() for call in calls)
        return Load(requests=running, sampled_tokens=self._sampled)

    async def release(self, graph: ThreadGraph) -> None:
        """See `Engine.release`: cancel what still runs of a run, and wait until it has ended."""
        left = list(self._calls.get(id(graph), ()))
        for call in left:
            for sample in call.live:
                self._cancel(sample)
        if left:
            await asyncio.wait([call.task for call in left])

    async def close(self) -> None:
        """See `Engine.close`: cancel everything, tell the server, close the connections."""
        self._closed = True
        calls = [call for calls in self._calls.values() for call in calls]
        for call in calls:
            for sample in call.live:
                self._cancel(sample)
        if tasks := [call.task for call in calls] + list(self._aborts):
            await asyncio.wait(tasks)
        if self._opening is not None and not self._opening.done():
            self._opening.cancel()
        await self.server.close()

    # -- one call ----------------------------------------------------------------------------------------------------

    async def _drive(self, call: Call) -> None:
        """Bring a call to its end, whatever that is."""
        server = self.server
        try:
            await self.open()
            async with server.gate:
                await server.gate.ready()
                await server.insist(lambda: self._once(call), gave_up=lambda: all(s.cancelled for s in call.live))
        except Fault as fault:  # broke when nobody wanted it any more
            call.error = EngineError(f"{self.name}: {fault}")
        except Refused as refusal:
            call.error = self._refusal(refusal)
        except OrchestraError as error:
            call.error = error
        except Exception as defect:
            call.error = EngineError(f"{self.name}: {type(defect).__name__}: {defect}")
            call.error.__cause__ = defect

    def _end(self, call: Call, _: asyncio.Task[None]) -> None:
        """End what the call has left open. A callback: a task that is cancelled before its first step runs nothing."""
        of_run = self._calls[call.run]
        of_run.discard(call)
        if not of_run:
            del self._calls[call.run]
        for sample in call.live:
            if sample.cancelled or call.error is None:
                sample.give(Delta(finish_reason="cancelled"))
            else:
                sample.fail(call.error)

    async def _once(self, call: Call) -> None:
        """One try, for the samples that have not ended; those that have begun go on alone."""
        live = call.live
        if len(live) > 1 and any(sample.count for sample in live):
            for sample in live[1:]:
                self._start([sample])
            live = live[:1]
        call.samples = live
        for sample in live:
            sample.resumed = sample.count > 0
            if sample.count and not self._resumable(sample):
                raise EngineError(
                    f"{self.name}: the connection broke after {sample.count} tokens, and this server cannot go on "
                    "from there"
                )
        if not live:
            return
        call.rid = f"orchestra-{_NAME}-{next(_begun)}"
        try:
            await self._try(call)
            if call.live:
                raise Fault("it ended before its generation did")
        finally:
            call.rid = ""
            call.state = None

    def _refusal(self, refusal: Refused) -> OrchestraError:
        """A refusal as the error that the caller sees."""
        kind = UsageError if any(word in str(refusal) for word in _STEERING_WORDS) else EngineError
        return kind(f"{self.name} refuses the request: {refusal}")

    def _give(self, sample: Sample, delta: Delta) -> None:
        self._sampled += delta.count
        sample.give(delta)

    def _cancel(self, sample: Sample) -> None:
        """Nobody wants a sample any more: stop it upstream, at whatever point it is."""
        call = sample.call
        if sample.cancelled or sample.ended:
            return
        sample.cancelled = True
        if not call.rid:  # nothing of it is on the server
            if all(other.cancelled for other in call.live):
                call.task.cancel()
        elif len(call.samples) == 1:
            task = asyncio.ensure_future(self._stop(call, call.rid))
            self._aborts.add(task)
            task.add_done_callback(self._aborts.discard)
        else:
            self._keep(call, sample)
            sample.give(Delta(finish_reason="cancelled"))
            if not call.live:
                call.task.cancel()

    def _keep(self, call: Call, sample: Sample) -> None:
        """Hand on what has come of one of several samples and was not looked at yet."""

    async def _stop(self, call: Call, rid: str) -> None:
        """Abort until the call ends: the first abort may come before the server has seen the request."""
        for wait in _ABORT_WAITS:
            try:
                async with asyncio.timeout(_ABORT_SECONDS):
                    await self._abort(rid)
            except (Fault, OrchestraError, TimeoutError):
                break
            await asyncio.wait([call.task], timeout=wait)
            if call.task.done() or call.rid != rid:
                return
        call.task.cancel()


def steering(sampling: Sampling, *, least: float) -> dict[str, Any]:
    """The settings that change a model's logits, under the names that servers share; those that change nothing are out.

    Args:
        sampling: the settings.
        least: what is sent for a bias of minus infinity.
    """
    said: dict[str, Any] = {
        "frequency_penalty": sampling.frequency_penalty or None,
        "presence_penalty": sampling.presence_penalty or None,
        "repetition_penalty": sampling.repetition_penalty if sampling.repetition_penalty != 1 else None,
        "logit_bias": {str(token): max(bias, least) for token, bias in sampling.logit_bias} or None,
        "json_schema": sampling.json_schema,
        "regex": sampling.regex,
    }
    return {name: value for name, value in said.items() if value is not None}
