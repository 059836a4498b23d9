"""A running SGLang server through its native API: token ids in and out.

Facts about that API that this file rests on (SGLang 0.5.20): streams are cumulative unless the server was started with
`--incremental-streaming-output`; `/abort_request` answers the aborted stream with what was decoded; equal samples
asked for by `n` get request ids of the server's own, so they can only be aborted together, by closing the connection;
log-probabilities of sampled tokens are those of softmax(logits / temperature) unless the server was started with
SGLANG_RETURN_ORIGINAL_LOGPROB=1, those of given tokens are always the model's own.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from orchestra.errors import EngineError, OrchestraError, PromptError, UsageError
from orchestra.extras import require
from orchestra.graph import Node, Span, ThreadGraph
from orchestra.runtime.engine import Capability, Delta, Prompt, Request, Sampling
from orchestra.runtime.http import Fault, Refused, Server, decode, events
from orchestra.runtime.remote import Call, RemoteEngine, Sample
from orchestra.runtime.tokens import LocalTokens, ServerTokens, Tokens

QUIET_INTERVAL = 256  # tokens between signs of life of a generation that nobody watches
_WATCHED_CHUNKS = 256  # most chunks of a cumulative stream: its bytes grow with tokens x chunks
_LARGE_ID = 2**31 - 1


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
        {Capability.CONTINUE, Capability.LOGPROBS, Capability.TOP_LOGPROBS, Capability.SCORE, Capability.CUT}
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
        self._tokenizer = tokenizer
        self._incremental = False
        self._facts: dict[str, Any] = {}
        self._vocabulary: int | None = None
        self._highest = -1  # token id known to be in the vocabulary
        self._tempered: bool | None = None  # whether reported log-probabilities are at the sampling temperature
        self._contexts: dict[int, dict[tuple[int, int], tuple[str, int]]] = {}  # by graph, then by edge

    # -- meeting the server ------------------------------------------------------------------------------------------

    async def _meet(self) -> None:
        models = await self.server.ask("GET", "/v1/models")
        try:
            served = {str(model["id"]): model for model in models["data"]}
            chosen = served[self._model] if self._model in served else next(iter(served.values()))
        except (KeyError, TypeError, StopIteration) as error:
            raise EngineError(f"{self.name} does not answer like an SGLang server") from error
        if self._model and self._model not in served:
            raise UsageError(f"{self.name} serves {', '.join(served)}, not {self._model!r}")
        info = await self._optional("/model_info", "/get_model_info")
        state = await self._optional("/server_info", "/get_server_info")
        if not info and not state:
            raise UsageError(
                f"{self.name} is no SGLang server; an OpenAI-compatible one is openai://{self.server.where}/v1"
            )
        limits = [chosen.get("max_model_len"), state.get("max_total_num_tokens")]
        self.context_length = min((int(limit) for limit in limits if limit), default=None)
        self._incremental = bool(state.get("incremental_streaming_output"))
        if self._tokenizer:
            require("transformers", what="a tokenizer in this process", extra="local")
            self._tokens = await asyncio.to_thread(LocalTokens, self._tokenizer, self.context_length or _LARGE_ID)
        self._facts = {
            "engine": "sglang",
            "model": re.sub(r"^.*/(?=.)", "", str(chosen["id"])) if str(chosen["id"]).startswith("/") else chosen["id"],
            "architecture": info.get("model_type"),
            "weight_version": info.get("weight_version"),
            "context_length": self.context_length,
            "dtype": state.get("dtype"),
            "sglang": state.get("version"),
            "attention": state.get("attention_backend"),
            "tensor_parallel": state.get("tp_size"),
            "data_parallel": state.get("dp_size"),
        }

    async def _optional(self, *paths: str) -> dict[str, Any]:
        """What the first of these paths that exists says; older servers and the router lack some."""
        for path in paths:
            try:
                found = await self.server.ask("GET", path)
            except Refused as refusal:
                if refusal.status in (401, 403):
                    raise
                continue
            return found if isinstance(found, dict) else {}
        return {}

    def facts(self) -> dict[str, Any]:
        """See `Engine.facts`."""
        return {key: value for key, value in (self._facts or {"engine": "sglang"}).items() if value is not None}

    # -- tokens ------------------------------------------------------------------------------------------------------

    async def encode_prompt(self, prompt: Prompt, **template: Any) -> Span:
        """See `Engine.encode_prompt`."""
        return await self._encoded(self._tokens.prompt(prompt, template), self.context_length)

    async def encode(self, text: str) -> Span:
        """See `Engine.encode`."""
        return await self._encoded(self._tokens.forced(text), None) if text else Span("forced")

    async def _encoded(self, work: Any, limit: int | None) -> Span:
        await self.open()
        try:
            span: Span = await work
        except Refused as refusal:
            raise PromptError(f"{self.name} refuses the prompt: {refusal}") from refusal
        self._highest = max(self._highest, max(span.tokens, default=-1))
        if limit is not None and span.count > limit:
            raise PromptError(f"the prompt has {span.count} tokens; {self.name} has room for {limit}")
        return span

    def _context(self, graph: ThreadGraph, node: Node) -> tuple[str, int]:
        """Token ids before the sampled ones, as the inside of a JSON list, and their number. Kept for forks."""
        if not node.context:
            return _listed(node.tokens), len(node.tokens)
        edge = node.context[0]
        known = self._contexts.setdefault(id(graph), {})
        before = known.get(edge)
        if before is None:
            if any(len(graph.nodes[n].tokens) < length for n, length in graph.lineage(*edge)):
                raise EngineError(
                    f"{self.name} needs the token ids of the whole context; another engine wrote part of it"
                )
            ids = graph.path_tokens(*edge)
            self._check_ids(ids)
            before = known[edge] = (_listed(ids), len(ids))
        own = node.tokens
        if not own:
            return before
        self._check_ids(own)
        return f"{before[0]},{_listed(own)}" if before[0] else _listed(own), before[1] + len(own)

    def _check_ids(self, ids: Sequence[int]) -> None:
        """Refuse ids outside the vocabulary: they end an SGLang server."""
        if ids and self._vocabulary is not None and not (min(ids) >= 0 and max(ids) < self._vocabulary):
            wrong = next(i for i in ids if not 0 <= i < self._vocabulary)
            raise PromptError(f"token id {wrong} is not in the vocabulary of {self.name}: 0..{self._vocabulary - 1}")

    async def _learn_vocabulary(self, ids: Iterable[int]) -> None:
        """Ask for the size of the vocabulary before ids are used that neither tokenizer nor server has given us."""
        if self._vocabulary is not None or max(ids, default=-1) <= self._highest:
            return
        probe = {
            "input_ids": [0],
            "return_logprob": True,
            "token_ids_logprob": [_LARGE_ID],
            "sampling_params": {"max_new_tokens": 1},
        }
        try:
            await self.server.insist(lambda: self.server.ask("POST", "/generate", probe))
        except Refused as refusal:  # it names the valid range
            if found := re.search(r"\[0, (\d+)\)", str(refusal)):
                self._vocabulary = int(found[1])
        if self._vocabulary is None:
            self._vocabulary = _LARGE_ID  # a server that does not say it checks them itself, or nobody can

    async def release(self, graph: ThreadGraph) -> None:
        """See `Engine.release`."""
        await super().release(graph)
        self._contexts.pop(id(graph), None)

    # -- generation --------------------------------------------------------------------------------------------------

    async def _try(self, call: Call) -> None:
        request = call.samples[0].request
        await self._learn_vocabulary(request.node.tokens)
        sampling = request.sampling
        wants_raw = (sampling.logprobs or sampling.top_logprobs > 0) and sampling.temperature not in (0.0, 1.0)
        if wants_raw and self._tempered is None:
            self._tempered = await self._reports_tempered(request)
        call.state = _Reading(call.samples)
        try:
            async with self.server.request("POST", "/generate", self._body(call)) as response:
                async for batch in events(response):
                    for sample, delta in self._read(call, batch):
                        if sample.resumed:
                            await self._retell(sample, delta)
                        if wants_raw and self._tempered:
                            await self._add_raw(sample, delta)
                        self._give(sample, delta)
                    if not call.live:
                        return
        finally:
            for sample in call.live:
                self._keep(call, sample)

    def _resumable(self, sample: Sample) -> bool:
        return True

    def _body(self, call: Call) -> bytes:
        request = call.samples[0].request
        sampling = request.sampling
        listed, count = self._context(request.graph, request.node)
        if not count:
            raise PromptError("nothing to go on from: the prompt is empty")
        room = _LARGE_ID if self.context_length is None else self.context_length - count
        if room < 1:
            raise PromptError(
                f"the prompt has {count} tokens; with the answer, {self.name} has room for {self.context_length}"
            )
        done = call.samples[0].tokens
        most = min(sampling.max_tokens or room, room) - len(done)
        if done:  # a broken stream goes on where it stopped
            listed = f"{listed},{_listed(done)}"
        if request.chunk == 0:
            interval = QUIET_INTERVAL
        else:
            fit = 1 if self._incremental else most // _WATCHED_CHUNKS
            interval = self._interval or max(request.chunk, fit)
        n = len(call.samples)
        return (
            f'{{"rid":"{call.rid}","input_ids":[{listed}],"stream":true,{_settings(sampling)}'
            f'"max_new_tokens":{most},"stream_interval":{interval},"n":{n}}}}}'
        ).encode()

    def _read(self, call: Call, batch: list[bytes]) -> Iterable[tuple[Sample, Delta]]:
        """What a batch of events adds, sample by sample."""
        reading: _Reading = call.state
        if not self._incremental:
            # Streams are cumulative: only the last event of each sample counts, and if nobody watches, only the end.
            latest: dict[int, bytes] = {}
            for event in batch:
                index = _index(event) if len(call.samples) > 1 else 0
                latest[index] = event
                if call.samples[0].request.chunk == 0 and _UNFINISHED in event:
                    reading.unread[index] = latest.pop(index)
            pairs: Iterable[tuple[int, bytes]] = latest.items()
        else:
            pairs = ((_index(event) if len(call.samples) > 1 else 0, event) for event in batch)
        for index, event in pairs:
            if not 0 <= index < len(call.samples):
                raise Fault(f"it sent sample {index} of {len(call.samples)}")
            sample = call.samples[index]
            if not sample.ended:
                reading.unread.pop(index, None)
                yield sample, self._delta(call, index, decode(event))

    def _delta(self, call: Call, index: int, event: Any) -> Delta:
        """What an event adds to what came before it in this try."""
        if isinstance(event, dict) and "error" in event:
            _raise(event["error"])
        reading: _Reading = call.state
        sample = call.samples[index]
        try:
            meta, ids, text = event["meta_info"], event["output_ids"], event["text"]
            reason, count = meta["finish_reason"], meta["completion_tokens"]
            seen, shown = reading.seen[index], reading.shown[index]
            cumulative = len(ids) == count
            delta = Delta(ids[seen:] if cumulative else ids, count - seen, text[shown:] if cumulative else text)
            reading.seen[index] = count
            reading.shown[index] = len(text) if cumulative else shown + len(text)
            if len(delta.tokens) != delta.count or not isinstance(delta.text, str):
                raise ValueError
            if "output_token_logprobs" in meta:
                _add_logprobs(delta, meta, sample.request.sampling)
            if not sample.count and not seen:
                delta.cached_tokens = meta.get("cached_tokens") or 0
            if reason is not None:
                self._finish(sample, delta, reason)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise Fault(f"it sent an answer of another shape: {str(event)[:80]}") from error
        return delta

    def _finish(self, sample: Sample, delta: Delta, reason: Mapping[str, Any]) -> None:
        """Set why it ended.

        Raises:
            Fault: the server ended it for reasons of its own; what had come is kept.
        """
        kind, matched = reason["type"], reason.get("matched")
        if kind == "abort":
            if not sample.cancelled:
                self._give(sample, delta)
                _raise({"code": reason.get("status_code") or 503, "message": f"aborted: {reason.get('message')}"})
            kind = "cancelled"
        elif kind == "stop" and isinstance(matched, int) and matched not in sample.request.sampling.stop_ids:
            delta.eos, matched = True, None
        delta.finish_reason = kind
        delta.matched = matched if kind == "stop" else None

    def _keep(self, call: Call, sample: Sample) -> None:
        reading: _Reading | None = call.state
        index = call.samples.index(sample)
        if reading is None or (event := reading.unread.pop(index, None)) is None:
            return
        try:
            delta = self._delta(call, index, decode(event))
        except (Fault, OrchestraError):
            return
        if sample.resumed:
            delta.text = ""  # told anew when it goes on
        if not delta.finish_reason:
            self._give(sample, delta)

    async def _retell(self, sample: Sample, delta: Delta) -> None:
        """Text and stop strings of a generation that was broken and goes on, from its ids.

        The server sees what came before the break as prompt: it decodes no character across it, and finds no stop.
        """
        request = sample.request
        before = _last_ids(request, 8)
        ids = sample.tokens + delta.tokens
        whole, start = await self._decode([before + ids, before])
        text = whole[len(start) :]
        found = [(at + len(stop), stop) for stop in request.sampling.stop if (at := text.find(stop)) >= 0]
        if found and not (delta.finish_reason == "stop" and delta.matched is not None):
            stop = min(found)[1]
            prefixes = [before + ids[: len(sample.tokens) + k] for k in range(1, len(delta.tokens) + 1)]
            texts = await self._decode(prefixes)
            keep = next(k for k, part in enumerate(texts, 1) if stop in part[len(start) :])
            text = texts[keep - 1][len(start) :]
            delta.tokens, delta.count, delta.logprobs = delta.tokens[:keep], keep, delta.logprobs[:keep]
            delta.tempered, delta.top = delta.tempered[:keep], delta.top[:keep]
            delta.finish_reason, delta.matched, delta.eos = "stop", stop, False
        if not delta.finish_reason:
            text = text.rstrip("\ufffd")
        delta.text = text[len(sample.text) :]

    async def _decode(self, lists: list[list[int]]) -> list[str]:
        return await self.server.insist(lambda: self._server_tokens.decode(lists))

    # -- log-probabilities -------------------------------------------------------------------------------------------

    async def _reports_tempered(self, request: Request) -> bool:
        """Whether the server reports log-probabilities at the sampling temperature: do they flatten with it?"""
        listed, _ = self._context(request.graph, request.node)
        gaps = []
        for temperature in (1.0, 4.0):
            body = (
                f'{{"input_ids":[{listed}],"return_logprob":true,"top_logprobs_num":2,'
                f'"sampling_params":{{"temperature":{temperature},"max_new_tokens":1,"ignore_eos":true}}}}'
            )
            answer = await self.server.insist(lambda body=body: self._ask_generate(body))
            first, second = answer["meta_info"]["output_top_logprobs"][0]
            gaps.append(first[0] - second[0])
        return abs(gaps[1] - gaps[0] / 4) < abs(gaps[1] - gaps[0])

    async def _ask_generate(self, body: str) -> Any:
        async with self.server.request("POST", "/generate", body.encode()) as response:
            return decode(await response.read())

    async def _add_raw(self, sample: Sample, delta: Delta) -> None:
        """Put the model's own log-probabilities, from a scoring pass, where the server reported tempered ones."""
        delta.logprobs, delta.top = [], []
        if delta.finish_reason in ("stop", "length"):
            request = sample.request
            listed, count = self._context(request.graph, request.node)
            ids = sample.tokens + delta.tokens
            scores, delta.top = await self._score(f"{listed},{_listed(ids)}", count, request.sampling.top_logprobs)
            delta.logprobs = scores

    async def score(self, graph: ThreadGraph, node: Node) -> list[float]:
        """See `Engine.score`."""
        await self.open()
        await self._learn_vocabulary(node.tokens)
        listed, count = self._context(graph, node)
        own = len(node.tokens)
        if not own:
            return []
        if self.context_length is not None and count > self.context_length:
            raise PromptError(f"{count} tokens to score; {self.name} has room for {self.context_length}")
        async with self.server.gate:
            scores, _ = await self._score(listed, count - own, 0)
        return scores

    async def _score(self, listed: str, start: int, top: int) -> tuple[list[float], list[Mapping[int, float]]]:
        """The model's log-probabilities of the tokens from `start` on; 0 for a first token that nothing predicts."""
        body = (
            f'{{"input_ids":[{listed}],"return_logprob":true,"logprob_start_len":{max(0, start - 1)},'
            f'"top_logprobs_num":{top},"sampling_params":{{"temperature":0,"max_new_tokens":0}}}}'
        )
        try:
            answer = await self.server.insist(lambda: self._ask_generate(body))
            meta = answer["meta_info"]
            skip = 1 if start else 0
            scores = [entry[0] or 0.0 for entry in meta["input_token_logprobs"][skip:]]
            tops = [_alternatives(entries or ()) for entries in (meta.get("input_top_logprobs") or ())[skip:]]
        except Refused as refusal:
            raise self._refusal(refusal) from refusal
        except (KeyError, TypeError, IndexError) as error:
            raise EngineError(f"{self.name} sent scores of another shape") from error
        return scores, tops if top else []

    # -- ends --------------------------------------------------------------------------------------------------------

    async def _abort(self, rid: str) -> None:
        async with self.server.request("POST", "/abort_request", json.dumps({"rid": rid}).encode()):
            pass

    def _refusal(self, refusal: Refused) -> OrchestraError:
        text = str(refusal)
        if refusal.status in (401, 403):
            return EngineError(f"{self.name} refuses the key: {text}; set SGLANG_API_KEY, or key_file= in the URL")
        if "context length" in text or "longer than" in text or "vocab" in text:
            return PromptError(f"{self.name}: {text}")
        return super()._refusal(refusal)


