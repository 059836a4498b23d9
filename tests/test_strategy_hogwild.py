"""Hogwild: what workers see, when steps end, who stops; on scripts, and on real models against one dense forward."""

from __future__ import annotations

import asyncio

import pytest
from engines import opened, quiet
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from playing import play

import orchestra
from orchestra.errors import CapabilityError, UsageError
from orchestra.runtime.local.model import load_plain
from orchestra.shared_cache import Headers
from orchestra.testing import check_concurrent_parity
from orchestra.testing.scripted import ScriptedEngine

PLAIN = "instruct=False, past='', others='', own='', check_every=0, finish='', ban_eos=False, ban=[]"
LAYOUTS = ("combined", "interleaved", "contiguous")


def steps(outcome):
    """What each concurrent node says, in the order of the graph."""
    return [node.text for node in outcome.graph.nodes if node.views]


class Lines:
    """A script: worker w says its lines one after the other; what it was shown each time is kept."""

    def __init__(self, *workers):
        self.lines = [list(lines) for lines in workers]
        self.shown = []

    def __call__(self, context, path):
        self.shown.append((path[0], context))
        lines = self.lines[path[0]] if path[0] < len(self.lines) else [" 5 }"]
        return lines.pop(0) if lines else " $"


def run(script, spec, prompt="numbers", **options):
    engine = ScriptedEngine(script)
    return play(spec, engine, prompt, **options), engine


def test_steps_end_at_an_empty_line_and_a_boxed_answer_ends_all():
    script = Lines([" we add.\n\n", " so \\boxed{7} it is.\n\n", " never"], [" w" * 40])
    outcome, _ = run(script, f"hogwild({PLAIN})")
    assert outcome.answer == "7"
    assert steps(outcome)[0] == "Alice [1]: we add.\n\n"
    assert "Alice [2]: so \\boxed{7} it is.\n\n" in steps(outcome)
    loser = next(node for node in outcome.graph.nodes if node.text.startswith("Bob"))
    assert loser.finish_reason == "cancelled"
    assert outcome.usage.critical_path_tokens == 3 + 5
    assert outcome.finish_reason == "stop"
    assert "never" not in outcome.text


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_a_worker_is_shown(layout):
    script = Lines([" one.\n\n", " two.\n\n", " $"], [" a b c d e.\n\n", " $"])
    headers = "past='PAST ', others='OTHERS ', own='OWN '"
    spec = f"hogwild(instruct=False, layout='{layout}', {headers}, finish='', ban_eos=False, ban=[], check_every=0)"
    run(script, spec)
    second = next(context for worker, context in script.shown if worker == 0 and "Alice [2]" in context)
    first = "Alice [1]: one.\n\n"
    beside = "" if layout == "interleaved" else "OTHERS Bob [1]:"
    own = f"OWN {first}" if layout == "contiguous" else "OWN "
    past = "PAST " if layout == "contiguous" else f"PAST {first}"
    assert second.startswith(f"numbers{past}{beside}")
    assert second.endswith(f"{own}Alice [2]:")


def test_a_step_goes_on_over_an_empty_line_in_code():
    script = Lines([" see ```\n x = 1.\n\n", " y = 2.\n\n", " ```.\n\n", " $"], [" $"])
    outcome, _ = run(script, f"hogwild({PLAIN})")
    assert ("Alice [1]: see ```\n x = 1.\n\n y = 2.\n\n ```.\n\nAlice [2]:") in outcome.text


def test_a_step_that_is_cut_off_goes_on():
    script = Lines([" a b c", " d.\n\n", " $"], [" $"])
    outcome, _ = run(script, f"hogwild({PLAIN}, step_tokens=3)")
    assert "Alice [1]: a b c d.\n\nAlice [2]:" in outcome.text
    # The token that the cut left unread is read at the beginning of what goes on.
    cut = next(node for node in outcome.graph.nodes if node.text.startswith("Alice [1]"))
    after = outcome.graph.nodes[cut.id + 2 :]
    assert any(node.tokens[:1] == cut.tokens[-1:] for node in after)


