"""Lock-step groups: as if each had been generated alone; seen at every step, stopped at once, resampled uncopied."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import pytest
from engines import opened, quiet, until

import orchestra
from orchestra import Outcome, Thread, strategy
from orchestra.errors import CapabilityError, EngineError, UsageError
from orchestra.lockstep import GroupCut
from orchestra.runtime.engine import Step
from orchestra.testing import check_parity
from orchestra.testing.scripted import ScriptedEngine, replies
from orchestra.threads import Threads

PROMPT = "the answer is"


def on(
    folder: str, program: Any, prompt: str = PROMPT, engine: dict[str, Any] | None = None, **settings: Any
) -> Outcome:
    """Run a strategy on the model of a folder, check the cache after every step, and that nothing is left."""

    async def main() -> Outcome:
        async with opened(folder, debug=True, **(engine or {})) as local:
            idle = local.load().cached_bytes
            async with orchestra.connect(local) as connection:
                outcome = await connection.run(program, prompt, **settings)
            assert (await quiet(local)).cached_bytes == idle
            outcome.graph.check_integrity()
            await check_parity(local, outcome.graph)
            return outcome

    return asyncio.run(main())


def of(outcome: Outcome) -> list[list[int]]:
    return [node.tokens for node in outcome.graph.nodes if node.count("sampled")]


class Watch:
    """Keeps what it is shown; stops a group at given steps."""

    def __init__(self, *stops: int) -> None:
        self.steps: list[Step] = []
        self._stops = stops

    def __call__(self, step: Step) -> bool:
        self.steps.append(step)
        return len(self.steps) in self._stops


def plain(n: int = 5, **settings: Any) -> Any:
    @strategy
    async def plain_(thread: Thread) -> Thread:
        return (await thread.fork(n).generate(**settings))[0]

    return plain_()


def together(watch: Watch, n: int = 5, **settings: Any) -> Any:
    @strategy
    async def together_(thread: Thread) -> Thread:
        threads = thread.fork(n)
        while live := [thread for thread in threads if thread.finish_reason in (None, "paused")]:
            grown = iter(await Threads(live).generate_in_step(watch, **settings))
            threads = Threads(next(grown) if thread in live else thread for thread in threads)
        return threads[0]

    return together_()


WARM = {"temperature": 1.0, "max_tokens": 30}


@pytest.mark.parametrize("settings", [WARM, {"temperature": 0.0, "max_tokens": 9}, {**WARM, "top_p": 0.9}], ids=str)
def test_a_group_draws_what_its_members_would_alone(tiny: str, settings: dict[str, Any]) -> None:
    watch = Watch()
    assert of(on(tiny, together(watch, **settings))) == of(on(tiny, plain(**settings)))


def test_every_step_is_shown_with_its_probabilities(tiny: str) -> None:
    watch = Watch()
    outcome = on(tiny, together(watch, tempered=True, temperature=0.5, max_tokens=30))
    nodes = [node for node in outcome.graph.nodes if node.count("sampled")]
    for index, node in enumerate(nodes):
        span = node.spans[-1]
        seen = [(step, step.members.index(index)) for step in watch.steps if index in step.members]
        assert [step.tokens[at] for step, at in seen] == span.tokens
        assert [step.logprobs[at] for step, at in seen] == span.logprobs
        assert [step.tempered[at] for step, at in seen] == span.tempered
        assert [step.ended[at] for step, at in seen] == [False] * (span.count - 1) + [True]
        # Half the temperature: the law squared, so never above, by one amount for each prefix.
        assert all(law <= 1e-5 and law > 2 * raw for law, raw in zip(span.tempered, span.logprobs, strict=True))
    assert all(step.members == sorted(step.members) for step in watch.steps)


def test_stopped_groups_go_on_as_the_dense_forward_would(tiny: str) -> None:
    watch = Watch(1, 2, 3, 7, 20)
    outcome = on(tiny, together(watch, **WARM))
    reasons = [node.finish_reason for node in outcome.graph.nodes if node.count("sampled")]
    assert reasons.count("paused") >= 5
    assert set(reasons) <= {"paused", "stop", "length"}


def resampling(rounds: int, step: int, ancestors: Any, n: int = 6, load: Any = None) -> Any:
    @strategy
    async def resampling_(thread: Thread) -> Thread:
        threads = thread.fork(n)
        for _ in range(rounds):
            threads = await threads.generate_in_step(Watch(step), temperature=1.0, ignore_eos=True, max_tokens=step + 1)
            threads = threads.resample(ancestors)
        done = await threads.generate_in_step(lambda _: False, temperature=1.0, ignore_eos=True, max_tokens=4)
        if load is not None:
            await load(done)
        return done[0]

    return resampling_()


@pytest.mark.parametrize("engine", [{}, {"copy_bytes": 0}, {"forward": "transformers"}, {"prefill": 8}], ids=str)
@pytest.mark.parametrize(("rounds", "step"), [(4, 1), (3, 5), (2, 40)])
def test_resampled_members_go_on_from_their_ancestors(
    tiny: str, engine: dict[str, Any], rounds: int, step: int
) -> None:
    outcome = on(tiny, resampling(rounds, step, [0, 0, 0, 2, 4, 4]), engine=engine)
    chosen = [node for node in outcome.graph.nodes if "ancestors" in node.notes]
    assert [node.notes["ancestors"] for node in chosen] == [[0, 0, 0, 2, 4, 4]] * rounds
    # The program could not go on before all had stopped: the path through every round is as long as the threads.
    assert outcome.usage.critical_path_tokens == rounds * step + 4
    assert outcome.usage.sampled_tokens == 6 * (rounds * step + 4)
    last = [node for node in outcome.graph.nodes if node.count("sampled")][-6:]
    assert len({tuple(node.tokens) for node in last}) > 3  # copies go their own ways


def test_the_history_that_members_share_is_stored_once_and_that_of_the_dead_not_at_all(tiny: str) -> None:
    """Counted in tokens with keys and values, when all have come from one ancestor."""
    n, rounds, step = 8, 5, 10
    seen = {}

    async def main() -> None:
        async with opened(tiny, copy_bytes=0) as local, orchestra.connect(local) as connection:

            async def load(done: Threads) -> None:
                await until(lambda: not local.load().requests)
                seen["tokens"] = local.load().cached_tokens

            program = resampling(rounds, step, [3] * n, n=n, load=load)
            seen["prompt"] = (await local.encode_prompt(PROMPT)).count
            await connection.run(program, PROMPT)

    asyncio.run(main())
    # The prompt, the one line of ancestors, and the members' own last tokens, of which one each was not fed.
    assert seen["tokens"] == seen["prompt"] + rounds * step + n * 3


def test_what_is_gone_can_still_be_gone_on_from(tiny: str) -> None:
    @strategy
    async def back(thread: Thread) -> Thread:
        watch = Watch(5, 10)
        threads = await thread.fork(4).generate_in_step(watch, **WARM)
        alive = threads.resample([0] * 4)
        await alive.generate_in_step(watch, **WARM)
        dead = await threads[3].generate(temperature=0.0, max_tokens=6)
        return dead

    on(tiny, back())


def test_an_error_of_the_programs_look_is_the_programs(tiny: str) -> None:
    def look(step: Step) -> bool:
        raise ZeroDivisionError("mine")

    @strategy
    async def wrong(thread: Thread) -> Thread:
        with pytest.raises(ZeroDivisionError, match="mine"):
            await thread.fork(3).generate_in_step(look, **WARM)
        return await thread.generate(max_tokens=3)

    assert on(tiny, wrong()).usage.sampled_tokens == 3 + 3


def test_too_many_members_and_engines_without_lock_step_say_so(tiny: str) -> None:
    with pytest.raises(UsageError, match=r"5 generations in lock-step; .* takes 4 \(max_batch=\)"):
        on(tiny, together(Watch(), 5, **WARM), engine={"max_batch": 4})
    with pytest.raises(CapabilityError, match="cannot advance generations in lock-step; local:PATH can"):
        orchestra.run(together(Watch(), **WARM), PROMPT, engine=ScriptedEngine(replies("a b c $")))


def test_a_group_that_can_never_fit_is_refused_as_a_whole(tiny: str) -> None:
    with pytest.raises(EngineError, match=r"bytes .* the limit is 40000 \(memory=\)"):
        on(tiny, together(Watch(), 16, temperature=1.0, max_tokens=200, ignore_eos=True), engine={"memory": 40000})


def test_others_give_way_to_a_group_and_end_the_same(tiny: str) -> None:
    """In memory for one of the two at a time."""

    async def main(memory: int | None) -> list[Any]:
        async with opened(tiny, debug=True, memory=memory) as local, orchestra.connect(local) as connection:
            group = resampling(3, 30, [0, 0, 1, 1, 2, 3])
            runs = [connection.run(plain(6, **{**WARM, "max_tokens": 120, "ignore_eos": True}), PROMPT, seed=1)]
            runs.append(connection.run(group, PROMPT))
            return [of(outcome) for outcome in await asyncio.wait_for(asyncio.gather(*runs), 60)]

    assert asyncio.run(main(None)) == asyncio.run(main(3 * 6 * 256 * 256))


@pytest.mark.parametrize("limit", [1, 2, 7, 40])
def test_a_budget_is_shared_out_evenly_and_never_passed(tiny: str, limit: int) -> None:
    grown: list[Thread] = []

    @strategy
    async def spend(thread: Thread) -> Thread:
        try:
            await thread.fork(3).generate_in_step(lambda _: False, temperature=1.0, ignore_eos=True, max_tokens=50)
        except GroupCut as cut:
            grown.extend(cut.threads)
            raise
        raise AssertionError("the budget did not end it")

    outcome = on(tiny, spend(), budget=f"sampled_tokens={limit}")
    assert outcome.stopped_by == "sampled_tokens"
    assert outcome.usage.sampled_tokens == limit // 3 * 3
    assert [thread.sampled_tokens for thread in grown] == [limit // 3] * 3 * (limit >= 3)


def test_a_cancelled_group_leaves_nothing_and_counts_everything(tiny: str) -> None:
    async def main() -> None:
        async with opened(tiny, debug=True) as local, orchestra.connect(local) as connection:
            for tokens in (0, 1, 30, 200):
                reached = local.load().sampled_tokens + tokens
                program = resampling(50, 7, [0, 0, 0, 2, 4, 4])
                task = asyncio.create_task(connection.run(program, PROMPT))
                await until(lambda reached=reached: local.load().sampled_tokens >= reached)
                task.cancel()
                await asyncio.wait([task])
                load = await quiet(local)
                assert (load.requests, load.cached_tokens, load.cached_bytes) == (0, 0, 0)

    asyncio.run(main())


def test_events_of_a_group_come_as_of_any_threads(tiny: str) -> None:
    async def main() -> dict[int, int]:
        async with opened(tiny) as local, orchestra.connect(local) as connection:
            counts: dict[int, int] = {}
            texts: dict[int, str] = {}
            async for event in connection.stream(together(Watch(4), 3, **WARM), PROMPT):
                if event.kind == "token":
                    texts[event.node] = texts.get(event.node, "") + event.text
                if event.kind == "outcome":
                    graph = event.outcome.graph
                    counts = {node.id: node.count("sampled") for node in graph.nodes if node.count("sampled")}
                    assert all(texts.get(i, "") == graph.nodes[i].text for i in counts)
            return counts

    assert len(asyncio.run(main())) >= 3


def test_the_law_that_tokens_are_drawn_from_is_told(tiny: str) -> None:
    """Also where it is truncated: there it is the law of what is left."""
    import torch

    async def main(**settings: Any) -> tuple[Any, Any]:
        async with opened(tiny) as local, orchestra.connect(local) as connection:
            outcome = await connection.run("sample()", PROMPT, max_tokens=6, tempered=True, **settings)
            ids = outcome.graph.path_tokens(outcome.graph.nodes[-1].id)
            logits = local.plain_model()(torch.tensor([ids])).logits[0].double()
            return outcome.graph.nodes[-1], logits[-1 - outcome.graph.nodes[-1].count("sampled") : -1].log_softmax(-1)

    for settings in ({"temperature": 0.7}, {"powers": [1.5, 2.5, 4.0]}, {"temperature": 1.3, "top_k": 3}, {}):
        node, table = asyncio.run(main(**settings))
        span = node.spans[-1]
        for index, (token, law) in enumerate(zip(span.tokens, span.tempered, strict=True)):
            if not settings:
                assert law == 0  # greedy: nothing else could have been drawn
                continue
            power = settings["powers"][min(index, 2)] if "powers" in settings else 1 / settings["temperature"]
            scores = table[index] * power
            if "top_k" in settings:
                scores = scores.masked_fill(scores < scores.topk(3).values[-1], -math.inf)
            assert law == pytest.approx(float(scores.log_softmax(-1)[token]), abs=1e-4)


def test_members_for_whom_no_token_is_left_end_with_that_error_and_take_nobody_along(tiny: str) -> None:
    @strategy
    async def banned(thread: Thread) -> Thread:
        other = thread.start(temperature=1.0, max_tokens=40, ignore_eos=True)
        none = dict.fromkeys(range(267), -math.inf)
        with pytest.raises(EngineError, match="logit_bias bans every token"):
            await thread.fork(3).generate_in_step(Watch(), logit_bias=none, **WARM)
        return await other

    assert on(tiny, banned()).usage.sampled_tokens == 40


def test_a_group_that_is_refused_leaves_no_node_open(tiny: str) -> None:
    @strategy
    async def refused(thread: Thread) -> Thread:
        with pytest.raises(UsageError, match="in lock-step"):
            await thread.fork(5).generate_in_step(Watch(), **WARM)
        return await thread.generate(max_tokens=2)

    outcome = on(tiny, refused(), engine={"max_batch": 4})
    assert [node.finish_reason for node in outcome.graph.nodes[1:6]] == ["error"] * 5
