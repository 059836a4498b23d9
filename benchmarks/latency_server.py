"""A FAKE server of SGLang's native API and OpenAI's: it runs no model and exists only to measure clients.

    python benchmarks/latency_server.py --port 0        # prints the port, one line

Every generation is the same 100 tokens and takes 5 ms and 2 ms a token, 205 ms in all, however many run: what a client
needs beyond that is the client's own. Answers are those of SGLang 0.5.20 key by key (`latency_bodies.py`), encoded in
advance, so that the server needs less CPU than its clients.

Like the real one: streams are cumulative, an event each `stream_interval` tokens; with `n` > 1 a list comes back whose
members have ids of the server's making (an abort by the client's `rid` does not reach them; a batch of prompts with a
list of `rid`s keeps its own); `/abort_request` ends a generation with what it has; a client that leaves ends its own;
`/v1/loads` counts what runs. Unlike the real one: `stop`, `top_logprobs_num` and prompt log-probabilities are ignored,
and one HTTP chunk may hold several events, where several are due.

`/fake/counters` has the server's own CPU time, and what the last generation request asked for.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

import latency_bodies as bodies
from aiohttp import web
from latency_bodies import Sample
from latency_requests import Batch, Refused, native_samples, openai_samples

try:
    from orjson import loads
except ImportError:
    from json import loads

try:
    from uvloop import new_event_loop
except ImportError:
    from asyncio import new_event_loop

JSON = "application/json"


class Server:
    """The routes, and what runs."""

    def __init__(self, prefill: float, token: float) -> None:
        self.prefill = prefill
        self.token = token
        self.running: dict[str, tuple[Batch, Sample]] = {}
        self.requests = 0
        self.last: dict[str, Any] = {}

    def application(self) -> web.Application:
        """The application with all routes."""
        app = web.Application(client_max_size=2**30)
        app.add_routes(
            [
                web.post("/generate", self.generate),
                web.post("/v1/completions", lambda request: self.openai(request, bodies.COMPLETIONS)),
                web.post("/v1/chat/completions", lambda request: self.openai(request, bodies.CHAT)),
                web.post("/abort_request", self.abort),
                web.post("/v1/tokenize", self.tokenize),
                web.post("/v1/detokenize", self.detokenize),
                *(web.get(path, self.model_info) for path in ("/model_info", "/get_model_info")),
                *(web.get(path, self.server_info) for path in ("/server_info", "/get_server_info")),
                web.get("/v1/loads", self.loads),
                web.get("/v1/models", self.models),
                web.get("/health", self.health),
                web.get("/fake/counters", self.counters),
            ]
        )
        return app

    @contextlib.contextmanager
    def _run(self, request: web.Request, body: dict[str, Any], samples: list[Sample], prompts: int) -> Iterator[Batch]:
        """Count the generations as running until the block is left, however."""
        for sample in samples:
            if sample.rid in self.running:
                raise Refused(f"Duplicate request ID detected: {sample.rid}")
        batch = Batch(samples, asyncio.get_running_loop().time(), self.prefill, self.token, prompts)
        self.running.update((sample.rid, (batch, sample)) for sample in samples)
        self.requests += 1
        self.last = {"path": request.path, "bytes": request.content_length, "body": body}
        try:
            yield batch
        finally:
            for sample in samples:
                del self.running[sample.rid]

    async def generate(self, request: web.Request) -> web.StreamResponse:
        """SGLang's `/generate`."""
        try:
            body = await _read(request)
            samples, prompts = native_samples(body)
            with self._run(request, body, samples, prompts) as batch:
                if body.get("stream"):
                    params = body.get("sampling_params") or {}
                    interval = (params[0] if isinstance(params, list) else params).get("stream_interval") or 1
                    return await _stream(request, batch, interval, bodies.native_chunk)
                await batch.finished()
                answers = [bodies.native(sample, sample.end) for sample in samples]
        except Refused as error:
            return web.json_response({"error": {"message": str(error)}}, status=400)
        joined = answers[0] if samples[0].index is None else b"[" + b",".join(answers) + b"]"
        return web.Response(body=joined, content_type=JSON)

    async def openai(self, request: web.Request, route: bodies.OpenAI) -> web.StreamResponse:
        """OpenAI's two routes."""
        try:
            body = await _read(request)
            samples, prompts = openai_samples(body)
            with self._run(request, body, samples, prompts) as batch:
                if body.get("stream"):
                    usage = (body.get("stream_options") or {}).get("include_usage")
                    tail = (lambda: route.usage_chunk(samples, prompts)) if usage else bytes
                    return await _stream(request, batch, 1, route.chunk, tail)
                await batch.finished()
                answer = route.answer(samples, prompts)
        except Refused as error:
            return _refusal(error)
        return web.Response(body=answer, content_type=JSON)

    async def abort(self, request: web.Request) -> web.Response:
        """SGLang's `/abort_request`; an unknown id is no error, as there."""
        body = await _read(request)
        rids = list(self.running) if body.get("abort_all") else [body.get("rid")]
        for batch, sample in filter(None, map(self.running.get, rids)):
            batch.abort(sample, asyncio.get_running_loop().time())
        return web.Response()

    async def tokenize(self, request: web.Request) -> web.Response:
        """SGLang's `/v1/tokenize`, of a prompt, several or messages."""
        try:
            body = await _read(request)
        except Refused as error:
            return _refusal(error)
        if ("messages" in body) == ("prompt" in body):
            return _refusal(Refused("Exactly one of 'prompt' or 'messages' must be provided."))
        special = body.get("add_special_tokens", True)
        if "messages" in body:
            tokens: Any = bodies.encode(bodies.render(body["messages"]))
        elif isinstance(body["prompt"], str):
            tokens = bodies.encode(body["prompt"], special)
        else:
            tokens = [bodies.encode(one, special) for one in body["prompt"]]
        count = [len(one) for one in tokens] if isinstance(body.get("prompt"), list) else len(tokens)
        return web.json_response({"tokens": tokens, "count": count, "max_model_len": bodies.CONTEXT})

    async def detokenize(self, request: web.Request) -> web.Response:
        """SGLang's `/v1/detokenize`."""
        tokens = (await _read(request))["tokens"]
        nested = bool(tokens) and isinstance(tokens[0], list)
        return web.json_response({"text": [bodies.decode(one) for one in tokens] if nested else bodies.decode(tokens)})

    async def model_info(self, _: web.Request) -> web.Response:
        """SGLang's facts about the model."""
        return web.json_response(bodies.MODEL_INFO)

    async def server_info(self, _: web.Request) -> web.Response:
        """SGLang's facts about the server: of the real one's hundreds, those a client may want."""
        state = {"memory_usage": {"token_capacity": bodies.CAPACITY}, "effective_max_running_requests_per_dp": 4096}
        return web.json_response({**bodies.SERVER_INFO, "internal_states": [state]})

    async def loads(self, _: web.Request) -> web.Response:
        """What runs, as SGLang says it."""
        running, used = len(self.running), sum(sample.prompt_tokens for _, sample in self.running.values())
        now = datetime.now(UTC)
        load = {"timestamp": now.timestamp(), "dp_rank": 0, "num_running_reqs": running, "num_waiting_reqs": 0}
        load |= {"num_used_tokens": used, "num_total_tokens": used, "max_total_num_tokens": bodies.CAPACITY}
        load |= {"max_running_requests": 4096, "token_usage": used / bodies.CAPACITY}
        return web.json_response(
            {
                "timestamp": now.isoformat(),
                "version": bodies.VERSION,
                "accelerator": None,
                "num_accelerators": 1,
                "loads": [load],
            }
        )

    async def models(self, _: web.Request) -> web.Response:
        """OpenAI's list of models."""
        card = {"id": bodies.MODEL, "object": "model", "created": int(time.time()), "owned_by": "sglang"}
        card |= {"root": bodies.MODEL, "parent": None, "max_model_len": bodies.CONTEXT}
        return web.json_response({"object": "list", "data": [card]})

    async def health(self, _: web.Request) -> web.Response:
        """It answers, so it is well."""
        return web.Response()

    async def counters(self, _: web.Request) -> web.Response:
        """Generation requests so far, what runs, CPU seconds of this process, and the last request."""
        counted = {"requests": self.requests, "running": len(self.running), "cpu_seconds": time.process_time()}
        return web.json_response({**counted, "last": self.last})