class _Reading:
    """Where one try is: per sample, tokens and characters seen, and the last event if nobody has looked at it."""

    __slots__ = ("seen", "shown", "unread")

    def __init__(self, samples: Sequence[Sample]) -> None:
        self.seen = [0] * len(samples)
        self.shown = [0] * len(samples)
        self.unread: dict[int, bytes] = {}
        for sample in samples:
            sample.resumed = sample.count > 0


_UNFINISHED = b'"finish_reason":null'


def _index(event: bytes) -> int:
    """Which sample an event is about: `"index":7}` ends it, on all servers seen; else it is looked for properly."""
    tail = event[event.rfind(b":") + 1 : -1]
    if tail.isdigit() and event.rfind(b'"index"') >= 0:
        return int(tail)
    found = decode(event)
    if isinstance(found, dict) and "error" in found:
        _raise(found["error"])
    try:
        return int(found["index"])
    except (KeyError, TypeError, ValueError) as error:
        raise Fault("it sent a sample without its index") from error


def _raise(error: Any) -> None:
    """An error inside a stream, as what it would have been as a status."""
    code = error.get("code") if isinstance(error, dict) else None
    message = str(error.get("message") if isinstance(error, dict) else error)
    if isinstance(code, int) and 400 <= code < 500 and code not in (408, 429):
        raise Refused(code, " ".join(message.split())[:500])
    raise Fault(f"error {code}: {message[:200]}")


