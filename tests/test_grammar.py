"""Constrained decoding in process: every result matches, whatever the model would rather say."""

from __future__ import annotations

import asyncio
import json
import math
import re
from dataclasses import replace

import jsonschema
import pytest
import torch
from engines import opened, root
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, Field

import orchestra
from orchestra.errors import UsageError
from orchestra.graph import Edge, ThreadGraph
from orchestra.runtime.engine import Sampling
from orchestra.runtime.local.model import load_plain
from orchestra.testing.graphs import generate

EOS = 2
PATTERNS = [
    r"(the|in)+er[0-9]{2}",
    r"[a-c]{2,4}|\d\d:\d\d",
    r"é{2}🙂 ?",
    r"a/b\n\.[^x]{3}",
    r"(yes|no)( (indeed|then))?",
    r"x*",
]


async def says(engine, sampling: Sampling, forks: int = 1, prompt: str = "the answer is"):
    """Forks of one prompt, all at once, in a run of their own."""
    graph = ThreadGraph()
    start = await root(engine, graph, prompt)
    nodes = [graph.add([Edge(0, len(start))], path=[i]) for i in range(forks)]
    said = await asyncio.gather(*(generate(engine, graph, node, sampling, seed=3) for node in nodes))
    await engine.release(graph)
    return said


def test_every_fork_matches_the_pattern_in_full(tiny):
    async def main():
        async with opened(tiny) as engine:
            for pattern in PATTERNS:
                for temperature in (0.0, 1.0, 3.0):
                    sampling = Sampling(temperature, max_tokens=200, regex=pattern)
                    for delta in await says(engine, sampling, forks=4):
                        assert delta.finish_reason == "stop"
                        assert re.fullmatch(pattern, delta.text), (pattern, delta.text)
                        assert EOS not in delta.tokens[:-1]

    asyncio.run(main())


def integers(low: int, n: int) -> dict:
    return {"type": "integer", "minimum": low, "maximum": low + n}


def arrays(item: dict, n: int) -> dict:
    return {"type": "array", "items": item, "minItems": 1, "maxItems": n}


def objects(a: dict, b: dict) -> dict:
    return {"type": "object", "properties": {"a": a, "b": b}, "required": ["a"], "additionalProperties": False}


fixed = st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"enum": ["the", "in", 3]}, {"const": {"a": [1]}}])
strings = st.builds(lambda n: {"type": "string", "maxLength": n, "pattern": "^[a-z]*$"}, st.integers(1, 5))
schemas = st.recursive(
    st.one_of(fixed, strings, st.builds(integers, st.integers(-99, 99), st.integers(0, 50))),
    lambda inner: st.one_of(
        st.builds(arrays, inner, st.integers(1, 3)),
        st.builds(objects, inner, inner),
        st.builds(lambda a, b: {"anyOf": [a, b]}, inner, inner),
    ),
    max_leaves=5,
)

TIGHT = {"whitespace_flexible": False}  # a random model would go on with blanks for ever


def test_every_result_is_valid_against_its_schema(tiny):
    @settings(deadline=None, max_examples=25, derandomize=True)
    @given(schema=schemas, temperature=st.sampled_from([0.0, 1.0, 3.0]))
    def check(schema, temperature):
        text = json.dumps(schema | {"x-guidance": TIGHT})
        [said] = loop.run_until_complete(says(engine, Sampling(temperature, max_tokens=400, json_schema=text)))
        assert said.finish_reason == "stop"
        jsonschema.validate(json.loads(said.text), schema)

    with asyncio.Runner() as runner:
        loop = runner.get_loop()
        context = opened(tiny)
        engine = loop.run_until_complete(context.__aenter__())
        check()
        loop.run_until_complete(context.__aexit__(None, None, None))


class Person(BaseModel):
    age: int = Field(ge=0, le=120)
    likes: list[bool] = Field(max_length=2)


@pytest.mark.parametrize("form", [Person, Person.model_json_schema(), json.dumps(Person.model_json_schema(), indent=1)])
def test_a_schema_may_be_a_model_a_dict_or_text(tiny, form):
    found = orchestra.run(
        "sample", "abc", engine=f"local:{tiny}", json_schema=form, max_tokens=400, presence_penalty=4.0
    )
    if found.candidates[0].finish_reason == "stop":
        Person.model_validate_json(found.text)
    assert re.match(r'\{[ \n\t]*"age"[ \n\t]*:', found.text)


def test_constrained_tokens_follow_the_law(tiny):
    """The masked distribution, enumerated with the plain model: all tokenisations count, EOS only where it may."""
    n, pattern, temperature = 1500, r"inner(in)?", 3.0
    words = {w: i for i, w in load_vocabulary(tiny).items()}
    ids = {token: i for token, i in words.items() if token and all(c in "iner" for c in token)}

    async def main():
        async with opened(tiny, max_batch=256) as engine:
            return await says(engine, Sampling(temperature, max_tokens=9, regex=pattern), forks=n, prompt="abc")

    drawn = [tuple(delta.tokens) for delta in asyncio.run(main())]
    plain = load_plain(tiny)
    language = {"inner", "innerin"}
    prompt = [1, *(words[c] for c in "abc")]

    def law(own: list[int], text: str) -> dict[tuple[int, ...], float]:
        options = {i: text + token for token, i in ids.items() if any(w.startswith(text + token) for w in language)}
        if not options:
            return {tuple(own): 1.0}
        with torch.no_grad():
            logits = plain(torch.tensor([prompt + own])).logits[0, -1]
        weights = {
            i: math.exp(float(logits[i]) / temperature) for i in [*options, *([EOS] if text in language else [])]
        }
        total = sum(weights.values())
        found: dict[tuple[int, ...], float] = {}
        for i, weight in weights.items():
            below = {(*own, EOS): 1.0} if i == EOS else law([*own, i], options[i])
            for s, p in below.items():
                found[s] = found.get(s, 0.0) + p * weight / total
        return found

    expected = law([], "")
    assert abs(sum(expected.values()) - 1) < 1e-9
    assert set(drawn) <= set(expected)
    frequent = [s for s, p in expected.items() if n * p >= 5]
    assert len(frequent) > 6
    statistic = sum((drawn.count(s) - n * expected[s]) ** 2 / (n * expected[s]) for s in frequent)
    assert statistic < len(frequent) + 4 * math.sqrt(2 * len(frequent)) + 8


