"""Token ids behind HTTP: who encodes what, how often, and which ids stand before a generation."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import pytest
from fake_sglang import VOCABULARY, FakeSGLang, connected, encode, said
from fakes import Fake, in_turn, says, serving

from orchestra import Thread, strategy
from orchestra.errors import EngineError, PromptError
from orchestra.graph import Edge, Node, Span, ThreadGraph
from orchestra.runtime import limits, sglang, tokens
from orchestra.runtime.engine import Request, Sampling
from orchestra.runtime.http import Refused, Server
from orchestra.runtime.limits import Limits
from orchestra.runtime.tokens import Contexts, ServerTokens, last_ids

USER = [{"role": "user", "content": "hi"}]


@pytest.fixture(autouse=True)
def _streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short generations too: what breaks here are streams."""
    monkeypatch.setattr(sglang, "WHOLE_TOKENS", 0)


def ask(work: Any, server: Any = None, **options: Any) -> tuple[Any, Fake]:
    """What `work(tokens)` gives, and the server that was asked."""

    async def main() -> tuple[Any, Fake]:
        async with serving(server or FakeSGLang()) as fake:
            way = Server(fake.base, Limits(retries=1))
            try:
                return await work(ServerTokens(way, **options)), fake
            finally:
                assert way.sockets == 0
                await way.close()

    return asyncio.run(asyncio.wait_for(main(), 20))


def refused(work: Any, server: Any = None) -> str:
    with pytest.raises(PromptError) as error:
        ask(work, server)
    return str(error.value)


# -- texts -------------------------------------------------------------------------------------------------------------


def test_a_text_is_encoded_once() -> None:
    async def work(tokens: ServerTokens) -> list[Span]:
        first = await tokens.forced("né")
        first.tokens.append(99)  # what the caller does with it is no affair of the others
        return [first, await tokens.forced("né"), await tokens.prompt("né", {}), await tokens.prompt("né", {})]

    (_, again, prompt, _), fake = ask(work)
    assert again == Span("forced", encode("né"), 3, "né")
    assert prompt == Span("prompt", encode("né", special=True), 4, "né")
    assert fake.bodies("/v1/tokenize") == [
        {"prompt": "né", "add_special_tokens": False},
        {"prompt": "né", "add_special_tokens": True},
    ]


def test_of_many_texts_those_used_last_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "_KEPT", 2)

    async def work(encoder: ServerTokens) -> None:
        for text in "abacabc":
            await encoder.forced(text)

    _, fake = ask(work)
    # a, b; a again; c drops b; a again; b drops c; c drops a
    assert [body["prompt"] for body in fake.bodies("/v1/tokenize")] == list("abcbc")


def test_empty_texts_and_prompts_are_not_sent() -> None:
    span, fake = ask(lambda tokens: tokens.forced(""))
    assert span == Span("forced")
    assert fake.requests == []
    for prompt in ("", " \n\t", [], [{"role": "user", "content": "  "}], [{"role": "user"}]):
        assert "the prompt is empty" in refused(lambda tokens, prompt=prompt: tokens.prompt(prompt, {}))


def test_messages_go_through_the_servers_template() -> None:
    span, fake = ask(lambda tokens: tokens.prompt(USER, {"enable_thinking": False}), model="m")
    assert (span.tokens, span.text) == (encode("<user>hi", special=True), "<user>hi")
    assert fake.bodies("/v1/tokenize") == [
        {"model": "m", "messages": USER, "chat_template_kwargs": {"enable_thinking": False}}
    ]


def test_template_settings_are_for_messages() -> None:
    text = refused(lambda tokens: tokens.prompt("hi", {"enable_thinking": False}))
    assert text == "template settings (enable_thinking) are for chat messages, and this is text"


def test_without_a_chat_template_a_single_user_message_is_text() -> None:
    bare = FakeSGLang(template=False)
    span, _ = ask(lambda tokens: tokens.prompt(USER, {}), bare)
    assert span == Span("prompt", encode("hi", special=True), 3, "hi")
    system = [{"role": "system", "content": "Be brief."}, *USER]
    assert "no chat template: give it text or a single user message" in refused(lambda t: t.prompt(system, {}), bare)
    assert "no chat template" in refused(lambda t: t.prompt([{"role": "assistant", "content": "x"}], {}), bare)
    assert "template settings (a)" in refused(lambda t: t.prompt(USER, {"a": 1}), bare)
    with pytest.raises(Refused, match="another reason"):
        ask(lambda tokens: tokens.prompt(USER, {}), says({"error": "another reason"}, 400))


