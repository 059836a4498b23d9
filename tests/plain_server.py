"""A fake OpenAI-compatible server that knows nothing but the two APIs: no token ids, no facts about itself."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from typing import Any

from aiohttp import web
from fakes import reset

Script = Callable[[str], Sequence[str]]
"""From the prompt's text to the tokens that the model says."""


class PlainServer:
    """Answers from a script, one token a chunk; what it counts includes an end-of-sequence token.

    Attributes:
        script: what the model says.
        models: what it lists; None: it lists nothing.
        completions: whether it has the completions API.
        newer: whether it takes `max_completion_tokens` only.
        key: what it asks for.
        thinking: tokens that it sends through the reasoning channel first.
        break_after: of the next streams, tokens after which the connection is reset, before the end is said.
        context: most tokens of prompt (one a character here) and answer together; 0 is no limit.
        counts: whether it tells its usage.
        pause: seconds before each chunk.
    """

    def __init__(self, script: Script, **options: Any) -> None:
        self.script = script
        self.models: list[str] | None = ["small"]
        self.completions = True
        self.newer = False
        self.key = ""
        self.thinking: Sequence[str] = ()
        self.break_after: list[int] = []
        self.context = 0
        self.counts = True
        self.pause = 0.0
        for name, value in options.items():
            assert hasattr(self, name)
            setattr(self, name, value)

    async def __call__(self, request: web.Request) -> web.StreamResponse:
        if self.key and request.headers.get("Authorization") != f"Bearer {self.key}":
            given = request.headers.get("Authorization", "nothing")
            return _error(401, f"Incorrect API key provided: {given}")
        if request.path == "/v1/models" and self.models is not None:
            return web.json_response({"object": "list", "data": [{"id": name} for name in self.models]})
        chat = request.path == "/v1/chat/completions"
        if not chat and not (self.completions and request.path == "/v1/completions"):
            return _error(404, "Not Found")
        return await self._generate(request, json.loads(await request.read()), chat)

    async def _generate(self, request: web.Request, body: dict[str, Any], chat: bool) -> web.StreamResponse:
        if ("messages" if chat else "prompt") not in body:
            return _error(400, "you must provide a prompt")
        if self.newer and "max_tokens" in body:
            return _error(400, "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.")
        if self.models and body["model"] not in self.models:
            return _error(404, f"The model {body['model']!r} does not exist")
        most = body.get("max_completion_tokens", body.get("max_tokens", 10_000))
        if most < 1:
            return _error(400, "max_tokens must be at least 1")
        prompt = "\n".join(m["content"] for m in body["messages"]) if chat else body["prompt"]
        if self.context and len(prompt) + most > self.context:
            total = (
                f"You requested a total of {len(prompt) + most} tokens: {len(prompt)} tokens from the input messages"
            )
            limit = f"the model's maximum context length of {self.context} tokens"
            return _error(400, f"Requested token count exceeds {limit}. {total} and {most} tokens for the completion.")
        said = [(key, text) for key, texts in (("reasoning_content", self.thinking), ("content", self.script(prompt)))
                for text in texts]  # fmt: skip
        ended = len(said) < most
        said, reason = said[:most], "stop" if ended else "length"
        usage = {"prompt_tokens": len(prompt), "completion_tokens": len(said) + ended}
        if not body.get("stream"):
            answer: dict[str, Any] = {"index": 0, "finish_reason": reason}
            if chat:
                answer["message"] = {"role": "assistant"} | {
                    key: "".join(text for k, text in said if k == key) or None for key, _ in said
                }
            else:
                answer["text"] = "".join(text for _, text in said)
            await asyncio.sleep(self.pause)
            return web.json_response({"choices": [answer]} | ({"usage": usage} if self.counts else {}))
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        left = self.break_after.pop(0) if self.break_after else None
        for index, (key, text) in enumerate([*said, ("content", "")]):
            await asyncio.sleep(self.pause)
            if index == left:
                await asyncio.sleep(0.02)
                return await reset(request)
            part = {"delta": {key: text} if text else {}} if chat else {"text": text}
            await self._send(response, {"choices": [{"index": 0, **part, "finish_reason": None if text else reason}]})
        if self.counts and body.get("stream_options", {}).get("include_usage"):
            await self._send(response, {"choices": [], "usage": usage})
        await response.write(b"data: [DONE]\n\n")
        return response

    @staticmethod
    async def _send(response: web.StreamResponse, event: Any) -> None:
        await response.write(b"data: %b\n\n" % json.dumps(event).encode())


def _error(status: int, message: str) -> web.Response:
    return web.json_response({"error": {"message": message, "type": "x", "code": None}}, status=status)