def load_vocabulary(folder: str) -> dict[int, str]:
    """Plain text of each token that has one."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return {i: tokenizer.decode([i]) for i in range(4, len(tokenizer))}


def test_a_grammar_ends_the_generation_by_itself(tiny):
    async def main():
        async with opened(tiny) as engine:
            [fixed] = await says(engine, Sampling(regex="abc"))
            assert (fixed.text, fixed.finish_reason, fixed.eos, fixed.matched) == ("abc", "stop", False, None)
            [open_end] = await says(engine, Sampling(regex="ab*", logit_bias=((EOS, 50.0),)))
            assert (open_end.text, open_end.eos, open_end.tokens[-1]) == ("a", True, EOS)
            # The end of sequence does not end it: it is no part of a text.
            [on] = await says(engine, Sampling(regex="ab{0,3}", ignore_eos=True, logit_bias=((EOS, 50.0),)))
            assert (on.text, on.finish_reason, on.eos) == ("abbb", "stop", False)
            [cut] = await says(engine, Sampling(max_tokens=2, regex="[ab]{5}"))
            assert (cut.finish_reason, cut.count) == ("length", 2)
            [last] = await says(engine, Sampling(max_tokens=2, regex="[ab]{2}"))
            assert (last.finish_reason, last.count) == ("stop", 2)
            [stopped] = await says(engine, Sampling(regex="[ab]c[ab]{5}", stop=("c",)))
            assert (stopped.matched, stopped.count) == ("c", 2)

    asyncio.run(main())


def test_each_generation_begins_its_grammar_anew(tiny):
    async def main():
        async with opened(tiny) as engine:
            graph = ThreadGraph()
            start = await root(engine, graph)
            sampling = Sampling(1.0, max_tokens=30, regex="[ab]{3}c", ignore_eos=True)
            first = graph.add([Edge(0, len(start))], path=[0])
            whole = await generate(engine, graph, first, sampling)
            for cut in (0, 2, len(first)):  # from the middle of a finished one too
                edge = Edge(1, cut) if cut else Edge(0, len(start))
                again = await generate(engine, graph, graph.add([edge], path=[cut]), replace(sampling, max_tokens=30))
                assert re.fullmatch("[ab]{3}c", again.text)
            assert re.fullmatch("[ab]{3}c", whole.text)

    asyncio.run(main())


def test_grammars_are_compiled_once_and_independent(tiny):
    async def main():
        async with opened(tiny) as engine:
            sampling = Sampling(2.0, max_tokens=40, regex="[a-f]{8}")
            texts = [delta.text for delta in await says(engine, sampling, forks=12)]
            assert len(set(texts)) > 6
            assert all(re.fullmatch("[a-f]{8}", text) for text in texts)
            assert engine._grammars._compiled.cache_info()[:2] == (11, 1)
            alone = [(await says(engine, sampling, forks=1))[0].text for _ in range(2)]
            assert alone == [texts[0]] * 2

    asyncio.run(main())


REFUSED = [
    ({"regex": "a(b"}, "regex a(b is refused: unclosed group"),
    ({"regex": r"(?=x)a"}, "look-ahead"),
    ({"regex": ""}, "an empty regex"),
    ({"regex": "(){0}"}, "only the empty text"),
    ({"json_schema": {"type": "nope"}}, "Invalid type: nope"),
    ({"json_schema": {"not": {}}}, "Unimplemented keys"),
    ({"json_schema": False}, "Unsatisfiable schema"),
    ({"json_schema": "{"}, "json_schema is not JSON"),
    ({"json_schema": 3}, "json_schema is a dict, a pydantic model class or JSON text"),
    ({"json_schema": {}, "regex": "a"}, "a json_schema or a regex, not both"),
]


@pytest.mark.parametrize(("asked", "message"), REFUSED)
def test_what_the_library_refuses_is_one_line_before_anything_is_sampled(tiny, asked, message):
    async def main():
        async with orchestra.connect(f"local:{tiny}") as connection:
            with pytest.raises(UsageError) as refused:
                await connection.run("sample", "abc", **asked)
            assert connection.engine.load().sampled_tokens == 0
            return str(refused.value)

    text = asyncio.run(main())
    assert message in text
    assert "\n" not in text
    assert len(text) < 300


def test_a_tokenizer_of_words_follows_patterns_too():
    found = orchestra.run("sample", "numbers: 3 7 8 12 target: 55", regex=r"( \d+){3} hit", temperature=2.0)
    assert re.fullmatch(r"( \d+){3} hit", found.text)
    with pytest.raises(UsageError, match="no token of this model can begin"):
        orchestra.run("sample", "numbers: 3 7 8 12 target: 55", json_schema={"type": "object"})