def test_texts_of_ids_batched_or_one_by_one() -> None:
    lists = [encode("a b"), [], said("né")]
    texts, fake = ask(lambda tokens: tokens.decode(lists))
    assert texts == ["a b", "", "né"]
    assert fake.bodies("/v1/detokenize") == [{"tokens": [lists[0], lists[2]], "skip_special_tokens": True}]
    assert ask(lambda tokens: tokens.decode([[], []]))[1].requests == []
    answers = in_turn(says({"prompt": "x"}), says({"prompt": "y"}))
    texts, fake = ask(lambda tokens: tokens.decode(lists), answers, decode="/detokenize", model="m", batched=False)
    assert texts == ["x", "", "y"]
    assert fake.bodies("/detokenize") == [{"model": "m", "tokens": lists[0]}, {"model": "m", "tokens": lists[2]}]


WRONG = [{}, [], None, *({"tokens": wrong} for wrong in (None, ["x"], [[1]], 5, [None]))]


@pytest.mark.parametrize("answer", WRONG)
def test_ids_of_another_shape_are_asked_for_again(answer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "_FIRST_DELAY", 0.004)
    span, fake = ask(lambda tokens: tokens.forced("x"), in_turn(says(answer), says({"tokens": [7]})))
    assert span.tokens == [7]
    assert len(fake.requests) == 2
    with pytest.raises(EngineError, match="failed 2 times, the last time with: it sent token ids of another shape"):
        ask(lambda tokens: tokens.forced("x"), says(answer))


# -- contexts ----------------------------------------------------------------------------------------------------------


def chain(graph: ThreadGraph, *ids: list[int]) -> Node:
    """Nodes one after the other, forced; the last one is to be sampled into."""
    node = graph.add(spans=[Span("prompt", ids[0], len(ids[0]), "p")])
    for more in ids[1:]:
        node = graph.add([Edge(node.id, len(node))], spans=[Span("forced", more, len(more), "f")])
    return node


@pytest.mark.parametrize("bad", [VOCABULARY, 2**31, 10**12, -1])
@pytest.mark.parametrize("where", ["own", "context"])
def test_ids_outside_the_vocabulary_never_reach_a_generation(bad: int, where: str) -> None:
    async def main() -> Fake:
        async with connected(FakeSGLang()) as (fake, connection):
            engine, graph = connection.engine, ThreadGraph()
            good = chain(graph, [1, 3], [VOCABULARY - 1])
            assert (await engine.generate(Request(graph, good, Sampling(max_tokens=1))).__anext__()).count == 1
            nodes = chain(graph, [1, 3], [bad]) if where == "own" else chain(graph, [1, bad], [3])
            message = rf"token id {bad} is not in the vocabulary of sglang://.*: 0\.\.{VOCABULARY - 1}$"
            streams = [engine.generate(Request(graph, nodes, Sampling(max_tokens=1))) for _ in range(4)]
            for stream in streams:
                with pytest.raises(PromptError, match=message):
                    await stream.__anext__()
                with pytest.raises(PromptError, match=message):
                    await engine.score(graph, nodes)
            await engine.release(graph)
            return fake

    fake = asyncio.run(asyncio.wait_for(main(), 20))
    generations = fake.bodies("/generate")
    assert all(0 <= token < VOCABULARY for body in generations for token in body["input_ids"])
    assert sum("token_ids_logprob" in body for body in generations) == 1, "the vocabulary is asked for once"


def test_ids_that_the_tokenizer_gave_are_not_checked() -> None:
    async def main() -> Fake:
        async with connected(FakeSGLang()) as (fake, connection):
            await connection.run("sample", "zzz", max_tokens=2)
            return fake

    assert not any("token_ids_logprob" in body for body in asyncio.run(main()).bodies("/generate"))


