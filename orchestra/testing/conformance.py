"""What every engine must do, for anyone to run on an engine of their own. Failures are `AssertionError`s."""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from orchestra.errors import CapabilityError, OrchestraError, PromptError
from orchestra.graph import Edge, Node, Span, ThreadGraph
from orchestra.runtime.engine import Capability, Delta, Engine, Load, Request, Sampling, Stream
from orchestra.testing.laws import CLOSE_CALL

PROMPT = "numbers: 3 7 8 12 target: 55"
_SCORE_TOLERANCE = 1e-3  # nats; kernels differ between prefill and decode
_SECONDS = 60.0  # for anything to come to rest


async def check_engine(
    engine: Engine, prompt: str = PROMPT, *, max_tokens: int = 24, close_call: float = CLOSE_CALL, **request: Any
) -> list[str]:
    """Check that an engine keeps the protocol of `orchestra.runtime.engine`, as far as its capabilities go.

    Prompts, deltas, limits and stops, cancellation at every moment, concurrency, groups, continuation, scores and
    seeds, what is left afterwards, and what bad input is answered with. The engine stays open.

    Args:
        engine: an idle engine.
        prompt: something that it can answer.
        max_tokens: length of the generations.
        close_call: greedy texts may part where the two likeliest tokens are closer than this (nats), on engines that
            report them: the order of sums depends on the batch. In half precision 0.1 is reasonable.
        request: further fields of `Request` (`item` for replay).

    Returns:
        The names of the checks that applied.

    Raises:
        AssertionError: the first rule that is broken.
    """
    await engine.open()
    suite = _Suite(engine, prompt, Sampling(max_tokens=max_tokens), request, close_call)
    done = []
    for name, needs in _CHECKS.items():
        if engine.capabilities >= needs:
            try:
                async with asyncio.timeout(_SECONDS * 5):
                    await getattr(suite, name)()
            except TimeoutError:
                raise AssertionError(f"{name}: something never ends") from None
            await suite.at_rest(name)
            done.append(name)
    return done


_CHECKS: dict[str, frozenset[Capability]] = {
    "facts": frozenset(),
    "prompts": frozenset(),
    "deltas": frozenset(),
    "limit": frozenset(),
    "concurrency": frozenset(),
    "groups": frozenset(),
    "cancelled_at_once": frozenset(),
    "cancelled_after_a_token": frozenset(),
    "cancelled_after_the_end": frozenset(),
    "released": frozenset(),
    "too_long": frozenset(),
    "decodes": frozenset(),
    "stops": frozenset({Capability.CONTINUE}),
    "continues": frozenset({Capability.CONTINUE}),
    "forced_text": frozenset({Capability.CONTINUE}),
    "logprobs": frozenset({Capability.LOGPROBS}),
    "top_logprobs": frozenset({Capability.TOP_LOGPROBS}),
    "scores": frozenset({Capability.SCORE}),
    "seeds": frozenset({Capability.SEED}),
    "cut": frozenset({Capability.CUT}),
    "penalties": frozenset({Capability.PENALTIES, Capability.SCORE, Capability.LOGPROBS}),
    "logit_bias": frozenset({Capability.LOGIT_BIAS}),
    "grammar": frozenset({Capability.GRAMMAR}),
}


