"""Penalties, bias and grammars on a real SGLang server: the same tokens as in process."""

from __future__ import annotations

import asyncio
import math
from dataclasses import replace
from typing import Any

import pytest
from engines import opened, root

from orchestra.errors import UsageError
from orchestra.graph import Edge, ThreadGraph
from orchestra.runtime.connect import open_engine
from orchestra.runtime.engine import Delta, Engine, Request, Sampling

PROMPTS = ["the answer is", "hm", "abc"]
PLAIN = Sampling(max_tokens=32, logprobs=True, ignore_eos=True)
FREE = [
    {},
    {"frequency_penalty": 1.5},
    {"presence_penalty": 1.0, "frequency_penalty": -0.3},
    {"repetition_penalty": 1.8},
    {"logit_bias": ((20, 3.0), (70, 4.0), (271, -math.inf))},
    {"logit_bias": ((70, 6.0),), "repetition_penalty": 1.3},
]
OBJECT = '{"type":"object","properties":{"a":{"type":"integer"},"b":{"enum":["x","y"]}},"required":["a","b"]}'
BOUND = [
    {"regex": "[a-f]+(the|in)+ [0-9]{3}"},
    {"regex": "(the|this)|in[a-z]{2,5}er", "frequency_penalty": 1.0},
    {"json_schema": '{"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 3}'},
    {"json_schema": OBJECT, "logit_bias": ((201, -5.0), (202, -5.0), (224, -5.0))},
]


async def say(engine: Engine, prompt: str, sampling: Sampling) -> Delta:
    graph = ThreadGraph()
    start = await root(engine, graph, prompt)
    node = graph.add([Edge(start.id, len(start))])
    whole = Delta()
    async for delta in engine.generate(Request(graph, node, sampling)):
        whole.merge(delta)
    await engine.release(graph)
    return whole


@pytest.mark.parametrize("form", ["sglang://127.0.0.1:{}", "openai://127.0.0.1:{}/v1"])
def test_greedy_tokens_are_those_of_the_in_process_engine(tagged: str, tagged_server: Any, form: str) -> None:
    async def main() -> set[tuple[int, ...]]:
        there = open_engine(form.format(tagged_server.port))
        different = set()
        try:
            async with opened(tagged) as here:
                for prompt in PROMPTS:
                    for asked in [*FREE, *BOUND]:
                        sampling = replace(PLAIN, ignore_eos=asked in FREE, **asked)
                        expected, found = await say(here, prompt, sampling), await say(there, prompt, sampling)
                        if asked in BOUND and found.eos:  # a server samples the end that a finished grammar leaves
                            found.tokens.pop()
                            found.logprobs.pop()
                        assert found.tokens == expected.tokens, (prompt, asked)
                        assert found.text == expected.text
                        assert found.finish_reason == expected.finish_reason
                        # Of the model itself, whatever the tokens were drawn from.
                        assert found.logprobs == pytest.approx(expected.logprobs, abs=1e-3)
                        different.add(tuple(expected.tokens))
        finally:
            await there.close()
        return different

    assert len(asyncio.run(main())) > 20  # the settings make a difference


@pytest.mark.parametrize("form", ["sglang://127.0.0.1:{}", "openai://127.0.0.1:{}/v1"])
@pytest.mark.parametrize(
    "asked",
    [{"regex": "a(b"}, {"json_schema": '{"type": "nope"}'}, {"logit_bias": ((9999, 1.0),)}, {"frequency_penalty": 9.0}],
)
def test_what_the_server_refuses_is_the_caller_s_mistake(tagged_server: Any, form: str, asked: dict[str, Any]) -> None:
    async def main() -> None:
        engine = open_engine(form.format(tagged_server.port))
        try:
            await say(engine, "hm", replace(PLAIN, **asked))
        finally:
            await engine.close()

    with pytest.raises(UsageError, match="refuses the request") as refused:
        asyncio.run(main())
    assert "\n" not in str(refused.value)