def test_the_question_about_redundant_work_comes_in_the_next_step():
    script = Lines([" a b c d.\n\n", " e.\n\n", " f.\n\n", " $"], [" $"])
    outcome, _ = run(script, f"hogwild({PLAIN.replace('check_every=0', 'check_every=4')}, check=' Sure?')")
    said = [text for text in steps(outcome) if text.startswith("Alice")]
    assert [("Sure?" in text) for text in said] == [False, True, False, True]


def test_who_has_no_answer_is_asked_in_view_of_everything():
    script = Lines([" one.\n\n", " $"], [" two.\n\n", " $"])
    spec = "hogwild(instruct=False, past='', others='', own='', ban_eos=False, ban=[], finish=' Answer: \\\\boxed{')"
    outcome, engine = run(script, spec)
    assert outcome.answer == "5"
    asked = script.shown[-1][1]
    assert "one." in asked
    assert "two." in asked
    assert engine.requests[-1].sampling.temperature == 0


def test_every_worker_has_its_tokens_and_steps():
    endless = ScriptedEngine(lambda context, path: " w" * 200)
    outcome = play(f"hogwild(workers=3, {PLAIN}, max_tokens=50, step_tokens=20)", endless, "x")
    assert outcome.usage.sampled_tokens == 150
    assert outcome.usage.critical_path_tokens == 50
    lines = ScriptedEngine(lambda context, path: " so.\n\n")
    outcome = play(f"hogwild(workers=4, {PLAIN}, steps=3)", lines, "x")
    assert len(steps(outcome)) == 12


@pytest.mark.parametrize("budget", ["sampled_tokens=30", "critical_path_tokens=9", "requests=4", "wall_seconds=7"])
def test_a_budget_that_ends_leaves_what_was_written(budget):
    endless = ScriptedEngine(lambda context, path: " w w w w.\n\n")
    outcome = play(f"hogwild(workers=3, {PLAIN})", endless, "x", budget=budget)
    limit, _, most = budget.partition("=")
    assert getattr(outcome.usage, limit) <= float(most)
    assert outcome.stopped_by == limit
    assert "Alice [1]: w" in outcome.text


# -- on real models ----------------------------------------------------------------------------------------------------


@given(
    st.integers(0, 10**6),
    st.sampled_from(LAYOUTS),
    st.integers(2, 4),
    st.integers(3, 12),
    st.integers(0, 3),
    st.booleans(),
)
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
def test_what_is_sampled_is_attention_over_the_recorded_views(tiny, plain, seed, layout, workers, size, heads, crowd):
    headers = ["past='', others='', own=''", "past=' p', others='', own=' me'", "others=' o'", "own=''"][heads]
    spec = f"hogwild(workers={workers}, layout='{layout}', instruct=False, {headers}, step_tokens={size}, " + (
        "max_tokens=22, step_ends=['e', 't', 'a', 'f'], finish=' so', finish_tokens=4)"
    )

    async def main():
        async with opened(tiny, max_batch=16) as engine, orchestra.connect(engine) as connection:
            others = [
                connection.run("sample", "another", seed=i, temperature=1.0, max_tokens=40) for i in range(3 * crowd)
            ]
            outcome, *_ = await asyncio.gather(
                connection.run(spec, "the answer is", seed=seed, temperature=1.0), *others
            )
            check_concurrent_parity(outcome.graph, plain)
            outcome.graph.check_integrity()
            load = await quiet(engine)
            assert (load.cached_tokens, load.cached_bytes, load.requests) == (0, 0, 0)
            return outcome.text

    texts = {asyncio.run(main()) for _ in range(2)}
    assert len(texts) == 1


@pytest.fixture(scope="module")
def plain(tiny):
    return load_plain(tiny)


