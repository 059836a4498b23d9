"""The SGLang engine on a real server: the protocol, the same text as in process, cancellation, bad input."""

from __future__ import annotations

import asyncio
import json
import urllib.request
from dataclasses import replace

import pytest

import orchestra
from orchestra import FirstFinish, Thread, strategy
from orchestra.errors import CapabilityError, EngineError, PromptError, UsageError
from orchestra.evaluation.tasks import load_task
from orchestra.graph import Edge, Span, ThreadGraph
from orchestra.runtime.connect import open_engine
from orchestra.runtime.engine import Delta, Request, Sampling
from orchestra.testing import check_agreement, check_engine, check_strategy
from orchestra.training.tokenizer import IDS

PROMPT = "numbers: 3 7 8 12 target: 55"
VOCABULARY = len(IDS)
"""Of the embedded model, which the server runs."""
SGLANG, ALONE, OPENAI = "sglang://{}", "sglang://{}?n=off", "openai://{}/v1"


@strategy
async def joined(thread: Thread, sides: int = 3) -> Thread:
    sides_ = await thread.fork(sides).generate(max_tokens=20)
    return await thread.join(sides_, "\n", how="recompute").generate(max_tokens=60)


def opened(form, server):
    return open_engine(form.format(f"127.0.0.1:{server.port}"))


def running(server) -> tuple[int, int]:
    """Requests that the server itself says are running or waiting."""
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/v1/loads", timeout=10) as answer:
        [load] = json.load(answer)["loads"]
    return load["num_running_reqs"], load["num_waiting_reqs"]


async def idle(server) -> bool:
    """Whether the server comes to rest; it reports its load every few steps."""
    for _ in range(100):
        if await asyncio.to_thread(running, server) == (0, 0):
            return True
        await asyncio.sleep(0.05)
    return False


@pytest.mark.parametrize("form", [SGLANG, ALONE, OPENAI])
def test_it_keeps_the_protocol(sglang_server, form: str) -> None:
    async def main() -> list[str]:
        engine = opened(form, sglang_server)
        try:
            return await check_engine(engine)
        finally:
            await engine.close()

    done = asyncio.run(main())
    assert {"deltas", "stops", "continues", "forced_text", "logprobs", "scores", "cut", "too_long"} <= set(done)


SPECS = ["sample", "self_consistency(samples=4)", "first_finish(samples=4)", "best_of(samples=3)", "spawn_join",
         "spawn_join(children=3)", "first_finish(samples=2, drafts=spawn_join)", joined()]  # fmt: skip


ON_OPENAI = [(OPENAI, spec) for spec in ("self_consistency(samples=4)", "spawn_join(children=3)", joined())]


@pytest.mark.parametrize(("form", "spec"), [*((SGLANG, spec) for spec in SPECS), *ON_OPENAI], ids=str)
def test_greedy_text_is_that_of_the_in_process_engine(sglang_server, form: str, spec) -> None:
    items = load_task("countdown", level="small", split="dev").items(2)

    async def main() -> list[bool]:
        here, there = open_engine("demo"), opened(form, sglang_server)
        try:
            return [await check_agreement(here, there, spec, i.prompt, temperature=0, max_tokens=260) for i in items]
        finally:
            await here.close()
            await there.close()

    assert any(asyncio.run(main())), "every one of them met a close call"


SHORTEST = "first_finish(samples=4, first=2, until='thinking', thinking_end='=')"
SURE = "confidence_vote(samples=6, warmup=3, batch=3, window=16, keep=0.5, consensus=1)"
MUST_NOT = {
    SGLANG: ["first_finish(samples=4)", "self_consistency(samples=3)", "spawn_join", SHORTEST, SURE],
    OPENAI: ["first_finish(samples=4)", "self_consistency(samples=3)", "spawn_join", SHORTEST],
}


@pytest.mark.parametrize("form", [SGLANG, OPENAI])
def test_what_a_strategy_must_not_do(sglang_server, form: str) -> None:
    async def main() -> None:
        engine = opened(form, sglang_server)
        try:
            for spec in MUST_NOT[form]:
                await check_strategy(engine, spec, PROMPT, temperature=0.9, max_tokens=60)
        finally:
            await engine.close()
        assert await idle(sglang_server)

    asyncio.run(main())


async def races(engine, count: int) -> list[str]:
    """Races that end early in all ways: won after a few tokens, cancelled from outside, out of time."""
    stopped = []

    async def one(connection, index: int) -> None:
        settings = {"temperature": 1.5, "max_tokens": 30, "seed": index}
        task = asyncio.ensure_future(
            connection.run(
                "first_finish(samples=4)", PROMPT, budget="wall_seconds=0.2" if index % 3 == 2 else None, **settings
            )
        )
        if index % 3 == 1:
            await asyncio.sleep(index % 7 * 0.004)
            task.cancel()
        [done], _ = await asyncio.wait([task])
        stopped.append("cancelled" if done.cancelled() else str(done.result().stopped_by))

    async with orchestra.connect(engine) as connection:
        waiting = iter(range(count))

        async def work() -> None:
            for index in waiting:
                await one(connection, index)

        await asyncio.gather(*(work() for _ in range(12)))
    return stopped


