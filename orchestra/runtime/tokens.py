"""Token ids for a server: who makes them of text, and which stand before a generation."""

from __future__ import annotations

import asyncio
import re
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Protocol

from orchestra.errors import EngineError, PromptError
from orchestra.graph import Edge, Node, Span, ThreadGraph
from orchestra.runtime.engine import Prompt
from orchestra.runtime.http import Fault, Refused, Server
from orchestra.runtime.local.prompts import ANCHOR, Prompts

_KEPT = 4096  # encoded texts: strategies write the same few again and again
_LARGE_ID = 2**31 - 1


class Tokens(Protocol):
    """Encodes for one model."""

    async def prompt(self, prompt: Prompt, template: Mapping[str, Any]) -> Span:
        """A prompt; see `Engine.encode_prompt`."""

    async def forced(self, text: str) -> Span:
        """Text that the orchestrator writes; see `Engine.encode`."""

    async def decode(self, lists: list[list[int]], *, skip_special: bool = True) -> list[str]:
        """Texts of lists of ids."""

    async def continuation(self, ids: list[int], *, skip_special: bool = True) -> str:
        """Text of ids as it reads after other text: some tokenizers drop a space where a text begins."""


class ServerTokens:
    """Asks the server, which applies its own chat template.

    Args:
        server: the way to it.
        encode, decode: its paths (SGLang's by default; vLLM has others).
        model: sent along where a server wants it.
        batched: whether it decodes several lists at once.
    """

    def __init__(
        self,
        server: Server,
        encode: str = "/v1/tokenize",
        decode: str = "/v1/detokenize",
        model: str = "",
        *,
        batched: bool = True,
    ) -> None:
        self._server, self._encode, self._decode, self._batched = server, encode, decode, batched
        self._model = {"model": model} if model else {}
        self._known: OrderedDict[tuple[str, bool], list[int]] = OrderedDict()

    async def prompt(self, prompt: Prompt, template: Mapping[str, Any]) -> Span:
        """A prompt; see `Engine.encode_prompt`."""
        if isinstance(prompt, str):
            return await self._text(prompt, template)
        messages = [dict(message) for message in prompt]
        if not any(str(message.get("content") or "").strip() for message in messages):
            raise PromptError("the prompt is empty: no message has any text")
        body: dict[str, Any] = {"messages": messages}
        if template:
            body["chat_template_kwargs"] = dict(template)
        try:
            ids = await self._ask(body)
        except Refused as refusal:
            if "chat_template" not in str(refusal):
                raise
            if len(messages) == 1 and messages[0].get("role") == "user":
                return await self._text(str(messages[0]["content"]), template)
            raise PromptError("this model has no chat template: give it text or a single user message") from refusal
        [text] = await self._server.insist(lambda: self.decode([ids], skip_special=False))
        return Span("prompt", ids, len(ids), text)

    async def _text(self, text: str, template: Mapping[str, Any]) -> Span:
        if template:
            raise PromptError(f"template settings ({', '.join(template)}) are for chat messages, and this is text")
        if not text.strip():
            raise PromptError("the prompt is empty")
        ids = await self._ids(text, True)
        return Span("prompt", list(ids), len(ids), text)

    async def forced(self, text: str) -> Span:
        """Text that the orchestrator writes; see `Engine.encode`."""
        ids = await self._ids(text, False) if text else []
        return Span("forced", list(ids), len(ids), text)

    async def decode(self, lists: list[list[int]], *, skip_special: bool = True) -> list[str]:
        """Texts of lists of ids; one question, tried once."""
        if not self._batched:
            return [await self._decode_one(ids) if ids else "" for ids in lists]
        whole = [ids for ids in lists if ids]
        body = {"tokens": whole, "skip_special_tokens": skip_special}
        answer = await self._server.ask("POST", self._decode, body) if whole else {"text": []}
        try:
            texts = iter(answer["text"])
            return [str(next(texts)) if ids else "" for ids in lists]
        except (KeyError, TypeError, StopIteration) as error:
            raise Fault("it sent text of another shape") from error

    async def continuation(self, ids: list[int], *, skip_special: bool = True) -> str:
        """See `Tokens.continuation`; tried once."""
        anchor = await self._ids(ANCHOR, False)
        whole, start = await self.decode([anchor + ids, anchor], skip_special=skip_special)
        return whole[len(start) :]

    async def _decode_one(self, ids: list[int]) -> str:
        """The same as vLLM has it."""
        answer = await self._server.ask("POST", self._decode, {**self._model, "tokens": ids})
        try:
            return str(answer["prompt"])
        except (KeyError, TypeError) as error:
            raise Fault("it sent text of another shape") from error

    async def _ids(self, text: str, special: bool) -> list[int]:
        key = (text, special)
        if key in self._known:
            self._known.move_to_end(key)
            return self._known[key]
        ids = await self._ask({"prompt": text, "add_special_tokens": special})
        self._known[key] = ids
        if len(self._known) > _KEPT:
            self._known.popitem(last=False)
        return ids

    async def _ask(self, body: Mapping[str, Any]) -> list[int]:
        async def once() -> list[int]:
            answer = await self._server.ask("POST", self._encode, {**self._model, **body})
            try:
                return [int(token) for token in answer["tokens"]]
            except (KeyError, TypeError, ValueError) as error:
                raise Fault("it sent token ids of another shape") from error

        return await self._server.insist(once)


