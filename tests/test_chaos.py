"""Runs on a real server through a network that breaks: none lost, none counted twice, every text as it should be."""

from __future__ import annotations

import asyncio
import time

import pytest
from chaos import ChaosProxy
from conftest import started

import orchestra
from orchestra.errors import EngineDown, EngineError
from orchestra.runtime.connect import EMBEDDED
from orchestra.runtime.sglang_server import SGLangServer

PROMPT = "numbers: 3 7 8 12 target: 55"
FAULTS = ("reset", "half", "stall", "429", "500", "malformed", "slow")
LIMITS = "timeout=4&retries=14&patience=30"  # answers that come whole are silent for a while on a busy machine
FORMS = {
    "each by itself": f"sglang://127.0.0.1:{{}}?n=off&{LIMITS}",
    "together": f"sglang://127.0.0.1:{{}}?{LIMITS}",
    "openai": f"openai://127.0.0.1:{{}}/v1?n=off&{LIMITS}",
}


async def endure(url: str, proxy: ChaosProxy, runs: int, spec: str, live: bool, max_tokens: int) -> None:
    """Greedy runs, so that each text is known: whatever was resumed or tried again must come out the same."""
    settings = {"temperature": 0, "max_tokens": max_tokens}
    async with orchestra.connect(url) as connection:
        rate, proxy.rate = proxy.rate, 0.0
        calm = (await connection.run("sample", PROMPT, **settings)).candidates[0]
        before = connection.engine.load().sampled_tokens
        proxy.rate = rate
        waiting = iter(range(runs))
        outcomes = []

        async def work() -> None:
            for seed in waiting:
                if not live:
                    outcomes.append(await connection.run(spec, PROMPT, seed=seed, **settings))
                    continue
                shown = ""
                async for event in connection.stream(spec, PROMPT, seed=seed, **settings):
                    shown += event.text if event.kind == "token" else ""
                outcomes.append(event.outcome)
                assert len(shown) == sum(len(node.text) for node in event.outcome.graph.nodes[1:])

        async with asyncio.TaskGroup() as group:
            for _ in range(16):
                group.create_task(work())
        proxy.rate = 0.0

        assert len(outcomes) == runs
        for outcome in outcomes:
            assert [(c.text, c.tokens, c.finish_reason) for c in outcome.candidates] == [
                (calm.text, calm.tokens, calm.finish_reason)
            ] * 8
            assert outcome.usage.sampled_tokens == 8 * calm.tokens == outcome.graph.count("sampled")
            assert outcome.usage.requests == 8
        assert connection.engine.load().sampled_tokens - before == runs * 8 * calm.tokens
        assert connection.engine.load().requests == 0
        assert connection.engine.server.gate.held == 0


def storm(port: int, form: str, fault, runs: int, live: bool = False, max_tokens: int = 40) -> None:
    async def main() -> None:
        async with ChaosProxy(port, fault=fault, rate=0.2, seed=runs) as proxy:
            await endure(FORMS[form].format(proxy.port), proxy, runs, "self_consistency(samples=8)", live, max_tokens)
            assert sum(proxy.faults.values()) > 0.1 * proxy.requests, "the storm was calm"
            assert proxy.requests >= runs

    asyncio.run(main())


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault(sglang_server, fault: str) -> None:
    storm(sglang_server.port, "each by itself", fault, 12)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("live", [False, True])
def test_all_faults(sglang_server, form: str, live: bool) -> None:
    storm(sglang_server.port, form, FAULTS, 20, live)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("form", "fault"),
    [*(("each by itself", fault) for fault in FAULTS), ("together", FAULTS), ("openai", FAULTS)],
    ids=str,
)
def test_a_thousand_runs(sglang_server, form: str, fault) -> None:
    storm(sglang_server.port, form, fault, 1000, max_tokens=12)