@pytest.mark.parametrize(
    ("form", "count"), [(SGLANG, 120), (OPENAI, 60), pytest.param(SGLANG, 1000, marks=pytest.mark.slow)]
)
def test_cancelled_races_leave_nothing(sglang_server, form: str, count: int) -> None:
    async def main() -> None:
        engine = opened(form, sglang_server)
        await engine.open()
        before = len(asyncio.all_tasks())
        stopped = await races(engine, count)
        assert len(stopped) == count
        assert stopped.count("cancelled") == sum(i % 3 == 1 for i in range(count))
        assert await idle(sglang_server), f"the server still has {running(sglang_server)}"
        for _ in range(100):  # the last aborts are answered
            if not engine.server.sockets and len(asyncio.all_tasks()) == before:
                break
            await asyncio.sleep(0.05)
        assert (engine.load().requests, engine.server.gate.held, engine.server.sockets) == (0, 0, 0)
        assert len(asyncio.all_tasks()) == before
        await engine.close()

    asyncio.run(main())


def test_a_race_stops_its_losers_on_the_server(sglang_server) -> None:
    """The losers would go on for thousands of tokens; they are charged what was decoded by then, and end at once."""

    @strategy
    async def short_and_long(thread: Thread) -> Thread:
        async def run(branch: Thread) -> Thread:
            most = 8 if branch.path[-1] == 2 else 3000
            return await branch.generate(temperature=1, ignore_eos=True, max_tokens=most)

        [winner] = await thread.fork(4).race(work=run)
        return winner

    async def main() -> None:
        engine = opened(SGLANG, sglang_server)
        async with orchestra.connect(engine) as connection:
            outcome = await connection.run(short_and_long(), PROMPT)
            counts = [node.count("sampled") for node in outcome.graph.nodes if node.finish_reason == "cancelled"]
            assert outcome.usage.critical_path_tokens == 8
            assert len(counts) == 3
            assert max(counts) < 300
            assert outcome.usage.sampled_tokens == 8 + sum(counts) == engine.load().sampled_tokens
        await engine.close()
        assert await idle(sglang_server)

    asyncio.run(main())


@strategy
async def uneven(thread: Thread) -> Thread:
    """Fork k goes on for 400 tokens, but for the sixth, which ends after 60."""
    most = 60 if thread.path[-1] == 5 else 400
    return await thread.generate(temperature=1, ignore_eos=True, max_tokens=most)


def test_the_losers_of_first_finish_search_stop_with_the_winner(sglang_server) -> None:
    """Eight samples in one batch: when the first has ended the others are a few tokens ahead of what is told here."""

    async def main() -> list[int]:
        engine, late = opened(SGLANG, sglang_server), []
        async with orchestra.connect(engine) as connection:
            for seed in range(4):
                outcome = await connection.run(FirstFinish(samples=8, drafts=uneven()), PROMPT, seed=seed)
                counts = [n.count("sampled") for n in outcome.graph.nodes if n.finish_reason == "cancelled"]
                assert (len(counts), outcome.usage.critical_path_tokens) == (7, 60)
                assert outcome.usage.sampled_tokens == 60 + sum(counts)
                late.append(max(counts) - 60)
        await engine.close()
        return late

    late = asyncio.run(main())
    assert min(late) <= 8  # a busy machine may hear late of one race, not of all
    assert asyncio.run(idle(sglang_server))


def test_log_probabilities_are_the_models_own_at_any_temperature(sglang_server) -> None:
    """The server reports them at the sampling temperature; the in-process engine scores the same tokens."""

    async def main() -> None:
        here, there = open_engine("demo"), opened(SGLANG, sglang_server)
        async with orchestra.connect(there) as connection:
            for temperature in (0.0, 0.5, 1.0, 2.5):
                outcome = await connection.run("sample", PROMPT, temperature=temperature, logprobs=True, max_tokens=40)
                node = outcome.graph.nodes[-1]
                [sampled] = [span for span in node.spans if span.origin == "sampled"]
                scored = (await here.score(outcome.graph, node))[-sampled.count :]
                assert sampled.logprobs == pytest.approx(scored, abs=2e-4), temperature
        assert there._tempered is True
        await here.close()
        await there.close()

    asyncio.run(main())


