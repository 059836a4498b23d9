"""A running SGLang server through its native API: token ids in and out.

Facts about that API that this file rests on (SGLang 0.5.20): streams are cumulative unless the server was started with
`--incremental-streaming-output`; `/abort_request` answers the aborted stream with what was decoded; equal samples
asked for by `n` get request ids of the server's own, so they can only be aborted together, by closing the connection;
log-probabilities of sampled tokens are those of softmax(logits / temperature) unless the server was started with
SGLANG_RETURN_ORIGINAL_LOGPROB=1, and under penalties, bias and grammar in either case; those of given tokens are
always the model's own. Penalties count the tokens of one request, and its grammar begins with the first of them.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from orchestra.errors import CapabilityError, EngineError, OrchestraError, PromptError
from orchestra.extras import require
from orchestra.graph import Node, Span, ThreadGraph
from orchestra.runtime.ends import Ends
from orchestra.runtime.engine import Capability, Delta, Prompt, Request, Sampling
from orchestra.runtime.http import Fault, Refused, Server, decode, events, settle
from orchestra.runtime.local.detokenize import cut
from orchestra.runtime.remote import Call, RemoteEngine, Sample
from orchestra.runtime.sglang_about import About, about
from orchestra.runtime.sglang_weights import ServerWeights
from orchestra.runtime.sglang_wire import Reading, alternatives, number, settings
from orchestra.runtime.tokens import Contexts, LocalTokens, ServerTokens, Tokens, last_ids, listed

WHOLE_TOKENS = 1024  # what nobody watches and is no longer than this is asked for whole, the rest as a stream: a long
# generation should not look like a silent server, nor be lost when its connection breaks
QUIET_INTERVAL = 256  # tokens between signs of life of a generation that nobody watches
_WATCHED_CHUNKS = 256  # most chunks of a cumulative stream: its bytes grow with tokens x chunks
_NO_LIMIT = 2**31 - 1
_NEIGHBOURS = 8  # ids before a text that may change how its first characters are decoded


class Full(Exception):
    """A thread has grown as far as it may: it ends there by `length`, and nothing is wrong."""


class SGLangEngine(RemoteEngine):
    """Generates on one SGLang server, or on several behind its router.

    Args:
        name: as errors and manifests say it.
        server: the way to it.
        model: what the server must serve; empty for anything.
        group: most samples of one request (`n`); 1 sends each by itself.
        interval: tokens between two chunks of a watched stream; 0: one where streams are incremental, else more for
            longer generations.
        tokenizer: folder or Hugging Face id of a tokenizer to use here; empty: the server encodes.
    """

    capabilities = frozenset(
        {Capability.CONTINUE, Capability.CUT, Capability.LOGPROBS, Capability.TOP_LOGPROBS, Capability.SCORE}
        | {Capability.TEMPERED}
        | {Capability.PENALTIES, Capability.LOGIT_BIAS, Capability.GRAMMAR}
    )

    def __init__(
        self,
        name: str,
        server: Server,
        *,
        model: str = "",
        group: int = 256,
        interval: int = 0,
        tokenizer: str = "",
    ) -> None:
        super().__init__(name, server)
        self.group = group
        self._model, self._interval = model, interval
        self._server_tokens = ServerTokens(server)
        self._tokens: Tokens = self._server_tokens
        self._worker: Server | None = None  # behind a router
        self._tokenizer = tokenizer
        self._incremental = False
        self._longest_input: int | None = None  # a few tokens below the context
        self._facts: dict[str, Any] = {"engine": "sglang"}
        self._contexts = Contexts(name, server)
        self._ends = Ends(partial(self._decode, skip_special=False))
        self._weights = ServerWeights(server)
        self._tempered: bool | None = None  # whether reported log-probabilities are at the sampling temperature

    # -- meeting the server ------------------------------------------------------------------------------------------

    async def _meet(self) -> None:
        said = await about(self.server, self.name, self._model)
        facts = said.facts
        self._tokens = self._server_tokens = ServerTokens(self.server, model=said.model)
        if said.workers:
            self.group = 1  # samples of one request would all go to one server
            said = await self._meet_worker(said)
            facts = said.facts | {"workers": len(said.workers)}
        self.context_length, self._longest_input = said.context, said.longest
        self._incremental = said.incremental
        self._ends.know(said.ends)
        self.openings = said.openings
        if self._tokenizer:
            require("transformers", what="a tokenizer in this process", extra="local")
            tokens = await asyncio.to_thread(LocalTokens, self._tokenizer, self.context_length or _NO_LIMIT)
            self._tokens = tokens
            self._ends.know([] if tokens.eos is None else [tokens.eos])
        self._facts = facts

    async def _meet_worker(self, router: About) -> About:
        """Ask a server behind a router: the router knows no limits, and encodes without special tokens or template."""
        for url in router.workers:
            worker = Server(url, self.server.limits, self.server.headers)
            try:
                said = await about(worker, url, router.model)
            except (Fault, OrchestraError):
                await worker.close()
                continue
            self._worker = worker
            self._server_tokens = ServerTokens(worker, model=said.model)
            self._tokens = self._server_tokens
            return replace(said, workers=router.workers)
        if not self._tokenizer:
            raise EngineError(
                f"{self.name} is a router, and none of its {len(router.workers)} servers can be reached from here to "
                "encode prompts; name a tokenizer to use here: tokenizer=PATH_OR_ID"
            )
        return router

    async def close(self) -> None:
        """See `Engine.close`."""
        await super().close()
        if self._worker is not None:
            await self._worker.close()

    def facts(self) -> dict[str, Any]:
        """See `Engine.facts`."""
        return dict(self._facts)

    # -- tokens ------------------------------------------------------------------------------------------------------

    async def encode_prompt(self, prompt: Prompt, **template: Any) -> Span:
        """See `Engine.encode_prompt`."""
        return await self._encoded(self._tokens.prompt(prompt, template), self._longest_input or self.context_length)

    async def encode(self, text: str) -> Span:
        """See `Engine.encode`."""
        return await self._encoded(self._tokens.forced(text), None) if text else Span("forced")

    async def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """See `Engine.decode`."""
        await self.open()
        said = [token for token in ids if token not in self._ends.ids]
        work = partial(self._tokens.continuation, said, skip_special=skip_special_tokens)
        return await self.server.insist(work)

    @property
    def eos_ids(self) -> frozenset[int]:
        """See `Engine.eos_ids`: of a model folder that is here too, or of `tokenizer`; else learned."""
        return self._ends.ids

    async def _encoded(self, work: Any, limit: int | None) -> Span:
        await self.open()
        try:
            span: Span = await work
        except Refused as refusal:
            raise PromptError(f"{self.name} refuses the prompt: {refusal}") from refusal
        self._contexts.saw(span.tokens)
        if limit is not None and span.count > limit:
            raise self._too_long(span.count)
        return span

    async def update_weights(self, weights: Mapping[str, Any]) -> None:
        """See `Engine.update_weights`: through a folder for temporary files, which the server must see, too."""
        await self.open()
        if self._worker is not None:
            raise CapabilityError(f"{self.name} is a router; its servers cannot be given new weights together")
        await self._weights.give(weights, self.name)

    async def weights_kept(self) -> bool:
        """See `Engine.weights_kept`."""
        return await self._weights.kept()

    async def release(self, graph: ThreadGraph) -> None:
        """See `Engine.release`."""
        await super().release(graph)
        self._contexts.forget(graph)

    # -- generation --------------------------------------------------------------------------------------------------

    async def _try(self, call: Call) -> None:
        request = call.samples[0].request
        sampling = request.sampling
        wants_raw = _wants_raw(sampling)
        if wants_raw and not sampling.needs and self._tempered is None:
            self._tempered = await self._reports_tempered(request)
        try:
            body, whole = await self._body(call)
        except Full:
            for sample in call.samples:
                last = Delta(finish_reason="length")
                if sample.resumed:
                    await self._retell(sample, last)
                    if wants_raw and self._misreports(sampling):
                        await self._add_raw(sample, last)
                self._give(sample, last)
            return
        reading = call.state = Reading(call.samples, self._incremental)
        try:
            async with self.server.request("POST", "/generate", body) as response:
                if whole:
                    await self._take(reading.read_whole(decode(await response.read())), wants_raw)
                    return
                async for batch in events(response):
                    await self._take(reading.read(batch), wants_raw)
                    if not call.live:
                        await settle(response)
                        return
        finally:
            for sample in call.live:
                self._keep(call, sample)

    async def _take(self, found: Iterable[tuple[Sample, Delta]], wants_raw: bool) -> None:
        for sample, delta in found:
            await self._ends.hide(sample, delta)
            if sample.resumed:
                await self._retell(sample, delta)
            if wants_raw and self._misreports(sample.request.sampling):
                await self._add_raw(sample, delta)
            elif wants_raw:
                delta.tempered = []
            self._give(sample, delta)

    def _give(self, sample: Sample, delta: Delta) -> None:
        if not sample.request.sampling.tempered:
            delta.tempered = []
        self._contexts.saw(delta.tokens)
        super()._give(sample, delta)

    async def _body(self, call: Call) -> tuple[bytes, bool]:
        """The request, and whether it asks for a whole answer rather than a stream.

        Raises:
            Full: nothing is left to ask for.
        """
        request = call.samples[0].request
        sampling = request.sampling
        ids, count = await self._contexts.before(request.graph, request.node)
        if not count:
            raise PromptError("nothing to go on from: the prompt is empty")
        done = call.samples[0].tokens
        room = self._room(request, count, len(done))
        most = min(sampling.max_tokens or room, room)
        if done:  # a broken stream goes on where it stopped
            ids, most = f"{ids},{listed(tuple(done))}", most - len(done)
            if most < 1:  # all had come when the connection broke, but not that it was all
                raise Full
        if request.chunk == 0:
            interval = QUIET_INTERVAL
        else:
            interval = self._interval or max(request.chunk, 1 if self._incremental else most // _WATCHED_CHUNKS)
        n, whole = len(call.samples), request.chunk == 0 and most <= WHOLE_TOKENS
        # As a string, the id of several samples leaves n - 1 entries behind in the server's tables, for ever.
        rid = f'"{call.rid}"' if n == 1 else f'["{call.rid}"]'
        body = (
            f'{{"rid":{rid},"input_ids":[{ids}],"stream":{"false" if whole else "true"},{settings(sampling)}'
            f'"max_new_tokens":{most},"stream_interval":{interval},"n":{n}}}}}'
        )
        return body.encode(), whole

    def _room(self, request: Request, count: int, done: int) -> int:
        """How many tokens may come after `count`, of which `done` have come.

        Raises:
            PromptError: none, because of the prompt.
            Full: none, because the thread has grown so long.
        """
        limit = self.context_length or _NO_LIMIT
        if count < limit and count + done <= (self._longest_input or limit):
            return limit - count
        if done or any(node.count("sampled") for node in request.graph.nodes):
            raise Full
        raise self._too_long(count)

    def _too_long(self, count: int) -> PromptError:
        most, context = self._longest_input, self.context_length
        takes = f"takes {most} of its context of {context}" if most else f"has room for {context}, with the answer"
        return PromptError(f"the prompt has {count} tokens; {self.name} {takes}")

    def _resumable(self, sample: Sample) -> bool:
        return not sample.request.sampling.remembers  # what has come would be prompt, and forgotten

    def _keep(self, call: Call, sample: Sample) -> None:
        reading: Reading | None = call.state
        if reading is not None and (delta := reading.rest(sample)) is not None:
            self._ends.strip(sample, delta)
            if sample.resumed:
                delta.text = ""  # told anew when it goes on
            if _wants_raw(sample.request.sampling):
                if self._misreports(sample.request.sampling):
                    delta.logprobs, delta.top = [], []  # told at the end
                else:
                    delta.tempered = []
            self._give(sample, delta)

    async def _retell(self, sample: Sample, delta: Delta) -> None:
        """Text and stop strings of a generation that was broken and goes on, from its ids.

        The server sees what came before the break as prompt: it decodes no character across it, and finds no stop.
        """
        request, sampling = sample.request, sample.request.sampling
        before = last_ids(request.graph, request.node, _NEIGHBOURS)
        if sampling.stop and delta.count and not (delta.finish_reason == "stop" and delta.matched is not None):
            await self._find_stop(sample, delta, before)
        said = [token for token in sample.tokens + delta.tokens if token not in self._ends.ids]
        whole, start = await self._decode([before + said, before], skip_special=sampling.skip_special_tokens)
        text = whole[len(start) :]
        if isinstance(delta.matched, str):
            text = cut("", text, delta.matched)
        if not delta.finish_reason:
            text = text.rstrip("\ufffd")  # a character that is not complete yet
        delta.text = text[len(sample.text) :]

    async def _find_stop(self, sample: Sample, delta: Delta, before: list[int]) -> None:
        """End a delta at the first stop string that it completes."""
        told = before + sample.tokens
        new = delta.tokens[: len(delta.tokens) - delta.eos]
        whole, start = await self._decode([told + new, before], skip_special=False)
        crossing = [stop for stop in sample.request.sampling.stop if stop in whole[len(start) :]]
        if not crossing:
            return
        texts = await self._decode([told + new[:k] for k in range(1, len(new) + 1)], skip_special=False)
        found = ((k, stop) for k, text in enumerate(texts, 1) for stop in crossing if stop in text[len(start) :])
        keep, stop = next(found)
        for values in (delta.tokens, delta.logprobs, delta.tempered, delta.top):
            del values[keep:]
        delta.count, delta.finish_reason, delta.matched, delta.eos = keep, "stop", stop, False

    async def _decode(self, lists: list[list[int]], *, skip_special: bool) -> list[str]:
        return await self.server.insist(lambda: self._tokens.decode(lists, skip_special=skip_special))

    # -- log-probabilities -------------------------------------------------------------------------------------------

    async def _reports_tempered(self, request: Request) -> bool:
        """Whether the server reports log-probabilities at the sampling temperature: do they flatten with it?"""
        ids, _ = await self._contexts.before(request.graph, request.node)
        gaps: list[float] = []
        for temperature in (1.0, 4.0):
            meta = await self._meta(
                f'{{"input_ids":[{ids}],"return_logprob":true,"top_logprobs_num":2,'
                f'"sampling_params":{{"temperature":{temperature},"max_new_tokens":1,"ignore_eos":true}}}}'
            )
            (first, *_), (second, *_) = meta["output_top_logprobs"][0]
            gaps.append(first - second)
        return abs(gaps[1] - gaps[0] / 4) < abs(gaps[1] - gaps[0])

    def _misreports(self, sampling: Sampling) -> bool:
        """Whether the log-probabilities that the server reports are not the model's own."""
        return bool(sampling.needs or self._tempered)

    async def _add_raw(self, sample: Sample, delta: Delta) -> None:
        """Put the model's own log-probabilities, from a scoring pass, where the server reported others."""
        delta.logprobs, delta.top = [], []
        if sample.request.sampling.needs:
            delta.tempered = []
        if delta.finish_reason in ("stop", "length"):
            request = sample.request
            ids, count = await self._contexts.before(request.graph, request.node)
            ids = f"{ids},{listed(tuple(sample.tokens + delta.tokens))}"
            delta.logprobs, delta.top = await self._score(ids, count, request.sampling.top_logprobs)

    async def score(self, graph: ThreadGraph, node: Node) -> list[float]:
        """See `Engine.score`."""
        await self.open()
        ids, count = await self._contexts.before(graph, node, whole=True)
        if not len(node):
            return []
        if self.context_length is not None and count > self.context_length:
            raise PromptError(f"{count} tokens to score; {self.name} has room for {self.context_length}")
        async with self.server.gate:
            scores, _ = await self._score(ids, count - len(node), 0)
        return scores

    async def _score(self, ids: str, start: int, top: int) -> tuple[list[float], list[Mapping[int, float]]]:
        """The model's log-probabilities of the tokens from `start` on; 0 for a first token that nothing predicts."""
        meta = await self._meta(
            f'{{"input_ids":[{ids}],"return_logprob":true,"logprob_start_len":{max(0, start - 1)},'
            f'"top_logprobs_num":{top},"sampling_params":{{"temperature":0,"max_new_tokens":0}}}}'
        )
        skip = 1 if start else 0
        try:
            scores = [number(entry[0]) for entry in meta["input_token_logprobs"][skip:]]
            if not start:
                scores[0] = 0.0
            tops = [alternatives(entries or ()) for entries in meta["input_top_logprobs"][skip:]] if top else []
        except (KeyError, TypeError, IndexError) as error:
            raise EngineError(f"{self.name} sent scores of another shape: {str(meta)[:80]}") from error
        return scores, tops

    async def _meta(self, body: str) -> Any:
        """`meta_info` of a generation that is asked for whole."""

        async def once() -> Any:
            async with self.server.request("POST", "/generate", body.encode()) as response:
                answer = decode(await response.read())
            if not isinstance(answer, dict) or not isinstance(answer.get("meta_info"), dict):
                raise Fault(f"it sent an answer of another shape: {str(answer)[:80]}")
            return answer["meta_info"]

        try:
            return await self.server.insist(once)
        except Refused as refusal:
            raise self._refusal(refusal) from refusal

    # -- ends --------------------------------------------------------------------------------------------------------

    async def _abort(self, rid: str) -> None:
        async with self.server.request("POST", "/abort_request", json.dumps({"rid": rid}).encode()):
            pass

    def _refusal(self, refusal: Refused) -> OrchestraError:
        text = str(refusal)
        if refusal.status in (401, 403):
            return EngineError(f"{self.name} refuses the key: {text}; set SGLANG_API_KEY, or key_file= in the URL")
        if any(words in text for words in ("context length", "longer than", "maximum allowed length", "vocab")):
            return PromptError(f"{self.name}: {text}")
        return super()._refusal(refusal)


def _wants_raw(sampling: Sampling) -> bool:
    """Whether log-probabilities are asked for that a server may report as they were after temperature and penalties."""
    changed = sampling.temperature not in (0.0, 1.0) or bool(sampling.needs)
    return (sampling.logprobs or sampling.top_logprobs > 0) and changed
