"""What a client asked the fake server of `latency_server.py` for, and when each token of it is due."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from typing import Any

import latency_bodies as bodies
from latency_bodies import Sample


@dataclass(slots=True)
class Batch:
    """The generations of one request: they begin together."""

    samples: list[Sample]
    started: float
    prefill: float
    token: float
    prompts: int = 1
    _waiter: asyncio.Future[None] | None = field(default=None, repr=False)

    def due(self, k: int) -> float:
        """When `k` tokens are there, in the loop's time."""
        return self.started + self.prefill + k * self.token

    def tokens(self, sample: Sample, now: float) -> int:
        """How many a sample has."""
        return min(sample.end, max(0, int((now - self.started - self.prefill) / self.token + 1e-6)))

    def abort(self, sample: Sample, now: float) -> None:
        """End one of them with what it has."""
        sample.stopped = self.tokens(sample, now)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def until(self, when: float) -> None:
        """Sleep until `when` or an abort."""
        loop = asyncio.get_running_loop()
        self._waiter = loop.create_future()
        handle = loop.call_at(when, _wake, self._waiter)
        try:
            await self._waiter
        finally:
            handle.cancel()

    async def finished(self) -> None:
        """Sleep until all of them have ended."""
        loop = asyncio.get_running_loop()
        while (end := max(self.due(s.end) if s.stopped is None else 0.0 for s in self.samples)) > loop.time():
            await self.until(end)


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)


class Refused(Exception):
    """A request that the real server answers with status 400."""


def native_samples(body: dict[str, Any]) -> tuple[list[Sample], int]:
    """The generations that a native request asks for, and the number of its prompts."""
    ids, texts = body.get("input_ids"), body.get("text")
    if (ids is None) == (texts is None):
        raise Refused("Either text, input_ids or input_embeds should be provided.")
    if ids is not None:
        lengths = [len(one) for one in ids] if ids and isinstance(ids[0], list) else [len(ids)]
        single = not (ids and isinstance(ids[0], list))
    else:
        single = isinstance(texts, str)
        lengths = [len(bodies.encode(one)) for one in ([texts] if single else texts)]
    params, rids = body.get("sampling_params") or {}, body.get("rid")
    each = params if isinstance(params, list) else [params] * len(lengths)
    n = each[0].get("n", 1)
    logprobs = bool(body.get("return_logprob"))
    samples = []
    for i, (length, param) in enumerate(zip(lengths, each, strict=True)):
        limit = min(bodies.TOKENS, param.get("max_new_tokens", 128))
        if limit < 0:
            raise Refused(f"max_new_tokens must be at least 0, got {limit}.")
        for _ in range(n):
            chosen = rids if isinstance(rids, str) else rids[i] if rids else None
            rid = chosen if chosen and n == 1 else bodies.new_id()
            index = None if single and n == 1 else len(samples)
            samples.append(Sample(rid, index, length, limit, logprobs=logprobs))
    return samples, len(lengths)


def openai_samples(body: dict[str, Any]) -> tuple[list[Sample], int]:
    """The generations that a request of OpenAI's asks for, and the number of its prompts."""
    if "messages" in body:
        lengths = [len(bodies.encode(bodies.render(body["messages"])))]
    else:
        prompt = body.get("prompt", "")
        prompts = prompt if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int) else [prompt]
        lengths = [len(bodies.encode(one) if isinstance(one, str) else one) for one in prompts]
    limit = min(bodies.TOKENS, body.get("max_completion_tokens") or body.get("max_tokens") or bodies.TOKENS)
    model, n = json.dumps(body.get("model") or bodies.MODEL).encode(), body.get("n") or 1
    rid = body.get("rid") if n == len(lengths) == 1 else None
    counted = [length for length in lengths for _ in range(n)]
    return [Sample(rid or bodies.new_id(), i, length, limit, model) for i, length in enumerate(counted)], len(lengths)
