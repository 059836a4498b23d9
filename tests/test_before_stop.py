"""Going back to before a stop string: what was sampled counts, but what comes next does not see it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

import orchestra
from orchestra import Outcome, Thread, strategy
from orchestra.errors import CapabilityError, UsageError
from orchestra.graph import Edge, Span
from orchestra.runtime.engine import Capability, Engine
from orchestra.testing.scripted import ScriptedEngine


def run(program: Callable[[Thread], Any], engine: Engine | str, prompt: Any = "a b c", **settings: Any) -> Outcome:
    @strategy
    async def anonymous(thread: Thread) -> Any:
        return await program(thread)

    async def main() -> Outcome:
        async with orchestra.connect(engine) as connection:
            return await connection.run(anonymous(), prompt, **settings)

    outcome = asyncio.run(asyncio.wait_for(main(), 60))
    outcome.graph.check_integrity()
    return outcome


@pytest.mark.parametrize(
    ("said", "length", "again"),
    [
        (" a b </t> c", 2, ""),  # words: " a", " b", " </t>"; the space before the tag is text of the tag's token
        (" a b</t> c", 1, " b"),
        ("</t> c", 0, ""),
        (" </t> c", 0, " "),
    ],
)
def test_goes_back_to_before_the_stop_string(said: str, length: int, again: str) -> None:
    async def program(thread: Thread) -> Thread:
        stopped = await thread.append(" so").generate(stop="</t>")
        back = await stopped.before_stop()
        assert back.text == " so" + said.partition("</t>")[0]
        assert back.matched is None
        return await back.append(" Wait").generate()

    engine = ScriptedEngine(lambda context, _: " d $" if "Wait" in context else said)
    outcome = run(program, engine)
    stopped, last = outcome.graph.nodes[-2:]
    # One forced token, " so", then `length` of the sampled ones.
    assert last.context == [Edge(stopped.id, 1 + length)]
    left = said.partition("</t>")[0]
    assert (
        "".join(span.text for span in last.spans if span.origin == "forced")
        == (left if length == 0 else again or left[len(" a b") :]) + " Wait"
    )
    assert outcome.text == " so" + left + " Wait d"
    assert outcome.usage.sampled_tokens == engine.load().sampled_tokens
    assert outcome.usage.critical_path_tokens == outcome.usage.sampled_tokens == stopped.count("sampled") + 2
    assert last.path != stopped.path


@pytest.mark.parametrize("before", ["", " so"])
def test_where_decoding_drops_a_leading_space(before: str) -> None:
    """As tokenizers of the SentencePiece kind do: what stands before must be decoded along."""

    class Stripping(ScriptedEngine):
        async def decode(self, tokens: Any, **options: Any) -> str:
            return (await super().decode(tokens, **options)).removeprefix(" ")

    async def program(thread: Thread) -> Thread:
        back = await (await thread.append(before).generate(stop="</t>")).before_stop()
        assert back.text == before + " x y "
        return await back.append(" Wait").generate()

    outcome = run(program, Stripping(lambda context, _: " d $" if "Wait" in context else " x y </t>"))
    stopped, last = outcome.graph.nodes[-2:]
    assert last.context == [Edge(stopped.id, len(before.split()) + 2)]


def test_refuses_where_nothing_was_stopped_or_no_ids_are_told() -> None:
    async def ended(thread: Thread) -> Thread:
        return await (await thread.generate()).before_stop()

    async def written(thread: Thread) -> Thread:
        return await (await thread.generate(stop="x")).append(" more").before_stop()

    async def stopped(thread: Thread) -> Thread:
        return await (await thread.generate(stop="x")).before_stop()

    for program in (ended, written):
        with pytest.raises(UsageError, match="before_stop"):
            run(program, ScriptedEngine(lambda *_: " x $"))

    class Untold(ScriptedEngine):
        async def encode(self, text: str) -> Span:
            return Span("forced", [], 1, text)

        def _next(self, playing: Any) -> Any:
            delta = super()._next(playing)
            delta.tokens = []
            return delta

    with pytest.raises(CapabilityError, match="does not tell token ids"):
        run(stopped, Untold(lambda *_: " x y"))
    blunt = ScriptedEngine(lambda *_: " x y")
    blunt.capabilities -= {Capability.CUT}
    with pytest.raises(CapabilityError, match="does not tell token ids"):
        run(stopped, blunt)


def test_on_a_real_model(tiny: str) -> None:
    """Any stop string, also in the middle of a token or of a merge: what goes on is exactly the text before it."""
    stops: list[str] = []

    async def program(thread: Thread) -> Thread:
        for stop in [*"aeinrth", "�", "th", "he", "in", "er", " a", "�f", "<pad>"]:
            hot = 100 if stop.startswith("<") else 1.5  # a special token has no text, and is rare
            cut = thread.fork(1)[0].append("go ")
            cut = await cut.generate(max_tokens=1500, temperature=hot, stop=stop, ignore_eos=True)
            if cut.matched is None:
                continue
            back = await cut.before_stop()
            assert back.text == "go " + cut.generated.partition(stop)[0]
            grown = await back.append(" Wait").generate(max_tokens=3)
            assert grown.text.startswith(back.text + " Wait")
            stops.append(stop)
        by_id = await thread.generate(max_tokens=60, temperature=1.5, stop_ids=range(4, 60))
        assert isinstance(by_id.matched, int)
        back = await by_id.before_stop()
        assert by_id.text.startswith(back.text)
        assert back.text != by_id.text
        return await back.append("!").generate(max_tokens=2)

    outcome = run(program, f"local:{tiny}")
    assert len(stops) > 5
    assert "<pad>" in stops
    assert all(len(node.tokens) == len(node) for node in outcome.graph.nodes)


def test_messages_of_a_strategys_own_get_the_runs_template_settings() -> None:
    templates: list[dict[str, Any]] = []

    class Chat(ScriptedEngine):
        async def encode_prompt(self, prompt: Any, **template: Any) -> Span:
            templates.append(template)
            return await super().encode_prompt(prompt)

    async def program(thread: Thread) -> Thread:
        await thread.generate()
        assert await thread.count("three words here") == 3
        [chat, text] = await thread.spawn([[{"role": "user", "content": "x"}], "y"]).generate()
        await chat.spawn([[{"role": "user", "content": "z"}]])[0].generate()
        return text

    engine = Chat(lambda *_: " x $")
    run(program, engine, [{"role": "user", "content": "q"}], template={"enable_thinking": False})
    assert templates == [{"enable_thinking": False}, {"enable_thinking": False}, {}, {"enable_thinking": False}]


def test_a_cut_keeps_the_first_tokens_of_what_was_sampled(tiny: str) -> None:
    from orchestra.runtime.local.engine import LocalEngine

    async def program(thread: Thread) -> Thread:
        said = await thread.append("so").generate(max_tokens=8, ignore_eos=True, temperature=1.0)
        assert said._node is not None
        forced = len(said._node) - 8
        for length in (0, 3, 8):
            back = await said.cut(length)
            assert said.text.startswith(back.text.rstrip("\ufffd"))
            assert (back.generated, back.finish_reason, back.matched, back.logprobs) == ("", None, None, [])
            assert back.path != said.path
            on = await back.generate(max_tokens=2, ignore_eos=True)
            assert on._node is not None
            assert on._node.context == [Edge(said._node.id, forced + length)]
            assert on._node.start == said._node.start + forced + length
        with pytest.raises(UsageError, match="cut\\(9\\) of a generation of 8 tokens"):
            await said.cut(9)
        with pytest.raises(UsageError, match="has just ended"):
            await said.append("x").cut(1)
        return on

    outcome = run(program, LocalEngine(tiny), "the answer is")
    assert outcome.usage.sampled_tokens == 8 + 3 * 2
