"""A fake SGLang server: a token a byte, and what it says has ids of its own, which no text encodes to."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from aiohttp import web
from fakes import reset, serving

import orchestra

BOS, EOS, FIRST, SAID = 1, 2, 3, 300
VOCABULARY = 600
NO_TEMPLATE = (
    "Cannot use chat template functions because tokenizer.chat_template is not set and no template argument "
    "was passed! For information about writing templates see the documentation"
)


def encode(text: str, special: bool = False) -> list[int]:
    return [BOS] * special + [FIRST + byte for byte in text.encode()]


def said(text: str) -> list[int]:
    """The ids with which the model says a text."""
    return [SAID + byte for byte in text.encode()]


def decode(ids: list[int]) -> str:
    return bytes(i - (SAID if i >= SAID else FIRST) for i in ids if i >= FIRST).decode(errors="replace")


def held_back(ids: list[int]) -> str:
    """The text of ids, less a character that is not complete."""
    return decode(ids).rstrip("\ufffd")


class FakeSGLang:
    """Answers `script(ids)`, one token an event, then ends the sequence.

    Attributes:
        script: from the ids of the prompt to what the model says, as text or as ids.
        template: whether the model has a chat template.
        incremental: whether streams hold what is new, or all so far.
        break_after: of the next streams, events after which the connection is reset.
        frozen: after the first event, and to aborts, nothing is answered any more.
        aborted: request ids.
        weights: given from outside: the version, and what was in the files.
    """

    def __init__(self, script: Callable[[list[int]], str | list[int]] = lambda _: "yes", **options: Any) -> None:
        self.script = script
        self.template = True
        self.incremental = False
        self.break_after: list[int] = []
        self.frozen = False
        self.aborted: list[str] = []
        self.weights: list[tuple[str, dict[str, Any]]] = []
        for name, value in options.items():
            assert hasattr(self, name)
            setattr(self, name, value)

    async def __call__(self, request: web.Request) -> web.StreamResponse:
        raw = await request.read()
        body = json.loads(raw) if raw else {}
        match request.path:
            case "/v1/models":
                return web.json_response({"data": [{"id": "fake", "max_model_len": 4096}]})
            case "/model_info":
                version = self.weights[-1][0] if self.weights else "default"
                return web.json_response({"model_type": "llama", "weight_version": version})
            case "/update_weights_from_disk":
                return self._update(body)
            case "/server_info":
                return web.json_response({"version": "0", "incremental_streaming_output": self.incremental})
            case "/v1/tokenize":
                return self._tokenize(body)
            case "/v1/detokenize":
                return web.json_response({"text": [decode(ids) for ids in body["tokens"]]})
            case "/abort_request":
                self.aborted.append(body["rid"])
                if self.frozen:
                    await asyncio.sleep(60)
                return web.Response()
            case "/generate":
                return await self._generate(request, body)
        return web.json_response({"detail": "Not Found"}, status=404)

    def _update(self, body: dict[str, Any]) -> web.Response:
        from safetensors.torch import load_file

        files = sorted(Path(body["model_path"]).glob("*.safetensors"))
        weights = {name: value for file in files for name, value in load_file(file).items()}
        if not all(value.isfinite().all() for value in weights.values()):
            return web.json_response({"success": False, "message": "not a number"}, status=400)
        assert body["flush_cache"]
        self.weights.append((body["weight_version"], weights))
        return web.json_response({"success": True, "message": ""})

    def _tokenize(self, body: dict[str, Any]) -> web.Response:
        if "messages" not in body:
            ids = encode(body["prompt"], body["add_special_tokens"])
        elif not self.template:
            return _refusal(NO_TEMPLATE)
        else:
            ids = encode("".join(f"<{m['role']}>{m['content']}" for m in body["messages"]), special=True)
        return web.json_response({"tokens": ids, "count": len(ids), "max_model_len": 4096})

    async def _generate(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        ids, params = body["input_ids"], body["sampling_params"]
        if wrong := [i for i in body.get("token_ids_logprob", []) if not 0 <= i < VOCABULARY]:
            text = "token_ids_logprob contains out-of-vocabulary token id"
            return _refusal(f"{text} {wrong[0]}; valid range is [0, {VOCABULARY}).")
        assert all(0 <= i < VOCABULARY for i in ids), "this ends a real server"
        if not body.get("stream") and "rid" not in body:
            return web.json_response({"text": "", "output_ids": [], "meta_info": self._scores(body)})
        if not body.get("stream"):
            return await self._whole(request, body)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        left = self.break_after.pop(0) if self.break_after else None
        n = params["n"]
        says = self.script(ids)
        answer = [*(said(says) if isinstance(says, str) else says), EOS][: params["max_new_tokens"]]
        for k in range(1, len(answer) + 1):
            if left == k - 1:
                await asyncio.sleep(0.02)
                return await reset(request)
            for index in range(n):
                event = self._event(answer, k, params["temperature"] or 1.0, body)
                event |= {"index": index} if n > 1 else {}
                await response.write(b"data: %b\n\n" % json.dumps(event, separators=(",", ":")).encode())
            await asyncio.sleep(60 if self.frozen else 0)
        if left is not None and left >= len(answer):
            return await reset(request)
        await response.write(b"data: [DONE]\n\n")
        await asyncio.sleep(0.01)
        return response

    async def _whole(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        params = body["sampling_params"]
        says = self.script(body["input_ids"])
        answer = [*(said(says) if isinstance(says, str) else says), EOS][: params["max_new_tokens"]]
        if self.break_after:
            self.break_after.pop(0)
            return await reset(request)
        await asyncio.sleep(60 if self.frozen else 0)
        events = [self._event(answer, len(answer), params["temperature"] or 1.0, body, 0) for _ in range(params["n"])]
        return web.json_response(events if len(events) > 1 else events[0])

    def _event(
        self, answer: list[int], k: int, temperature: float, body: dict[str, Any], since: int | None = None
    ) -> dict[str, Any]:
        since = (k - 1 if self.incremental else 0) if since is None else since
        meta: dict[str, Any] = {"finish_reason": None, "completion_tokens": k, "cached_tokens": 3}
        if k == len(answer):
            meta["finish_reason"] = {"type": "stop", "matched": EOS} if answer[-1] == EOS else {"type": "length"}
        if body.get("return_logprob"):
            meta["output_token_logprobs"] = [[score(i) / temperature, i, None] for i in answer[since:k]]
        text = held_back(answer[:k])[len(held_back(answer[:since])) :]
        return {"text": text, "output_ids": answer[since:k], "meta_info": meta}

    @staticmethod
    def _scores(body: dict[str, Any]) -> dict[str, Any]:
        """Of given tokens; and of an output, log-probabilities at the sampling temperature."""
        ids, temperature = body["input_ids"], body["sampling_params"].get("temperature") or 1.0
        start = body.get("logprob_start_len", 0)
        return {
            "finish_reason": {"type": "length"},
            "input_token_logprobs": [[score(i) if k else None, i, None] for k, i in enumerate(ids)][start:],
            "output_top_logprobs": [[[-1 / temperature, 5, None], [-3 / temperature, 6, None]]],
        }


def score(token: int) -> float:
    """The model's own log-probability of a token, wherever it stands."""
    return -1.0 - token % 7


def _refusal(message: str) -> web.Response:
    return web.json_response({"error": {"message": message}}, status=400)


@asynccontextmanager
async def connected(server: FakeSGLang, query: str = ""):
    """The fake and a connection to it."""
    async with (
        serving(server) as fake,
        orchestra.connect(f"sglang://127.0.0.1:{fake.port}{query}") as connection,
    ):
        yield fake, connection
        assert connection.engine.server.sockets == 0
        assert connection.engine.load().requests == 0