def test_tempered_log_probabilities_come_beside_the_models_own(sglang_server) -> None:
    async def main() -> Delta:
        engine = opened(SGLANG, sglang_server)
        graph = ThreadGraph()
        root = graph.add(spans=[await engine.encode_prompt(PROMPT)])
        whole = Delta()
        node = graph.add([Edge(root.id, len(root))])
        async for delta in engine.generate(
            Request(graph, node, Sampling(2.0, max_tokens=30, top_logprobs=VOCABULARY, tempered=True))
        ):
            whole.merge(delta)
        await engine.close()
        return whole

    import math

    said = asyncio.run(main())
    assert len(said.tempered) == len(said.logprobs) == len(said.top) == said.count
    for raw, tempered, top in zip(said.logprobs, said.tempered, said.top, strict=True):
        normaliser = math.log(sum(math.exp(value / 2) for value in top.values()))  # all tokens are in it
        assert tempered == pytest.approx(raw / 2 - normaliser, abs=1e-3)


def test_bad_input_is_one_clear_error(sglang_server) -> None:
    where = f"127.0.0.1:{sglang_server.port}"

    async def refusal(url: str, prompt="numbers: 3", spec="sample", **settings) -> BaseException:
        with pytest.raises(orchestra.OrchestraError) as caught:
            async with orchestra.connect(url) as connection:
                await connection.run(spec, prompt, **settings)
        assert "\n" not in str(caught.value)
        return caught.value

    async def main() -> None:
        for scheme in (f"sglang://{where}", f"openai://{where}/v1"):
            empty = await refusal(scheme, " ")
            assert isinstance(empty, PromptError)
            assert "empty" in str(empty)
            long = await refusal(scheme, "3 " * 5000)
            assert isinstance(long, PromptError)
            assert "4096" in str(long)
            model = await refusal(scheme + "?model=gpt-9")
            assert isinstance(model, UsageError)
            assert "gpt-9" in str(model)
            assert "embedded" in str(model)  # what it serves
            messages = await refusal(scheme, [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}])
            assert isinstance(messages, PromptError)
            assert "chat template" in str(messages)
        joins = await refusal(f"sglang://{where}", PROMPT, two_reuse())
        assert isinstance(joins, CapabilityError)
        dead = await refusal("sglang://127.0.0.1:9")
        assert isinstance(dead, EngineError)
        assert "cannot reach sglang://127.0.0.1:9" in str(dead)
        other = await refusal(f"openai://{where}/v2")
        assert f"openai://{where}/v2" in str(other)

    @strategy
    async def two_reuse(thread: Thread) -> Thread:
        return await thread.join(await thread.fork(2).generate(max_tokens=2), "\n", how="reuse").generate()

    asyncio.run(main())


@pytest.mark.parametrize("form", [SGLANG, OPENAI])
@pytest.mark.parametrize("token", [VOCABULARY, 10**6, -1])
def test_a_token_outside_the_vocabulary_does_not_reach_the_server(sglang_server, form: str, token: int) -> None:
    """It would end the server."""

    async def main() -> None:
        engine = opened(form, sglang_server)
        await engine.open()
        graph = ThreadGraph()
        root = graph.add(spans=[Span("prompt", [1, 16, token], 3, "?")])
        with pytest.raises(PromptError, match=rf"token id {token} .* 0\.\.{VOCABULARY - 1}"):
            async for _ in engine.generate(Request(graph, graph.add([Edge(0, 3)]), Sampling(max_tokens=3))):
                pass
        with pytest.raises(PromptError, match="vocabulary"):
            await engine.score(graph, root)
        good = ThreadGraph()
        good.add(spans=[Span("prompt", [1, 16, VOCABULARY - 1], 3, "?")])  # the last of the vocabulary
        async for delta in engine.generate(Request(good, good.add([Edge(0, 3)]), Sampling(max_tokens=3))):
            assert delta.finish_reason in (None, "stop", "length")
        await engine.close()

    asyncio.run(main())


def test_a_generation_that_fills_the_context_ends_by_length(sglang_server) -> None:
    async def main() -> None:
        engine = opened(SGLANG, sglang_server)
        await engine.open()
        graph = ThreadGraph()
        ids = [1] + [27] * (engine.context_length - 8)
        graph.add(spans=[Span("prompt", ids, len(ids), "...")])
        node = graph.add([Edge(0, len(ids))])
        whole = Delta()
        settings = Sampling(ignore_eos=True)
        async for delta in engine.generate(Request(graph, node, settings)):
            whole.merge(delta)
        assert whole.finish_reason == "length"
        assert 4 <= whole.count <= 8  # servers keep a few tokens of the context for themselves
        node.spans.append(Span("sampled", whole.tokens, whole.count, whole.text))
        full = graph.add([Edge(node.id, whole.count)])  # longer than the server's longest input
        [end] = [delta async for delta in engine.generate(Request(graph, full, replace(settings, max_tokens=3)))]
        assert (end.finish_reason, end.count) == ("length", 0)
        await engine.close()

    asyncio.run(main())