class _Suite:
    def __init__(
        self, engine: Engine, prompt: str, sampling: Sampling, request: dict[str, Any], close_call: float
    ) -> None:
        self.engine, self.prompt, self.sampling, self.request = engine, prompt, sampling, request
        self.close_call = close_call
        self.idle = engine.load()

    # -- tools -------------------------------------------------------------------------------------------------------

    async def root(self, graph: ThreadGraph, prompt: str | None = None) -> Node:
        span = await self.engine.encode_prompt(prompt or self.prompt)
        node = graph.add(spans=[span])
        node.finish_reason = "forced"
        return node

    def start(
        self, graph: ThreadGraph, context: Iterable[Edge], sampling: Sampling, *, chunk: int = 0, fork: int = 0
    ) -> tuple[Node, Stream]:
        node = graph.add(context, path=(fork,))
        return node, self.engine.generate(Request(graph, node, sampling, path=(fork,), chunk=chunk, **self.request))

    async def read(self, node: Node, stream: Stream) -> Delta:
        """All deltas as one, checked, and in the graph as a run would put them."""
        whole, reasons = Delta(), []
        async for delta in stream:
            assert not delta.tokens or len(delta.tokens) == delta.count, "a delta's tokens and count differ"
            reasons.append(delta.finish_reason)
            whole.merge(delta)
        assert reasons, "a stream without a delta"
        assert reasons[-1] in ("stop", "length", "cancelled"), f"a stream ends with finish_reason {reasons[-1]!r}"
        assert not any(reasons[:-1]), "a finish_reason before the last delta"
        node.spans.append(Span("sampled", whole.tokens, whole.count, whole.text, whole.logprobs))
        node.finish_reason = whole.finish_reason
        return whole

    async def say(self, graph: ThreadGraph, context: Iterable[Edge], sampling: Sampling, **options: Any) -> Delta:
        node, stream = self.start(graph, context, sampling, **options)
        return await self.read(node, stream)

    async def alone(self, sampling: Sampling | None = None, **options: Any) -> Delta:
        """One generation in a run of its own."""
        graph = ThreadGraph()
        said = await self.say(graph, [_end(await self.root(graph))], sampling or self.sampling, **options)
        await self.engine.release(graph)
        return said

    async def same(self, said: Delta, expected: Delta, what: str) -> None:
        """Two greedy generations say the same, up to a close call."""
        if said.text == expected.text:
            return
        at = next((i for i, (a, b) in enumerate(zip(said.tokens, expected.tokens, strict=False)) if a != b), None)
        if at is not None and Capability.TOP_LOGPROBS in self.engine.capabilities:
            told = await self.alone(replace(self.sampling, logprobs=True, top_logprobs=2))
            if told.tokens[:at] == said.tokens[:at] and at < told.count:
                first, second = sorted(told.top[at].values(), reverse=True)[:2]
                if first - second < self.close_call:
                    return
        raise AssertionError(f"{what} it says {said.text!r} and not {expected.text!r}")

    async def at_rest(self, name: str) -> None:
        """Nothing is left on the engine; some give back their slots shortly after the last delta."""
        try:
            async with asyncio.timeout(_SECONDS):
                while _left(load := self.engine.load()) != _left(self.idle):  # noqa: ASYNC110 (there is no event)
                    await asyncio.sleep(0.01)
        except TimeoutError:
            raise AssertionError(f"after {name}: {load} is left on the engine, {self.idle} before") from None

    # -- checks ------------------------------------------------------------------------------------------------------

    async def facts(self) -> None:
        facts = self.engine.facts()
        assert facts.get("engine"), "facts() do not name the engine"
        json.dumps(facts)
        assert self.engine.capabilities <= frozenset(Capability), "unknown capabilities"

    async def prompts(self) -> None:
        span = await self.engine.encode_prompt(self.prompt)
        assert span.origin == "prompt", "a prompt's origin"
        assert span.count > 0, "a prompt without tokens"
        assert len(span.tokens) in (0, span.count), "a prompt's tokens and count differ"
        again = await self.engine.encode_prompt(self.prompt)
        assert (again.tokens, again.count) == (span.tokens, span.count), "one prompt, two encodings"
        nothing = await self.engine.encode("")
        assert (nothing.count, nothing.text) == (0, ""), "empty text has tokens"
        for empty in ("", "  \n"):
            try:
                await self.engine.encode_prompt(empty)
            except PromptError:
                continue
            raise AssertionError(f"the empty prompt {empty!r} was not refused with a PromptError")

    async def deltas(self) -> None:
        before = self.engine.load().sampled_tokens
        quiet, watched = await self.alone(), await self.alone(chunk=1)
        assert quiet.count > 0, "nothing was sampled"
        counted = self.engine.load().sampled_tokens - before
        streamed = quiet.count + watched.count
        assert counted == streamed, f"load() counts {counted} tokens, the two streams {streamed}"
        await self.same(watched, quiet, "watched")

    async def limit(self) -> None:
        for most in (1, 3):
            said = await self.alone(replace(self.sampling, max_tokens=most))
            assert said.count <= most, f"{said.count} tokens with max_tokens={most}"
            assert said.finish_reason == "length" or said.eos or said.count < most, "cut short, but not by length"

    async def concurrency(self) -> None:
        alone = await self.alone()
        for said in await asyncio.gather(*(self.alone() for _ in range(8))):
            await self.same(said, alone, "beside others")

    async def groups(self) -> None:
        alone = [await self.alone(fork=fork) for fork in range(3)]
        graph = ThreadGraph()
        context = [_end(await self.root(graph))]
        nodes = [graph.add(context, path=(fork,)) for fork in range(3)]
        requests = [Request(graph, node, self.sampling, path=tuple(node.path), **self.request) for node in nodes]
        streams = self.engine.generate_group(requests)
        assert len(streams) == len(requests), "a group's streams"
        together = await asyncio.gather(*(self.read(node, s) for node, s in zip(nodes, streams, strict=True)))
        for said, expected in zip(together, alone, strict=True):
            await self.same(said, expected, "in a group")
        await self.engine.release(graph)

    async def cancelled_at_once(self) -> None:
        for yields in range(4):  # at several moments before the first token
            graph = ThreadGraph()
            context = [_end(await self.root(graph))]
            node, stream = self.start(graph, context, replace(self.sampling, max_tokens=None), chunk=1)
            for _ in range(yields):
                await asyncio.sleep(0)
            stream.cancel()
            said = await self.read(node, stream)
            assert said.finish_reason in ("cancelled", "stop", "length")
            await self.engine.release(graph)

    async def cancelled_after_a_token(self) -> None:
        graph = ThreadGraph()
        context = [_end(await self.root(graph))]
        before = self.engine.load().sampled_tokens
        node, stream = self.start(graph, context, replace(self.sampling, max_tokens=None), chunk=1)
        first = await anext(stream)
        count, ended = first.count, first.finish_reason
        stream.cancel()
        if not ended:
            count += (await self.read(node, stream)).count
        counted = self.engine.load().sampled_tokens - before
        assert counted == count, f"load() counts {counted} tokens, the stream had {count}"
        await self.engine.release(graph)

    async def cancelled_after_the_end(self) -> None:
        graph = ThreadGraph()
        node, stream = self.start(graph, [_end(await self.root(graph))], self.sampling)
        await self.read(node, stream)
        stream.cancel()
        await self.engine.release(graph)
        await self.engine.release(graph)

    async def released(self) -> None:
        graph = ThreadGraph()
        context = [_end(await self.root(graph))]
        started = [self.start(graph, context, replace(self.sampling, max_tokens=None), fork=k) for k in range(3)]
        await self.engine.release(graph)
        for node, stream in started:
            await self.read(node, stream)

    async def too_long(self) -> None:
        if self.engine.context_length is None:
            return
        try:
            await self.root(ThreadGraph(), " ".join([self.prompt] * self.engine.context_length))
        except PromptError as error:
            if str(self.engine.context_length) in str(error):
                return
            raise AssertionError(f"the refusal of a long prompt does not name the limit: {error}") from error
        raise AssertionError("a prompt longer than the context was not refused with a PromptError")

    async def decodes(self) -> None:
        """The text of a generation is that of its ids, special tokens shown or not."""
        for skip in (True, False):
            try:
                said = await self.alone(replace(self.sampling, skip_special_tokens=skip))
                text = await self.engine.decode(said.tokens, skip_special_tokens=skip)
            except CapabilityError:
                return
            assert text == said.text, f"it decodes its tokens to {text!r}, and said {said.text!r}"
            assert not said.eos or said.tokens[-1] in self.engine.eos_ids, "a sequence ended with none of eos_ids"

    async def stops(self) -> None:
        graph = ThreadGraph()
        context = [_end(await self.root(graph))]
        whole = (await self.say(graph, context, self.sampling)).text
        middle = whole[len(whole) // 2 :].split()
        if not middle:
            return
        said = await self.say(graph, context, replace(self.sampling, stop=(middle[0],)))
        assert said.matched == middle[0], f"stopped by {said.matched!r}, not {middle[0]!r}"
        assert said.finish_reason == "stop"
        assert middle[0] in said.text, "the stop string is not in the text"
        assert whole.startswith(said.text), f"with a stop it says {said.text!r}, without {whole!r}"
        await self.engine.release(graph)

    async def continues(self) -> None:
        graph = ThreadGraph()
        context = [_end(await self.root(graph))]
        whole = await self.say(graph, context, self.sampling)
        if whole.count < 4:
            return
        half = whole.count // 2
        node, stream = self.start(graph, context, replace(self.sampling, max_tokens=half))
        first = await self.read(node, stream)
        rest = await self.say(graph, [_end(node)], replace(self.sampling, max_tokens=whole.count - half))
        assert first.text + rest.text == whole.text, (
            f"in two parts it says {first.text + rest.text!r}, not {whole.text!r}"
        )
        await self.engine.release(graph)

    async def forced_text(self) -> None:
        """A recompute join: what was sampled, written again as forced tokens, is gone on from in the same way."""
        graph = ThreadGraph()
        context = [_end(await self.root(graph))]
        whole = await self.say(graph, context, self.sampling)
        if whole.count < 4:
            return
        half = whole.count // 2
        first = await self.say(graph, context, replace(self.sampling, max_tokens=half))
        node = graph.add(context, spans=[Span("forced", first.tokens, first.count, first.text)])
        after = replace(self.sampling, max_tokens=whole.count - half)
        rest = await self.read(node, self.engine.generate(Request(graph, node, after, **self.request)))
        await self.same(_joined(first, rest), whole, "after forced text")
        forced = await self.engine.encode(self.prompt)
        assert (forced.origin, forced.text) == ("forced", self.prompt), "forced text's origin and text"
        await self.engine.release(graph)

    async def logprobs(self) -> None:
        graph = ThreadGraph()
        context = [_end(await self.root(graph))]
        for temperature in (0.0, 0.7, 1.0):
            settings = replace(self.sampling, temperature=temperature, logprobs=True)
            node, stream = self.start(graph, context, settings)
            said = await self.read(node, stream)
            assert len(said.logprobs) == said.count, f"{len(said.logprobs)} log-probabilities of {said.count} tokens"
            assert all(value <= 1e-6 for value in said.logprobs), "a probability above 1"
            if Capability.SCORE in self.engine.capabilities:
                _close(said.logprobs, await self.engine.score(graph, node), f"at temperature {temperature}")
        await self.engine.release(graph)

    async def top_logprobs(self) -> None:
        graph = ThreadGraph()
        context = [_end(await self.root(graph))]
        for temperature in (0.0, 0.7):
            settings = replace(self.sampling, temperature=temperature, top_logprobs=2)
            said = await self.say(graph, context, settings)
            assert len(said.top) == said.count, f"{len(said.top)} alternatives of {said.count} tokens"
            for token, value, top in zip(said.tokens, said.logprobs, said.top, strict=True):
                assert len(top) >= 2, "fewer alternatives than asked for"
                assert value <= max(top.values()) + _SCORE_TOLERANCE, "likelier than the likeliest"
                assert token not in top or abs(top[token] - value) < _SCORE_TOLERANCE, "two values for one token"
        await self.engine.release(graph)

    async def scores(self) -> None:
        graph = ThreadGraph()
        root = await self.root(graph)
        node = graph.add([_end(root)], spans=[await self.engine.encode(self.prompt)])
        scored = await self.engine.score(graph, node)
        assert len(scored) == len(node), f"{len(scored)} scores of {len(node)} tokens"
        assert all(value <= 1e-6 for value in scored), "a probability above 1"
        assert (await self.engine.score(graph, root))[0] == 0, "the first token of a root is predicted by nothing"
        await self.engine.release(graph)

    async def seeds(self) -> None:
        graph = ThreadGraph()
        context = [_end(await self.root(graph))]
        hot = replace(self.sampling, temperature=3.0, ignore_eos=True)
        one, same = [await self.say(graph, context, hot, fork=1) for _ in range(2)]
        other = await self.say(graph, context, hot, fork=2)
        assert one.tokens == same.tokens, "one seed, path and position, two texts"
        assert one.tokens != other.tokens, "two fork paths, one text"
        await self.engine.release(graph)

    async def cut(self) -> None:
        graph = ThreadGraph()
        context = [_end(await self.root(graph))]
        node, stream = self.start(graph, context, self.sampling)
        whole = await self.read(node, stream)
        if whole.count < 4:
            return
        at = whole.count // 2
        decoded = (await self.engine.decode(whole.tokens[:at])).rstrip("\ufffd").strip()  # half a character, perhaps
        assert whole.text.strip().startswith(decoded), f"decode() makes {decoded!r} of the start of {whole.text!r}"
        rest = await self.say(graph, [Edge(node.id, at)], replace(self.sampling, max_tokens=whole.count - at))
        assert whole.text.endswith(rest.text), (
            f"from token {at} on it says {rest.text!r}, not the end of {whole.text!r}"
        )
        await self.engine.release(graph)

    async def penalties(self) -> None:
        """Whatever the tokens were drawn from, their log-probabilities are the model's own."""
        graph = ThreadGraph()
        context = [_end(await self.root(graph))]
        penalised = replace(self.sampling, frequency_penalty=1.5, presence_penalty=0.5, repetition_penalty=1.5)
        for temperature in (0.0, 0.7, 1.0):
            node, stream = self.start(graph, context, replace(penalised, temperature=temperature, logprobs=True))
            said = await self.read(node, stream)
            assert len(said.logprobs) == said.count, f"{len(said.logprobs)} log-probabilities of {said.count} tokens"
            _close(said.logprobs, await self.engine.score(graph, node), f"with penalties at temperature {temperature}")
        await self.engine.release(graph)

    async def logit_bias(self) -> None:
        """A token that is banned is not said."""
        said = await self.alone()
        if not said.tokens:
            return
        banned = await self.alone(replace(self.sampling, logit_bias=((said.tokens[0], -math.inf),)))
        assert said.tokens[0] not in banned.tokens, f"it says token {said.tokens[0]}, which is banned"

    async def grammar(self) -> None:
        """What it says anyway, as a regular expression, is what it says, and then it stops."""
        text = (await self.alone(replace(self.sampling, max_tokens=min(6, self.sampling.max_tokens or 6)))).text
        pattern = re.sub(r"[\\^$.|?*+()\[\]{}/-]", r"\\\g<0>", text)
        if not text or "\ufffd" in text:
            return
        try:
            said = await self.alone(replace(self.sampling, regex=pattern, temperature=1.0))
        except OrchestraError:
            return  # servers' libraries do not know every tokenizer
        assert said.text == text, f"with a regex that only {text!r} matches it says {said.text!r}"
        assert said.finish_reason == "stop", f"its grammar is satisfied, and it ends by {said.finish_reason!r}"


def _end(node: Node) -> Edge:
    return Edge(node.id, len(node))


def _joined(first: Delta, rest: Delta) -> Delta:
    return Delta(first.tokens + rest.tokens, first.count + rest.count, first.text + rest.text)


def _left(load: Load) -> tuple[int, int]:
    return load.requests, load.cached_bytes


def _close(reported: list[float], scored: list[float], where: str) -> None:
    worst = max((abs(a - b) for a, b in zip(reported, scored, strict=True)), default=0.0)
    assert worst < _SCORE_TOLERANCE, f"{where} reported and scored log-probabilities differ by {worst:.2g}"