@pytest.mark.parametrize("group", ["1", "256"])
def test_what_forks_share_is_put_together_once_and_forgotten(group: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made: Counter[Any] = Counter()
    path = Contexts._path

    def counted(self: Contexts, graph: ThreadGraph, edge: Edge) -> list[int]:
        made[edge] += 1
        return path(self, graph, edge)

    monkeypatch.setattr(Contexts, "_path", counted)

    @strategy
    async def deep(thread: Thread) -> Thread:
        first = await thread.fork(4).generate(max_tokens=2)
        second = await first[1].append(" more").fork(4).generate(max_tokens=2)
        known = connection.engine._contexts._known
        assert len(known) == 1
        return second[0]

    async def main() -> Fake:
        nonlocal connection
        async with connected(FakeSGLang(), f"?n={group}") as (fake, connection):
            await connection.run(deep(), "go")
            assert connection.engine._contexts._known == {}
            return fake

    connection: Any = None
    fake = asyncio.run(asyncio.wait_for(main(), 20))
    assert set(made.values()) == {1}
    assert len(made) == 2, "the prompt, and where the second forks stand"
    begun = encode("go", special=True)
    bodies = fake.bodies("/generate")
    assert len(bodies) == (8 if group == "1" else 2)
    contexts = [body["input_ids"] for body in bodies]
    half = len(contexts) // 2
    assert contexts == [begun] * half + [begun + said("ye") + encode(" more")] * half
    assert {body["sampling_params"]["n"] for body in bodies} == {1 if group == "1" else 4}


def test_a_recompute_join_sends_exactly_the_ids_of_its_branches() -> None:
    """What the model said has ids that no tokenizer gives for its text; the end of a sequence is not copied."""

    @strategy
    async def joined(thread: Thread) -> Thread:
        base = thread.append(" A")
        left, right = await base.fork([" L", " R"]).generate(max_tokens=20)
        right = await right.append(" on").generate(max_tokens=2)
        return await base.join([left, right], " J", how="recompute").generate()

    @strategy
    async def rooted(thread: Thread) -> Thread:
        branches = await thread.fork([" L", " R"]).generate()
        return await thread.join(reversed(branches), " J", how="recompute").generate()

    async def main(spec: Any) -> list[int]:
        async with connected(FakeSGLang()) as (fake, connection):
            outcome = await connection.run(spec, "go")
            outcome.graph.check_integrity()
            return fake.bodies("/generate")[-1]["input_ids"]

    begun = encode("go", special=True)
    left, right = encode(" L") + said("yes"), encode(" R") + said("yes")
    assert asyncio.run(main(rooted())) == begun + right + left + encode(" J")
    right += encode(" on") + said("ye")
    assert asyncio.run(main(joined())) == begun + encode(" A") + left + right + encode(" J")


def test_a_context_without_ids_is_refused() -> None:
    async def main() -> None:
        async with connected(FakeSGLang()) as (fake, connection):
            graph = ThreadGraph()
            root = graph.add(spans=[Span("prompt", [], 4, "from elsewhere")])
            node = graph.add([Edge(root.id, 4)])
            with pytest.raises(EngineError, match="needs the token ids of the whole context"):
                await connection.engine.generate(Request(graph, node, Sampling(max_tokens=1))).__anext__()
            assert fake.bodies("/generate") == []

    asyncio.run(main())


def test_a_cut_sends_what_stands_before_it() -> None:
    graph = ThreadGraph()
    first = chain(graph, [1, 10, 11], [12, 13])
    first.spans.append(Span("sampled", [14, 15, 16], 3, "abc"))
    contexts = Contexts("engine", Server("http://127.0.0.1:1", Limits()))
    contexts.saw([99])
    for length, expected in [(1, [1, 10, 11, 12]), (2, [1, 10, 11, 12, 13]), (4, [1, 10, 11, 12, 13, 14, 15])]:
        node = graph.add([Edge(first.id, length)], spans=[Span("forced", [20], 1, "x"), Span("sampled", [21], 1, "y")])
        ids, count = asyncio.run(contexts.before(graph, node))
        assert [*map(int, ids.split(","))] == [*expected, 20]
        assert count == len(expected) + 1
        ids, count = asyncio.run(contexts.before(graph, node, whole=True))
        assert [*map(int, ids.split(","))] == [*expected, 20, 21]
        assert last_ids(graph, node, 3) == [*expected, 20][-3:]
    assert asyncio.run(contexts.before(graph, graph.add())) == ("", 0)
