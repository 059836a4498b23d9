"""Special tokens in the text or out of it, and as stop strings: the same in process and on a real SGLang server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest
from conftest import TAGS, byte_tokenizer
from engines import opened, root

from orchestra.graph import Edge, ThreadGraph
from orchestra.runtime import sglang
from orchestra.runtime.connect import open_engine
from orchestra.runtime.engine import Delta, Engine, Request, Sampling
from orchestra.runtime.http import Fault
from orchestra.testing import check_engine

PROMPTS = ["the answer is", "<Goal>go", "hm", "abc", "xy z"]
EOS = 2
# Single tags, two in a row, a part of a tag, a tag and text, ordinary text, what a token ends in the middle of.
STOPS = [(), ("</Goal>",), ("<Goal><Goal>",), ("Goal",), ("</Path>", "<Path>"), ("><",), ("q",), ("<eos>",), ("s>",)]
MODES = [
    Sampling(max_tokens=40, stop=stop, skip_special_tokens=skip, ignore_eos=on)
    for stop in STOPS
    for skip in (True, False)
    for on in (True, False)
    if not (on and stop in (("s>",), ("><",)))  # servers look for stop strings in the text of ends, too
]


async def say(engine: Engine, prompt: str, sampling: Sampling, chunk: int = 0) -> Delta:
    graph = ThreadGraph()
    start = await root(engine, graph, prompt)
    node = graph.add([Edge(start.id, len(start))])
    whole = Delta()
    async for delta in engine.generate(Request(graph, node, sampling, chunk=chunk)):
        whole.merge(delta)
    await engine.release(graph)
    return whole


def told(delta: Delta) -> tuple[Any, ...]:
    return delta.tokens, delta.text, delta.finish_reason, delta.matched, delta.eos


def text_of(ids: list[int], *, skip: bool) -> str:
    """By the tokenizer itself, less the ends of sequence."""
    tokenizer = byte_tokenizer(tags=True)
    return str(tokenizer.decode([i for i in ids if i != EOS], skip_special_tokens=skip))


def test_the_text_shows_special_tokens_when_asked_to(tagged: str) -> None:
    async def main() -> None:
        async with opened(tagged) as engine:
            ended = tags = 0
            for prompt in PROMPTS:
                for ignore_eos in (True, False):
                    for chunk in (0, 1, 3):
                        hidden = await say(engine, prompt, Sampling(max_tokens=40, ignore_eos=ignore_eos), chunk)
                        shown = await say(
                            engine,
                            prompt,
                            Sampling(max_tokens=40, ignore_eos=ignore_eos, skip_special_tokens=False),
                            chunk,
                        )
                        assert shown.tokens == hidden.tokens
                        assert shown.text == text_of(shown.tokens, skip=False)
                        assert hidden.text == text_of(shown.tokens, skip=True)
                        assert "<eos>" not in shown.text
                        ended += shown.eos
                        tags += any(tag in shown.text for tag in TAGS)
                        assert not any(tag in hidden.text for tag in TAGS)
            assert ended
            assert tags > 20

    asyncio.run(main())


def test_stop_strings_end_at_the_same_token_whether_the_text_shows_them_or_not(tagged: str) -> None:
    async def main() -> None:
        found = set()
        async with opened(tagged) as engine:
            for prompt in PROMPTS:
                for sampling in MODES:
                    if not sampling.stop or not sampling.ignore_eos:
                        continue
                    free = await say(engine, prompt, replace(sampling, stop=()))
                    said = await say(engine, prompt, sampling)
                    texts = [byte_tokenizer(tags=True).decode(free.tokens[:k]) for k in range(len(free.tokens) + 1)]
                    ends = [k for k, text in enumerate(texts) if any(stop in text for stop in sampling.stop)]
                    assert said.tokens == free.tokens[: min(ends, default=len(free.tokens))]
                    if not ends:
                        assert (said.matched, said.finish_reason) == (None, "length")
                        continue
                    assert said.matched in sampling.stop
                    assert (said.finish_reason, said.eos) == ("stop", False)
                    whole = text_of(said.tokens, skip=sampling.skip_special_tokens)
                    at = whole.find(said.matched)
                    assert said.text == (whole if at < 0 else whole[: at + len(said.matched)])
                    found.add((said.matched, sampling.skip_special_tokens))
        assert {("</Goal>", True), ("</Goal>", False), ("Goal", False), ("<eos>", True), ("q", True)} <= found

    asyncio.run(main())


def test_the_end_is_the_end_unless_it_is_asked_for_by_name(tagged: str) -> None:
    async def main() -> None:
        async with opened(tagged) as engine:
            for skip in (True, False):
                sampling = Sampling(max_tokens=40, skip_special_tokens=skip)
                for stop in ((), ("s>",), ("eos",)):
                    said = await say(engine, "hm", replace(sampling, stop=stop))
                    assert (said.tokens[-1], said.eos, said.matched) == (EOS, True, None)
                named = await say(engine, "hm", replace(sampling, stop=("<eos>",)))
                assert (named.tokens[-1], named.eos, named.matched) == (EOS, False, "<eos>")
                assert named.text == said.text

    asyncio.run(main())


@pytest.mark.parametrize("form", ["sglang://{}", "openai://{}/v1"])
def test_a_server_tells_the_same(tagged: str, tagged_server: Any, form: str) -> None:
    async def main() -> None:
        there = open_engine(form.format(f"127.0.0.1:{tagged_server.port}"))
        async with opened(tagged) as here:
            await say(there, "hm", Sampling(max_tokens=40))  # here the OpenAI engine learns what an end is
            for prompt in PROMPTS[:3]:
                expected = [await say(here, prompt, sampling) for sampling in MODES]
                for chunk in (0, 1):
                    said = await asyncio.gather(*(say(there, prompt, sampling, chunk) for sampling in MODES))
                    for sampling, ours, theirs in zip(MODES, expected, said, strict=True):
                        assert told(theirs) == told(ours), (prompt, sampling, chunk)
        await there.close()

    asyncio.run(main())


def test_a_group_and_what_is_cancelled_of_it_show_no_end(tagged: str, tagged_server: Any) -> None:
    async def main() -> None:
        there = open_engine(f"sglang://127.0.0.1:{tagged_server.port}")
        await there.open()
        for skip in (True, False):
            for cancelled in (False, True):
                graph = ThreadGraph()
                start = await root(there, graph, "hm")
                sampling = Sampling(1.0, max_tokens=400, ignore_eos=cancelled, skip_special_tokens=skip)
                nodes = [graph.add([Edge(0, len(start))], path=[k]) for k in range(4)]
                streams = there.generate_group([Request(graph, node, sampling, chunk=1) for node in nodes])
                if cancelled:
                    await anext(streams[0])
                    await asyncio.sleep(0.1)
                wholes = [Delta() for _ in streams]
                for whole, stream in zip(wholes, streams, strict=True):
                    if cancelled:
                        stream.cancel()
                    async for delta in stream:
                        whole.merge(delta)
                for whole in wholes[cancelled:]:
                    assert "<eos>" not in whole.text
                    if not cancelled:
                        assert whole.text == text_of(whole.tokens, skip=skip)
                await there.release(graph)
        await there.close()

    asyncio.run(main())


@pytest.mark.parametrize("after", [1, 6])
def test_a_generation_that_breaks_and_goes_on_tells_the_same(
    tagged: str, tagged_server: Any, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stop of several special tokens may lie across the break; neither half of it is one."""
    events, left = sglang.events, [0]

    async def breaking(response: Any) -> AsyncIterator[Any]:
        async for batch in events(response):
            yield batch
            left[0] -= 1
            if left[0] == 0:
                raise Fault("it broke")

    monkeypatch.setattr(sglang, "events", breaking)
    stops: list[tuple[str, ...]] = [(), ("<Goal><Goal>",), ("</Path>",), ("l><P",)]

    async def main() -> None:
        there = open_engine(f"sglang://127.0.0.1:{tagged_server.port}")
        async with opened(tagged) as here:
            for prompt in PROMPTS[:3]:
                for stop in stops:
                    for skip in (True, False):
                        for ignore_eos in (True, False):
                            sampling = Sampling(
                                max_tokens=40, stop=stop, skip_special_tokens=skip, ignore_eos=ignore_eos
                            )
                            left[0] = after
                            theirs = await say(there, prompt, sampling, 1)
                            assert told(theirs) == told(await say(here, prompt, sampling)), (prompt, sampling)
        await there.close()

    asyncio.run(main())


@pytest.mark.parametrize("form", ["sglang://{}", "openai://{}/v1"])
def test_the_protocol_is_kept(tagged_server: Any, form: str) -> None:
    async def main() -> list[str]:
        engine = open_engine(form.format(f"127.0.0.1:{tagged_server.port}"))
        try:
            return await check_engine(engine, "the answer is")
        finally:
            await engine.close()

    assert "stops" in asyncio.run(main())