def test_a_server_that_is_away_for_a_while_costs_retries_not_results(sglang_server) -> None:
    async def main() -> None:
        async with ChaosProxy(sglang_server.port, rate=0.0) as proxy:
            url = FORMS["each by itself"].format(proxy.port)
            async with orchestra.connect(url) as connection:
                calm = await connection.run("sample", PROMPT, temperature=0, max_tokens=200)
                task = asyncio.ensure_future(
                    connection.run("self_consistency(samples=6)", PROMPT, temperature=0, max_tokens=200)
                )
                await asyncio.sleep(0.3)
                await proxy.stop_accepting()  # in the middle of all six
                await asyncio.sleep(2)
                assert not task.done()
                await proxy.start_accepting()
                outcome = await task
                assert [c.text for c in outcome.candidates] == [calm.text] * 6
                assert outcome.usage.sampled_tokens == 6 * calm.usage.sampled_tokens

    asyncio.run(main())


def test_a_server_that_stays_dead_is_one_error_in_the_stated_time(sglang_server) -> None:
    async def main() -> None:
        async with ChaosProxy(sglang_server.port, rate=0.0) as proxy:
            url = f"sglang://127.0.0.1:{proxy.port}?timeout=2&patience=3&n=off"
            async with orchestra.connect(url) as connection:
                task = asyncio.ensure_future(connection.run("self_consistency(samples=6)", PROMPT, max_tokens=2000))
                await asyncio.sleep(0.3)
                died = time.monotonic()
                await proxy.stop_accepting()
                with pytest.raises(EngineDown, match="has not answered for 3 seconds") as caught:
                    await task
                assert "\n" not in str(caught.value)
                assert 3 <= time.monotonic() - died < 3 + 8 + 10  # patience, the longest backoff, and a busy machine
                assert connection.engine.load().requests == 0

    asyncio.run(main())


@pytest.mark.slow
def test_a_server_killed_and_started_again_in_the_middle_of_an_evaluation(tmp_path) -> None:
    from orchestra.evaluation.runner import evaluate
    from orchestra.evaluation.store import Plan, Record
    from orchestra.evaluation.tasks import load_task

    task = load_task("countdown", level="small", split="dev")
    plan = Plan(task="countdown", strategy="first_finish(samples=4)", limit=24, max_tokens=400)
    records: list[Record] = []

    async def main(port: int, again) -> None:
        async with orchestra.connect(f"sglang://127.0.0.1:{port}?patience=200") as connection:
            work = asyncio.ensure_future(evaluate(connection, task, plan, records.append, concurrency=8))
            while len(records) < 6:  # noqa: ASYNC110 (records come by callback)
                await asyncio.sleep(0.05)
            await asyncio.to_thread(again.stop)  # killed with its family
            again.start()
            await again.ready(240)
            await work

    with started(SGLangServer, EMBEDDED, tmp_path / "server.log") as server:
        asyncio.run(main(server.port, server))
    assert len(records) == 24
    assert not [record.error for record in records if record.failed]
    assert len({record.id for record in records}) == 24


def test_an_evaluation_ends_with_one_error_when_the_server_is_gone(sglang_server) -> None:
    """Not with as many failed samples as there were left."""
    from orchestra.evaluation.runner import evaluate
    from orchestra.evaluation.store import Plan, Record
    from orchestra.evaluation.tasks import load_task

    task = load_task("countdown", level="small", split="dev")
    plan = Plan(task="countdown", strategy="sample", limit=200, max_tokens=20)
    records: list[Record] = []

    async def main() -> None:
        async with ChaosProxy(sglang_server.port, rate=0.0) as proxy:
            url = f"sglang://127.0.0.1:{proxy.port}?timeout=2&patience=1"
            async with orchestra.connect(url) as connection:
                work = asyncio.ensure_future(evaluate(connection, task, plan, records.append, concurrency=4))
                while len(records) < 3:  # noqa: ASYNC110 (records come by callback)
                    await asyncio.sleep(0.01)
                await proxy.stop_accepting()
                with pytest.raises(EngineError):
                    await work

    asyncio.run(main())
    assert 3 <= len(records) < 200
    assert not any(record.failed for record in records)