class LocalTokens:
    """A Hugging Face tokenizer in this process: our chat template, no round trips.

    Args:
        source: a folder or a Hugging Face id.
        context: length of the model's context.

    Attributes:
        eos: the id that the tokenizer ends sequences with, if it names one.
    """

    def __init__(self, source: str, context: int) -> None:
        from orchestra.runtime.local.sources import load_tokenizer

        tokenizer = load_tokenizer(source)
        self._prompts = Prompts(tokenizer, context)
        self.eos: int | None = tokenizer.eos_token_id

    async def prompt(self, prompt: Prompt, template: Mapping[str, Any]) -> Span:
        """A prompt; see `Engine.encode_prompt`."""
        return self._prompts.prompt(prompt, **template)

    async def forced(self, text: str) -> Span:
        """Text that the orchestrator writes; see `Engine.encode`."""
        return self._prompts.forced(text)

    async def decode(self, lists: list[list[int]], *, skip_special: bool = True) -> list[str]:
        """Texts of lists of ids."""
        return [self._prompts.decode_all(ids, skip_special=skip_special) for ids in lists]

    async def continuation(self, ids: list[int], *, skip_special: bool = True) -> str:
        """See `Tokens.continuation`."""
        return self._prompts.continuation(ids, skip_special=skip_special)


@lru_cache(maxsize=512)
def listed(ids: tuple[int, ...]) -> str:
    """The inside of a JSON list of ids. Runs share prompts, and writing one costs more than looking it up."""
    return ",".join(map(str, ids))


class Contexts:
    """Token ids that stand before generations, ready to be sent; what forks share is put together once.

    Attributes:
        highest: the highest id that tokenizer or model has given us.
        vocabulary: size of the vocabulary; None until it had to be asked.
    """

    def __init__(self, name: str, server: Server) -> None:
        self._name, self._server = name, server
        self._known: dict[int, dict[tuple[int, int], tuple[str, int]]] = {}  # by graph, then by edge
        self.highest = -1
        self.vocabulary: int | None = None
        self._asking = asyncio.Lock()

    def saw(self, ids: Iterable[int]) -> None:
        """Ids that are certainly in the vocabulary."""
        self.highest = max(self.highest, max(ids, default=-1))

    async def before(self, graph: ThreadGraph, node: Node, *, whole: bool = False) -> tuple[str, int]:
        """All ids up to the node's sampled ones (`whole`: with them), listed, and how many they are.

        Raises:
            EngineError: part of the context was written by an engine that tells no ids.
            PromptError: an id is not in the vocabulary.
        """
        start, count = "", 0
        if node.context:
            edge = node.context[0]
            known = self._known.setdefault(id(graph), {})
            if edge not in known:
                ids = self._path(graph, edge)
                await self._check(ids)
                known[edge] = listed(tuple(ids)), len(ids)
            start, count = known[edge]
        own: list[int] = []
        for span in node.spans:
            if whole or span.origin != "sampled":
                own += span.tokens
        if not own:
            return start, count
        await self._check(own)
        said = listed(tuple(own))
        return f"{start},{said}" if start else said, count + len(own)

    def _path(self, graph: ThreadGraph, edge: Edge) -> list[int]:
        ids: list[int] = []
        for n, length in graph.lineage(*edge):
            left = length
            for span in graph.nodes[n].spans:
                taken = min(left, span.count)
                if len(span.tokens) < taken:
                    raise EngineError(f"{self._name} needs the token ids of the whole context; a part of it has none")
                ids += span.tokens if taken == span.count else span.tokens[:taken]
                left -= taken
        return ids

    async def _check(self, ids: Sequence[int]) -> None:
        """Refuse ids outside the vocabulary: they would end an SGLang server."""
        if not ids or (min(ids) >= 0 and max(ids) <= self.highest):
            return
        async with self._asking:
            if self.vocabulary is None:
                self.vocabulary = await self._ask_vocabulary()
        if wrong := [i for i in ids if not 0 <= i < self.vocabulary]:
            raise PromptError(f"token id {wrong[0]} is not in the vocabulary of {self._name}: 0..{self.vocabulary - 1}")

    async def _ask_vocabulary(self) -> int:
        """The size of the vocabulary, which an SGLang server names when it refuses an id."""
        probe = {
            "input_ids": [0],
            "return_logprob": True,
            "token_ids_logprob": [_LARGE_ID],
            "sampling_params": {"max_new_tokens": 1},
        }
        try:
            await self._server.insist(lambda: self._server.ask("POST", "/generate", probe))
        except Refused as refusal:
            if found := re.search(r"\[0, (\d+)\)", str(refusal)):
                return int(found[1])
        return _LARGE_ID  # it does not say: then it checks ids itself, or nobody can

    def forget(self, graph: ThreadGraph) -> None:
        """A run has ended."""
        self._known.pop(id(graph), None)


def last_ids(graph: ThreadGraph, node: Node, count: int) -> list[int]:
    """The last token ids before the sampled ones of a node."""
    ids = [token for span in node.spans if span.origin != "sampled" for token in span.tokens]
    for edge in node.context[:1]:
        ids = graph.path_tokens(*edge) + ids
    return ids[-count:]
