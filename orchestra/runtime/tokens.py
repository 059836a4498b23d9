"""Who turns text into token ids for a server: the server itself, or a tokenizer here."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, Protocol

from orchestra.errors import PromptError
from orchestra.graph import Span
from orchestra.runtime.engine import Prompt
from orchestra.runtime.http import Fault, Refused, Server

_KEPT = 4096  # encoded texts: strategies write the same few again and again


class Tokens(Protocol):
    """Encodes for one model."""

    async def prompt(self, prompt: Prompt, template: Mapping[str, Any]) -> Span:
        """A prompt; see `Engine.encode_prompt`."""

    async def forced(self, text: str) -> Span:
        """Text that the orchestrator writes; see `Engine.encode`."""


class ServerTokens:
    """Asks the server: `/v1/tokenize` and `/v1/detokenize`. The server applies its own chat template."""

    def __init__(self, server: Server) -> None:
        self._server = server
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
        whole = [ids for ids in lists if ids]
        body = {"tokens": whole, "skip_special_tokens": skip_special}
        answer = await self._server.ask("POST", "/v1/detokenize", body) if whole else {"text": []}
        try:
            texts = iter(answer["text"])
            return [str(next(texts)) if ids else "" for ids in lists]
        except (KeyError, TypeError, StopIteration) as error:
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
            answer = await self._server.ask("POST", "/v1/tokenize", body)
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
    """

    def __init__(self, source: str, context: int) -> None:
        from orchestra.runtime.local.prompts import Prompts, load_tokenizer

        self._prompts = Prompts(load_tokenizer(source), context)

    async def prompt(self, prompt: Prompt, template: Mapping[str, Any]) -> Span:
        """A prompt; see `Engine.encode_prompt`."""
        return self._prompts.prompt(prompt, **template)

    async def forced(self, text: str) -> Span:
        """Text that the orchestrator writes; see `Engine.encode`."""
        return self._prompts.forced(text)