def test_the_result_does_not_depend_on_what_else_runs(tiny):
    spec = "hogwild(workers=3, instruct=False, max_tokens=60, step_tokens=25, step_ends=['e', 'a'], finish_tokens=5)"

    async def alone(**options):
        async with opened(tiny, **options) as engine, orchestra.connect(engine) as connection:
            return (await connection.run(spec, "the answer is", seed=3, temperature=1.0)).text

    async def crowded():
        async with opened(tiny, max_batch=5, prefill=7) as engine, orchestra.connect(engine) as connection:
            runs = [connection.run(spec, "the answer is", seed=seed, temperature=1.0) for seed in (3, 4, 5)]
            more = [connection.run("self_consistency(samples=3)", "x " * 60, max_tokens=30) for _ in range(3)]
            return (await asyncio.gather(*runs, *more))[0].text

    right = asyncio.run(alone())
    assert asyncio.run(crowded()) == right
    assert asyncio.run(alone(copy_bytes=0, kernel="reference")) == right


def test_a_wrong_rotation_is_noticed(tiny, plain, monkeypatch):
    from orchestra.runtime.local.gang import LocalGang

    true = LocalGang._turn
    monkeypatch.setattr(LocalGang, "_turn", staticmethod(lambda *a: true(*a) + 1))

    async def main():
        async with opened(tiny) as engine, orchestra.connect(engine) as connection:
            outcome = await connection.run("hogwild(instruct=False, max_tokens=20)", "the answer is", temperature=1.0)
            check_concurrent_parity(outcome.graph, plain)

    with pytest.raises(AssertionError, match="one forward gives"):
        asyncio.run(main())


def test_engines_and_uses_that_cannot_are_told_so(tiny):
    class Remote(ScriptedEngine):
        capabilities = ScriptedEngine.capabilities - {orchestra.runtime.engine.Capability.CONCURRENT_CACHE}

    with pytest.raises(CapabilityError, match=r"hogwild needs concurrent_cache.*local:PATH can"):
        play("hogwild", Remote(lambda *_: " $"), "x")

    async def main():
        async with opened(tiny, max_batch=3) as engine, orchestra.connect(engine) as connection:
            with pytest.raises(UsageError, match="1 to 3 members"):
                await connection.run("hogwild(workers=4)", "x")

            @orchestra.strategy
            async def nothing_to_go_on_from(thread):
                async with thread.shared(2, headers=Headers()) as cache:
                    await cache.write(0)

            with pytest.raises(UsageError, match="nothing predicts"):
                await connection.run(nothing_to_go_on_from(), "x")
            assert (await quiet(engine)).cached_bytes == 0

    asyncio.run(main())


def test_a_program_of_ones_own_writes_side_by_side(tiny, plain):
    @orchestra.strategy
    async def duet(thread, rounds: int = 2):
        async with thread.shared(2, "interleaved") as cache:

            async def sing(worker):
                for i in range(rounds):
                    await cache.write(worker, f" {worker}.{i}:", max_tokens=5 + worker)
                await cache.write(worker, max_tokens=2)
                cache.leave(worker)

            async with asyncio.TaskGroup() as group:
                group.create_task(sing(0))
                group.create_task(sing(1))
            said = await thread.decode(cache.ids)
            # What goes on begins with the token before it, which stands there once.
            assert len(cache.ids) == 4 * len(await cache.encode(" 0.0:")) + 2 * (5 + 6 + 2)
            assert said.startswith(" 0.0:")
            return thread.append(cache.text, ids=cache.ids)

    async def main():
        async with opened(tiny) as engine, orchestra.connect(engine) as connection:
            outcome = await connection.run(duet(), "the answer is", temperature=1.0, ignore_eos=True)
            check_concurrent_parity(outcome.graph, plain)
            assert outcome.usage.sampled_tokens == 2 * 5 + 2 * 6 + 2 * 2
            return outcome

    assert " 1.1:" in asyncio.run(main()).text
