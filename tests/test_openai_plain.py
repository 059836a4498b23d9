"""OpenAI-compatible servers that tell no token ids and know nothing beyond the API."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from fakes import Fake, serving
from plain_server import PlainServer

import orchestra
from orchestra import Outcome, Thread, strategy
from orchestra.errors import CapabilityError, EngineError, OrchestraError, PromptError, UsageError
from orchestra.evaluation.runner import manifest_of
from orchestra.evaluation.store import Plan
from orchestra.runtime import limits as limits_module
from orchestra.runtime.engine import Capability, Sampling

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
WORDS = [" so", " the", " answer", " is", " 42"]
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "How many?"}]


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits_module, "_FIRST_DELAY", 0.004)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def run(
    spec: Any, prompt: Any, server: Any = None, query: str = "", *, live: bool = False, **options: Any
) -> tuple[Outcome, Fake]:
    """The outcome, and the server that saw it; `live`: as somebody who watches."""

    async def main() -> tuple[Outcome, Fake]:
        async with serving(server or PlainServer(lambda _: WORDS)) as fake:
            async with orchestra.connect(f"openai://127.0.0.1:{fake.port}/v1{query}") as connection:
                if live:
                    events = [event async for event in connection.stream(spec, prompt, **options)]
                    outcome = events[-1].outcome
                else:
                    outcome = await connection.run(spec, prompt, **options)
                assert connection.engine.load().requests == 0
                assert connection.engine.server.sockets == 0
                assert connection.engine.load().sampled_tokens == outcome.usage.sampled_tokens
            await asyncio.wait_for(fake.idle(), 5)
            outcome.graph.check_integrity()
            return outcome, fake

    return asyncio.run(asyncio.wait_for(main(), 20))


def refused(kind: type[OrchestraError], *given: Any, **options: Any) -> str:
    with pytest.raises(kind) as error:
        run(*given, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def sent(fake: Fake, path: str) -> list[Any]:
    """Bodies of generations."""
    return [body for body in fake.bodies(path) if "prompt" in body or "messages" in body]


# -- what is asked -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("completions", [True, False])
@pytest.mark.parametrize("live", [True, False])
def test_messages_go_to_the_chat_api(completions: bool, live: bool) -> None:
    outcome, fake = run(
        "sample", MESSAGES, PlainServer(lambda _: WORDS, completions=completions), live=live, max_tokens=50
    )
    assert (outcome.text, outcome.answer, outcome.finish_reason) == (" so the answer is 42", "42", "stop")
    assert outcome.usage.sampled_tokens == 6, "as many as the server counts, the end included"
    [body] = sent(fake, CHAT)
    assert body["messages"] == MESSAGES
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("small", 50, 0.0)
    assert body.get("stream", False) is live
    assert set(body) <= {"model", "messages", "max_tokens", "temperature", "stream", "stream_options"}
    assert not sent(fake, TEXT)


@pytest.mark.parametrize("live", [True, False])
def test_text_goes_to_the_completions_api_where_there_is_one(live: bool) -> None:
    outcome, fake = run("sample", "How many?", live=live, max_tokens=3)
    assert (outcome.text, outcome.finish_reason, outcome.usage.sampled_tokens) == (" so the answer", "length", 3)
    assert [body["prompt"] for body in sent(fake, TEXT)] == ["How many?"]
    outcome, fake = run("sample", "How many?", PlainServer(lambda _: WORDS, completions=False), live=live)
    assert [body["messages"] for body in sent(fake, CHAT)] == [[MESSAGES[1]]]
    outcome, fake = run("sample", "How many?", query="?api=chat", live=live)
    assert [body["messages"] for body in sent(fake, CHAT)] == [[MESSAGES[1]]]
    assert not fake.bodies(TEXT)


def test_without_usage_chunks_count() -> None:
    for live in (True, False):
        outcome, _ = run("sample", "x", PlainServer(lambda _: WORDS, counts=False), live=live, max_tokens=9)
        assert outcome.usage.sampled_tokens == (5 if live else 1)
        assert outcome.text == "".join(WORDS)


def test_capabilities_are_what_the_server_can() -> None:
    async def main(query: str = "", **options: Any) -> frozenset[Capability]:
        async with (
            serving(PlainServer(lambda _: WORDS, **options)) as fake,
            orchestra.connect(f"openai://127.0.0.1:{fake.port}/v1{query}") as connection,
        ):
            assert connection.engine.facts() == {"engine": "openai", "model": "small", "server": ""}
            return connection.engine.capabilities

    always = {Capability.PENALTIES, Capability.LOGIT_BIAS, Capability.GRAMMAR}
    assert asyncio.run(main()) == {Capability.CONTINUE, *always}
    assert asyncio.run(main(completions=False)) == asyncio.run(main("?api=chat")) == always
    assert asyncio.run(main("?continue=on", completions=False)) == {Capability.CONTINUE, *always}
    assert "has no completions API" in refused(
        UsageError, "sample", "x", PlainServer(lambda _: WORDS, completions=False), "?api=completions"
    )


def test_a_busy_server_is_not_taken_for_one_that_cannot() -> None:
    async def busy(request: Any) -> Any:
        from aiohttp import web

        if request.path == TEXT:
            return web.json_response({"error": "busy"}, status=429)
        return await PlainServer(lambda _: WORDS)(request)

    with pytest.raises(EngineError, match="HTTP 429: busy"):
        run("sample", "x", busy)


@strategy
async def twice(thread: Thread) -> Thread:
    first = await thread.generate(max_tokens=3)
    return await first.append(" Well,").generate(max_tokens=4)


@pytest.mark.parametrize("counts", [True, False])
@pytest.mark.parametrize("first", [[" A"], [" A", " B", " C", " D"]])
def test_text_is_continued_as_text(first: list[str], counts: bool) -> None:
    server = PlainServer(lambda prompt: [" E", " F"] if "Well" in prompt else first, counts=counts)
    outcome, fake = run(twice(), "go", server)
    begun = "".join(first[:3])
    assert [body["prompt"] for body in sent(fake, TEXT)] == ["go", f"go{begun} Well,"]
    assert outcome.text == f"{begun} Well, E F"


def test_a_chat_answer_is_continued_only_where_the_server_can() -> None:
    text = refused(CapabilityError, twice(), MESSAGES)
    assert "cannot continue a chat answer that has begun" in text
    assert "?continue=on" in text
    _, fake = run(twice(), MESSAGES, query="?continue=on")
    first, second = sent(fake, CHAT)
    assert first["messages"] == MESSAGES
    assert "continue_final_message" not in first
    assert second["messages"] == [*MESSAGES, {"role": "assistant", "content": " so the answer Well,"}]
    assert (second["continue_final_message"], second["add_generation_prompt"]) == (True, False)


@pytest.mark.parametrize(
    "setting", [{"top_k": 5}, {"min_p": 0.1}, {"ignore_eos": True}, {"stop_ids": [3]}, {"skip_special_tokens": False}]
)
def test_settings_that_such_a_server_does_not_have_are_refused(setting: dict[str, Any]) -> None:
    name = {"stop_ids": "stop_token_ids"}.get(key := next(iter(setting)), key)
    for prompt in (MESSAGES, "x"):
        assert f"has no setting {name}; SGLang and vLLM have" in refused(CapabilityError, "sample", prompt, **setting)


def test_penalties_bias_and_schemas_are_sent_as_the_api_has_them() -> None:
    asked = {"frequency_penalty": 0.5, "presence_penalty": -1.0, "logit_bias": {7: -math.inf, 9: 2.5}}
    sent_as = {"frequency_penalty": 0.5, "presence_penalty": -1.0, "logit_bias": {"7": -100.0, "9": 2.5}}
    schema = {"type": "object"}
    for prompt, path in ((MESSAGES, CHAT), ("x", TEXT)):
        [body] = sent(run("sample", prompt, **asked)[1], path)
        assert body.items() >= sent_as.items()
        for name in ("repetition_penalty", "regex"):
            text = refused(CapabilityError, "sample", prompt, **{name: 1.5 if name != "regex" else "a"})
            assert f"has no setting {name}" in text
            assert "SGLang and vLLM have" in text
    [body] = sent(run("sample", MESSAGES, json_schema=schema)[1], CHAT)
    assert body["response_format"]["json_schema"]["schema"] == schema
    assert body["response_format"]["type"] == "json_schema"
    assert "has no setting json_schema for text prompts" in refused(CapabilityError, "sample", "x", json_schema=schema)


@pytest.mark.parametrize(
    ("flavour", "version", "expected"),
    [
        ("vllm", "0.10.2", {"guided_regex": "a+"}),
        ("vllm", "0.9.0", {"guided_regex": "a+"}),
        ("vllm", "0.11.0", {"structured_outputs": {"regex": "a+"}}),
        ("vllm", "1.2.0", {"structured_outputs": {"regex": "a+"}}),
        ("sglang", "0.5.20", {"regex": "a+"}),
    ],
)
def test_a_recognised_server_gets_the_names_that_it_knows(flavour: str, version: str, expected: dict[str, Any]) -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        if request.path == "/v1/models":
            return web.json_response({"data": [{"id": "small"}]})
        if request.path == ("/version" if flavour == "vllm" else "/server_info"):
            return web.json_response({"version": version})
        raise web.HTTPNotFound

    async def main() -> dict[str, Any]:
        async with (
            serving(answer) as fake,
            orchestra.connect(f"openai://127.0.0.1:{fake.port}/v1") as connection,
        ):
            engine: Any = connection.engine
            return engine._steering(Sampling(regex="a+", repetition_penalty=1.5), chat=False)

    assert asyncio.run(main()) == {"repetition_penalty": 1.5, **expected}


def test_bad_prompts() -> None:
    for prompt in ("", "  ", [], [{"role": "user", "content": " "}]):
        assert "the prompt is empty" in refused(PromptError, "sample", prompt)
    assert "chat template" in refused(PromptError, "sample", MESSAGES, template={"enable_thinking": False})
    assert "best_of needs logprobs" in refused(CapabilityError, "best_of(samples=2)", "x")


@pytest.mark.parametrize("live", [True, False])
@pytest.mark.parametrize("query", ["", "?retries=0"])
def test_servers_that_only_take_max_completion_tokens(live: bool, query: str) -> None:
    server = PlainServer(lambda _: WORDS, newer=True)
    outcome, fake = run("self_consistency(samples=6)", MESSAGES, server, query, live=live, max_tokens=20)
    assert outcome.answer == "42"
    bodies = sent(fake, CHAT)
    right = [body for body in bodies if "max_completion_tokens" in body]
    assert len(right) == 6
    assert all(body["max_completion_tokens"] == 20 and "max_tokens" not in body for body in right)
    assert 1 <= len(bodies) - len(right) <= 6


@pytest.mark.parametrize("live", [True, False])
def test_a_completion_without_limit_gets_all_the_room_there_is(live: bool) -> None:
    server = PlainServer(lambda _: WORDS * 1000, context=100)
    outcome, fake = run("sample", "How many?", server, live=live)
    assert [body["max_tokens"] for body in sent(fake, TEXT)] == [4096, 91]
    assert (outcome.usage.sampled_tokens, outcome.finish_reason) == (91, "length")
    said = refused(PromptError, "sample", "How many?" * 20, PlainServer(lambda _: WORDS, context=100))
    assert "maximum context length of 100 tokens" in said
    refused(PromptError, "sample", "How many?", PlainServer(lambda _: WORDS, context=100), max_tokens=92)


# -- models ------------------------------------------------------------------------------------------------------------


def test_models() -> None:
    several = PlainServer(lambda _: WORDS, models=["large", "small"])
    assert "serves large, small, not 'medium'" in refused(UsageError, "sample", "x", several, "?model=medium")
    text = refused(UsageError, "sample", "x", several)
    assert "say which model, ?model=NAME; it serves large, small" in text
    for models in (["large", "small"], None):
        outcome, fake = run("sample", "x", PlainServer(lambda _: WORDS, models=models), "?model=small")
        assert outcome.answer == "42"
        assert {body["model"] for body in fake.bodies(TEXT)} == {"small"}
    assert "does not list" in refused(UsageError, "sample", "x", PlainServer(lambda _: WORDS, models=[]))
    assert "404" in refused(EngineError, "sample", "x", PlainServer(lambda _: WORDS, models=None))


# -- keys --------------------------------------------------------------------------------------------------------------


def test_the_key_is_sent_and_shown_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "sk-very-secret"
    server = PlainServer(lambda _: WORDS, key=secret)

    async def main(query: str) -> None:
        async with serving(server) as fake:
            url = f"openai://127.0.0.1:{fake.port}/v1{query}"
            async with orchestra.connect(url) as connection:
                outcome = await connection.run("sample", "x")
                plan = Plan(task="t", strategy="sample", engine=url, limit=1)
                shown = [connection.engine.name, connection.engine.facts(), connection.engine, connection]
                shown += [manifest_of(plan, connection.engine).model_dump_json(), outcome.graph.to_json(), outcome]
            assert all(headers["Authorization"] == f"Bearer {secret}" for headers in fake.headers)
            assert len(fake.headers) > 2
            assert secret not in " ".join(map(repr, shown))
            assert secret not in " ".join(map(str, shown))

    assert "OPENAI_API_KEY" in (text := refused(EngineError, "sample", "x", server))
    assert "refuses the key" in text
    file = tmp_path / "key"
    file.write_text(secret + "\n")
    asyncio.run(main(f"?key_file={file}"))
    monkeypatch.setenv("OPENAI_API_KEY", secret)
    asyncio.run(main(""))
    monkeypatch.setenv("OPENAI_API_KEY", "sk-wrong-secret")
    assert "sk-wrong-secret" not in refused(EngineError, "sample", "x", server)


# -- end to end --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("live", [True, False])
def test_self_consistency(live: bool) -> None:
    answers = iter(["answer: 4", "answer: 5", "answer: 5", "answer: 6"])
    server = PlainServer(lambda _: [" think", next(answers)])
    outcome, fake = run("self_consistency(samples=4)", MESSAGES, server, live=live, max_tokens=30)
    assert outcome.answer == "5"
    assert len(outcome.candidates) == 4
    assert len(sent(fake, CHAT)) == outcome.usage.requests == 4, "one sample a request: n could not be counted"
    assert outcome.usage.sampled_tokens == 4 * 3
    assert outcome.usage.critical_path_tokens == 3
    assert {body["temperature"] for body in sent(fake, CHAT)} == {0.6}


@pytest.mark.parametrize("live", [True, False])
def test_the_reasoning_channel_is_kept_apart(live: bool) -> None:
    server = PlainServer(lambda _: [" It", " is", " 4."], thinking=["try", " 5"])
    outcome, _ = run("sample", MESSAGES, server, live=live, max_tokens=30)
    assert outcome.text == "<think>\ntry 5\n</think>\n\n It is 4."
    assert outcome.answer == "4"
    assert outcome.usage.sampled_tokens == 6