def _listed(ids: Sequence[int]) -> str:
    return ",".join(map(str, ids))


@lru_cache(maxsize=64)
def _settings(sampling: Sampling) -> str:
    """The part of a request that is the same for all samples drawn alike; ends inside `sampling_params`."""
    params: dict[str, Any] = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p,
        "ignore_eos": sampling.ignore_eos,
        "no_stop_trim": True,
        "skip_special_tokens": True,
    }
    if sampling.top_k:
        params["top_k"] = sampling.top_k
    if sampling.stop:
        params["stop"] = list(sampling.stop)
    if sampling.stop_ids:
        params["stop_token_ids"] = list(sampling.stop_ids)
    asked = '"return_logprob":true,' if sampling.logprobs or sampling.top_logprobs else ""
    asked += f'"top_logprobs_num":{sampling.top_logprobs},' if sampling.top_logprobs else ""
    return f'{asked}"sampling_params":{json.dumps(params)[:-1]},'


def _add_logprobs(delta: Delta, meta: Mapping[str, Any], sampling: Sampling) -> None:
    """Log-probabilities of the new tokens, as the server reports them."""
    entries = meta["output_token_logprobs"]
    delta.logprobs = [entry[0] for entry in entries[len(entries) - delta.count :]]
    if sampling.temperature not in (0.0,):
        delta.tempered = list(delta.logprobs)
    if sampling.top_logprobs:
        tops = meta["output_top_logprobs"]
        delta.top = [_alternatives(top) for top in tops[len(tops) - delta.count :]]


def _alternatives(entries: Iterable[Sequence[Any]]) -> Mapping[int, float]:
    return {entry[1]: entry[0] for entry in entries}


def _last_ids(request: Request, count: int) -> list[int]:
    """The last token ids before the sampled ones."""
    ids = [token for span in request.node.spans if span.origin != "sampled" for token in span.tokens]
    for edge in request.node.context[:1]:
        ids = request.graph.path_tokens(*edge) + ids
    return ids[-count:]
