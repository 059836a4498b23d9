"""Any OpenAI-compatible server: chat and completions.

What such a server can do differs. SGLang and vLLM are recognised: they encode prompts and tell token ids, so a thread
is continued there token for token, chat or not, through the completions API. Others get text: a text prompt goes to
the completions API, which continues any text, if there is one; messages go to the chat API, where an answer that has
begun cannot be continued unless the server knows `continue_final_message` (`?continue=on`).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import orjson

from orchestra.errors import CapabilityError, EngineError, OrchestraError, PromptError, UsageError
from orchestra.graph import Node, Span, ThreadGraph
from orchestra.runtime.ends import Ends
from orchestra.runtime.engine import Capability, Delta, Message, Prompt, Request, Sampling
from orchestra.runtime.http import Fault, Refused, Server, decode, events
from orchestra.runtime.openai_wire import Reading
from orchestra.runtime.remote import Call, RemoteEngine, Sample, steering
from orchestra.runtime.tokens import Contexts, ServerTokens, listed

Flavour = Literal["sglang", "vllm", ""]

_RECOGNISED: tuple[tuple[Flavour, str], ...] = (
    ("sglang", "/server_info"),
    ("sglang", "/get_server_info"),
    ("vllm", "/version"),
)
_WHOLE_TOKENS = 1024  # answers that nobody watches and that are no longer than this are asked for whole
_ALL_TOKENS = 4096  # of a completion without limit, on a server that does not say how long its context is
_LEAST_BIAS = -100.0  # the API's own
_CHARACTERS_A_TOKEN = 4  # an estimate, for text that only an unknown server could count


@dataclass(slots=True)
class ChatSpan(Span):
    """A prompt of messages for a server that applies the template out of sight.

    Attributes:
        messages: what to send.
    """

    messages: tuple[Message, ...] = ()


class OpenAIEngine(RemoteEngine):
    """Generates on one OpenAI-compatible server.

    Args:
        name: as errors and manifests say it.
        server: the way to it.
        prefix: what comes before the paths of the API.
        model: which of its models.
        api: `completions` for text and `chat` for messages (`auto`), or one of them for both.
        group: most samples of one request (`n`); only where the server tells token ids, else they cannot be counted.
        continues: whether the chat API knows `continue_final_message`.
    """

    def __init__(
        self,
        name: str,
        server: Server,
        *,
        prefix: str = "/v1",
        model: str = "",
        api: str = "auto",
        group: int = 256,
        continues: bool = False,
    ) -> None:
        super().__init__(name, server)
        self.model = model
        self._prefix = prefix.rstrip("/")
        self._api, self._asked_group, self._continues = api, max(1, group), continues
        self.flavour: Flavour = ""
        self._completes = False
        self._guided = False  # what vLLM called it before 0.11
        self._limit = "max_tokens"
        self._contexts = Contexts(name, server)
        self._tokens: ServerTokens | None = None
        self._ends = Ends(self._decode)
        self._facts: dict[str, Any] = {"engine": "openai"}

    @property
    def _root(self) -> str:
        """Where the server's own paths begin."""
        return self._prefix.removesuffix("/v1")

    # -- meeting the server ------------------------------------------------------------------------------------------

    async def _meet(self) -> None:
        served = await self._served()
        if not self.model:
            if len(served) != 1:
                listed = f"it serves {', '.join(served)}" if served else "it does not list what it serves"
                raise UsageError(f"{self.name}: say which model, ?model=NAME; {listed}")
            self.model = next(iter(served))
        elif served and self.model not in served:
            raise UsageError(f"{self.name} serves {', '.join(served)}, not {self.model!r}")
        length = served.get(self.model, {}).get("max_model_len")
        self.context_length = length if isinstance(length, int) else None
        version = await self._recognise()
        self._guided = re.match(r"0\.(\d|10)\.", version) is not None
        if self.flavour:
            root = self._root + ("/v1" if self.flavour == "sglang" else "")
            self._tokens = ServerTokens(
                self.server,
                f"{root}/tokenize",
                f"{root}/detokenize",
                self.model,
                batched=self.flavour == "sglang",
            )
            self.group = self._asked_group
        self._completes = self._api != "chat" and (bool(self.flavour) or await self._exists("/completions"))
        if self._api == "completions" and not self._completes:
            raise UsageError(f"{self.name} has no completions API; leave api= away")
        found = {Capability.PENALTIES, Capability.LOGIT_BIAS, Capability.GRAMMAR}
        if self._completes or self._continues:
            found.add(Capability.CONTINUE)
        if self.flavour and self._completes:
            found |= {Capability.CUT, Capability.LOGPROBS, Capability.SCORE}
        self.capabilities = frozenset(found)
        self._facts |= {
            "model": self.model.rsplit("/", 1)[-1] if self.model.startswith("/") else self.model,
            "server": f"{self.flavour} {version}".strip(),
            "context_length": self.context_length,
        }

    async def _served(self) -> dict[str, dict[str, Any]]:
        try:
            listed = await self.server.ask("GET", self._prefix + "/models")
            return {str(model["id"]): model for model in listed["data"]}
        except Refused as refusal:
            if refusal.status in (401, 403):
                raise self._refusal(refusal) from refusal
            if self.model and refusal.status in (404, 405):
                return {}  # some gateways do not list
            raise
        except (KeyError, TypeError) as error:
            raise UsageError(f"{self.name} does not answer like an OpenAI-compatible server: GET /models") from error

    async def _recognise(self) -> str:
        """Set the flavour; returns the server's version."""
        for flavour, path in _RECOGNISED:
            try:
                found = await self.server.ask("GET", self._root + path)
            except Refused:
                continue
            except Fault as fault:
                if fault.closed:
                    raise  # it is busy: guessing would make another engine of it
                continue
            if isinstance(found, dict) and isinstance(found.get("version"), str):
                self.flavour = flavour
                return str(found["version"])
        return ""

    async def _exists(self, path: str) -> bool:
        """Whether the server has an API: a question without a prompt is bad there, and unknown elsewhere."""
        try:
            await self.server.ask("POST", self._prefix + path, {"model": self.model})
        except Refused as refusal:
            return refusal.status not in (401, 403, 404, 405, 501)
        except Fault as fault:
            if fault.closed:
                raise
            return False
        return True

    def facts(self) -> dict[str, Any]:
        """See `Engine.facts`."""
        return {key: value for key, value in self._facts.items() if value is not None}

    # -- prompts -----------------------------------------------------------------------------------------------------

    async def encode_prompt(self, prompt: Prompt, **template: Any) -> Span:
        """See `Engine.encode_prompt`."""
        await self.open()
        if self._tokens is not None and self._completes:
            try:
                span = await self._tokens.prompt(prompt, template)
            except Refused as refusal:
                raise PromptError(f"{self.name} refuses the prompt: {refusal}") from refusal
            self._contexts.saw(span.tokens)
            if self.context_length is not None and span.count > self.context_length:
                raise PromptError(f"the prompt has {span.count} tokens; {self.name} has room for {self.context_length}")
            return span
        if template:
            raise PromptError(f"{self.name} applies its chat template itself; it takes no settings for it from here")
        messages: list[Message] = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        if not any(str(message.get("content") or "").strip() for message in messages):
            raise PromptError("the prompt is empty")
        if isinstance(prompt, str) and self._completes:
            return Span("prompt", [], _estimate(prompt), prompt)
        text = "\n".join(f"{message.get('role')}: {message.get('content')}" for message in messages)
        return ChatSpan("prompt", [], _estimate(text), text, messages=tuple(messages))

    async def encode(self, text: str) -> Span:
        """See `Engine.encode`."""
        await self.open()
        if not text:
            return Span("forced")
        if self._tokens is None or not self._completes:
            return Span("forced", [], _estimate(text), text)
        span = await self._tokens.forced(text)
        self._contexts.saw(span.tokens)
        return span

    async def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """See `Engine.decode`; vLLM always shows special tokens."""
        await self.open()
        tokens = self._tokens
        if tokens is None:
            return await super().decode(ids)
        said = [token for token in ids if token not in self._ends.ids]
        return await self.server.insist(lambda: tokens.continuation(said, skip_special=skip_special_tokens))

    @property
    def eos_ids(self) -> frozenset[int]:
        """See `Engine.eos_ids`: learned from generations that end so."""
        return self._ends.ids

    async def _decode(self, lists: list[list[int]]) -> list[str]:
        """Texts of lists of ids, special tokens shown."""
        tokens = self._tokens
        if tokens is None:
            raise CapabilityError(f"{self.name} tells no token ids; SGLang and vLLM do")
        return await self.server.insist(lambda: tokens.decode(lists, skip_special=False))

    async def release(self, graph: ThreadGraph) -> None:
        """See `Engine.release`."""
        await super().release(graph)
        self._contexts.forget(graph)

    # -- generation --------------------------------------------------------------------------------------------------

    def _resumable(self, sample: Sample) -> bool:
        if sample.request.sampling.remembers:
            return False  # what has come would be prompt, and forgotten
        return self._completes and not isinstance(_root_span(sample.request), ChatSpan)

    async def _try(self, call: Call, room: int | None = None) -> None:
        request = call.samples[0].request
        sampling = request.sampling
        stops = () if self.flavour else sampling.stop
        short = sampling.max_tokens is not None and sampling.max_tokens <= _WHOLE_TOKENS
        whole = request.chunk == 0 and short and not stops
        path, body = await self._body(call, stream=not whole, room=room)
        if body.get(self._limit, 1) < 1:  # all had come when the connection broke, but not that it was all
            self._give(call.samples[0], Delta(finish_reason="length"))
            return
        reading = Reading(call.samples, stops)
        try:
            async with self.server.request("POST", self._prefix + path, orjson.dumps(body)) as response:
                if whole:
                    await self._give_all(reading.read(decode(await response.read())), sampling)
                else:
                    async for batch in events(response):
                        for event in batch:
                            await self._give_all(reading.read(decode(event)), sampling)
                        if not call.live:
                            return
        except Refused as refusal:
            if "max_tokens" in body and "max_completion_tokens" in str(refusal):
                self._limit = "max_completion_tokens"  # what newer hosted models call it
                await self._try(call, room)
            elif sampling.max_tokens is None and room is None and (found := _room(str(refusal))):
                await self._try(call, found)  # "all there is room for" is for the server to say
            else:
                raise
        except Fault:
            await self._give_all(reading.ends(), sampling)  # what has ended has ended, whatever came after it
            if call.live:
                raise
        else:
            await self._give_all(reading.ends(), sampling)

    async def _give_all(self, found: Iterable[tuple[Sample, Delta]], sampling: Sampling) -> None:
        tempered = sampling.temperature not in (0.0, 1.0) or bool(sampling.needs)
        for sample, delta in found:
            await self._ends.hide(sample, delta)
            if delta.logprobs and tempered:
                delta.logprobs = []
            if sampling.logprobs and tempered and self.flavour and delta.finish_reason in ("stop", "length"):
                # Whether they are as drawn from differs with the server: a scoring pass gives the model's own.
                ids, count = await self._contexts.before(sample.request.graph, sample.request.node)
                own = sample.tokens + delta.tokens
                delta.logprobs = await self._echo([*map(int, ids.split(",")), *own], count)
            self._give(sample, delta)

    def _give(self, sample: Sample, delta: Delta) -> None:
        self._contexts.saw(delta.tokens)
        super()._give(sample, delta)

    async def _body(self, call: Call, *, stream: bool, room: int | None) -> tuple[str, dict[str, Any]]:
        sample = call.samples[0]
        request = sample.request
        sampling = request.sampling
        body: dict[str, Any] = {
            "model": self.model,
            "temperature": sampling.temperature,
            **self._extras(sampling, call),
            **self._steering(sampling, chat=isinstance(root := _root_span(request), ChatSpan)),
        }
        most, count = sampling.max_tokens, None
        if isinstance(root, ChatSpan):
            path = "/chat/completions"
            body["messages"] = self._messages(request, root)
            if len(body["messages"]) > len(root.messages):
                body |= {"continue_final_message": True, "add_generation_prompt": False}
        elif self.flavour:
            path = "/completions"
            ids, count = await self._contexts.before(request.graph, request.node)
            given = f"{ids},{listed(tuple(sample.tokens))}" if sample.tokens else ids
            body["prompt"] = orjson.Fragment(f"[{given}]")  # written already: forks send the same ids again and again
        else:
            path = "/completions"
            body["prompt"] = _text(request) + sample.text
        if count is not None and self.context_length is not None:
            room = self.context_length - count
            if room < 1:
                limit = self.context_length
                raise PromptError(f"the prompt has {count} tokens; with the answer, {self.name} has room for {limit}")
            most = min(most or room, room)
        if most is None and path == "/completions":  # the API's own default is 16
            most = room or _ALL_TOKENS
        if most is not None:
            body[self._limit] = most - sample.count
        if len(call.samples) > 1:
            body["n"] = len(call.samples)
        if stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        return path, body

    def _extras(self, sampling: Sampling, call: Call) -> dict[str, Any]:
        """Settings beyond the plain ones; those that only recognised servers know go to these alone."""
        extras: dict[str, Any] = {}
        if sampling.top_p != 1.0:
            extras["top_p"] = sampling.top_p
        if sampling.stop and self.flavour:  # elsewhere they are looked for here
            extras["stop"] = list(sampling.stop)
        known = {
            "top_k": sampling.top_k or None,
            "min_p": sampling.min_p or None,
            "stop_token_ids": list(sampling.stop_ids) or None,
            "ignore_eos": sampling.ignore_eos or None,
            # Refused elsewhere: a protocol that waits for tags which a server hides would read nonsense.
            "skip_special_tokens": None if sampling.skip_special_tokens else False,
        }
        if self.flavour:
            extras |= {key: value for key, value in known.items() if value is not None}
            extras["return_token_ids"] = True
            extras["no_stop_trim" if self.flavour == "sglang" else "include_stop_str_in_output"] = True
            if self.flavour == "sglang" and len(call.samples) == 1:
                extras["rid"] = call.rid
            if sampling.logprobs and not sampling.needs:  # else they come from a scoring pass
                extras["logprobs"] = 1
        elif given := [key for key, value in known.items() if value is not None]:
            raise CapabilityError(f"{self.name} has no setting {', '.join(given)}; SGLang and vLLM have")
        return extras

    def _steering(self, sampling: Sampling, *, chat: bool) -> dict[str, Any]:
        """Penalties, bias and grammar, as this server calls them; a schema is what all of them take in one way."""
        if not sampling.needs:
            return {}
        said = steering(sampling, least=_LEAST_BIAS)
        unknown = {"repetition_penalty", "regex"} if chat else {"repetition_penalty", "regex", "json_schema"}
        if not self.flavour and (given := sorted(unknown & said.keys())):
            where = "" if chat else " for text prompts"
            raise CapabilityError(f"{self.name} has no setting {', '.join(given)}{where}; SGLang and vLLM have")
        if schema := said.pop("json_schema", None):
            named = {"name": "answer", "schema": json.loads(schema), "strict": True}
            said["response_format"] = {"type": "json_schema", "json_schema": named}
        if self.flavour == "vllm" and (regex := said.pop("regex", None)) is not None:
            said |= {"guided_regex": regex} if self._guided else {"structured_outputs": {"regex": regex}}
        return said

    def _messages(self, request: Request, root: ChatSpan) -> list[Any]:
        text = _text(request, after_prompt=True)
        if text and not self._continues:
            raise CapabilityError(
                f"{self.name} cannot continue a chat answer that has begun: give it a text prompt, say ?continue=on if "
                "it knows continue_final_message, or use sglang://HOST:PORT"
            )
        return [*root.messages, {"role": "assistant", "content": text}] if text else list(root.messages)

    # -- scores and ends ---------------------------------------------------------------------------------------------

    async def score(self, graph: ThreadGraph, node: Node) -> list[float]:
        """See `Engine.score`; the server echoes the text with its log-probabilities."""
        await self.open()
        if Capability.SCORE not in self.capabilities:
            return await super().score(graph, node)
        ids, count = await self._contexts.before(graph, node, whole=True)
        if not len(node):
            return []
        if self.context_length is not None and count >= self.context_length:
            raise PromptError(f"{count} tokens to score; {self.name} has room for {self.context_length - 1}")
        async with self.server.gate:
            return await self._echo([*map(int, ids.split(","))], count - len(node))

    async def _echo(self, ids: list[int], start: int) -> list[float]:
        """The model's log-probabilities of the tokens from `start` on; 0 for a first token that nothing predicts."""
        body = {"model": self.model, "prompt": ids, "max_tokens": 1, "temperature": 0, "echo": True, "logprobs": 1}

        async def once() -> list[float]:
            answer = await self.server.ask("POST", self._prefix + "/completions", body)
            try:
                found = answer["choices"][0]["logprobs"]["token_logprobs"]
                scores = [-math.inf if value is None else float(value) for value in found[start : len(ids)]]
                return scores if start else [0.0, *scores[1:]]
            except (KeyError, TypeError, IndexError) as error:
                raise Fault("it sent scores of another shape") from error

        try:
            return await self.server.insist(once)
        except Refused as refusal:
            raise self._refusal(refusal) from refusal

    async def _abort(self, rid: str) -> None:
        if self.flavour != "sglang":
            raise Fault("this server stops when its client goes")  # so the connection is dropped at once
        async with self.server.request("POST", self._root + "/abort_request", json.dumps({"rid": rid}).encode()):
            pass

    def _refusal(self, refusal: Refused) -> OrchestraError:
        text = str(refusal)
        if refusal.status in (401, 403):
            return EngineError(f"{self.name} refuses the key: {text}; set OPENAI_API_KEY, or key_file= in the URL")
        if "context" in text or "too long" in text:
            return PromptError(f"{self.name}: {text}")
        return super()._refusal(refusal)


def _room(refusal: str) -> int:
    """How many tokens fit after a prompt, from the refusal of too many; 0 if it does not say."""
    context = re.search(r"maximum context length (?:of|is) (\d+)", refusal)
    prompt = re.search(r"(\d+) (?:tokens from the input|in the (?:messages|prompt|input)|input tokens)", refusal)
    return max(0, int(context[1]) - int(prompt[1])) if context and prompt else 0


def _estimate(text: str) -> int:
    return max(1, len(text) // _CHARACTERS_A_TOKEN)


def _root_span(request: Request) -> Span | None:
    """The prompt that a generation's thread began with."""
    graph, node = request.graph, request.node
    root = graph.nodes[graph.lineage(*node.context[0])[0].parent] if node.context else node
    return next((span for span in root.spans if span.origin == "prompt"), None)


def _text(request: Request, *, after_prompt: bool = False) -> str:
    """The text before the sampled part of a node."""
    graph, node = request.graph, request.node
    chain = [graph.nodes[n] for n, _ in graph.lineage(*node.context[0])] if node.context else []
    spans = [span for n in chain for span in n.spans] + [span for span in node.spans if span.origin != "sampled"]
    return "".join(span.text for span in spans if not (after_prompt and span.origin == "prompt"))