async def _read(request: web.Request) -> dict[str, Any]:
    raw = await request.read()
    try:
        body = loads(raw)
    except ValueError:
        raise Refused("JSON decode error") from None
    if not isinstance(body, dict):
        raise Refused("the body is not an object")
    return body


def _refusal(error: Refused) -> web.Response:
    fields = {"object": "error", "message": str(error), "type": "BadRequest", "param": None, "code": 400}
    return web.json_response(fields, status=400)


async def _stream(
    request: web.Request,
    batch: Batch,
    interval: int,
    chunk: Callable[[Sample, int], bytes],
    tail: Callable[[], bytes] = bytes,
) -> web.StreamResponse:
    """Events at 1, 1 + interval, 1 + 2 * interval ... tokens and at the end, each when it is due."""
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
    response.enable_chunked_encoding()
    await response.prepare(request)
    loop, live = asyncio.get_running_loop(), list(batch.samples)
    while live:
        await batch.until(batch.due(min(sample.following(interval) for sample in live)))
        now, out = loop.time(), []
        for sample in tuple(live):
            have = batch.tokens(sample, now)
            while (k := sample.following(interval)) <= have and k < sample.end:
                out.append(chunk(sample, k))
                sample.sent = k
            if have >= sample.end:
                out.append(chunk(sample, sample.end))
                live.remove(sample)
        if not live:
            out += [tail(), b"data: [DONE]\n\n"]
        if out:
            await response.write(b"".join(out))
    await response.write_eof()
    return response


async def serve(host: str, port: int, prefill: float, token: float) -> None:
    """Serve until cancelled, after printing the port."""
    app = Server(prefill, token).application()
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True)
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port, backlog=4096).start()
        print(runner.addresses[0][1], flush=True)
        gc.freeze()
        await asyncio.Event().wait()
    finally:
        await runner.cleanup()


@contextlib.contextmanager
def running(*options: str) -> Iterator[int]:
    """The server in a process of its own, for as long as the block lasts; gives its port."""
    command = [sys.executable, __file__, "--port", "0", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield int(process.stdout.readline())
        finally:
            process.terminate()


def raise_file_limit() -> None:
    """As many sockets as the system lets us have."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def main() -> None:
    """Parse the options and serve."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--prefill-ms", type=float, default=5.0)
    parser.add_argument("--token-ms", type=float, default=2.0)
    options = parser.parse_args()
    raise_file_limit()
    with contextlib.suppress(KeyboardInterrupt), asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(serve(options.host, options.port, options.prefill_ms / 1000, options.token_ms / 1000))


if __name__ == "__main__":
    main()
