"""Sampling settings on their way from the caller to the engine: forms, names, and who can follow them."""

from __future__ import annotations

import asyncio
import json
import math

import pytest
from pydantic import BaseModel

import orchestra
from orchestra import Thread, strategy
from orchestra.errors import CapabilityError, UsageError
from orchestra.runtime.engine import Capability, Sampling
from orchestra.runtime.sampling import settled
from orchestra.testing.scripted import ScriptedEngine, replies


class Answer(BaseModel):
    number: int


def test_settings_are_taken_in_the_forms_that_callers_have():
    assert settled({"stop": "x", "stop_ids": 3}) == Sampling(stop=("x",), stop_ids=(3,))
    assert settled({"logit_bias": {9: 1, "2": -math.inf}}).logit_bias == ((2, -math.inf), (9, 1.0))
    assert settled({"logit_bias": [(9, 1)]}).logit_bias == ((9, 1.0),)
    schema = Answer.model_json_schema()
    forms = [settled({"json_schema": form}).json_schema for form in (Answer, schema, json.dumps(schema, indent=2))]
    assert [json.loads(form) for form in forms] == [schema] * 3
    assert len(set(forms)) == 1
    again = settled({"json_schema": forms[0]})
    assert again.json_schema == forms[0]
    assert hash(again) == hash(settled({"json_schema": Answer}))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"logit_bias": 3}, "logit_bias maps token ids to numbers"),
        ({"logit_bias": {"x": 1}}, "logit_bias maps token ids to numbers"),
        ({"json_schema": "{"}, "json_schema is not JSON"),
        ({"json_schema": [1]}, "json_schema is a dict"),
        ({"json_schema": {"enum": [object()]}}, "json_schema cannot be written as JSON"),
        ({"regex": "a", "json_schema": {}}, "not both"),
        ({"penalty": 1}, "unknown sampling setting penalty .*frequency_penalty"),
    ],
)
def test_what_cannot_be_meant_is_one_line(wrong, message):
    with pytest.raises(UsageError, match=message) as refused:
        settled(wrong)
    assert "\n" not in str(refused.value)


NEEDS = {
    "frequency_penalty": (0.1, Capability.PENALTIES),
    "presence_penalty": (-0.1, Capability.PENALTIES),
    "repetition_penalty": (1.1, Capability.PENALTIES),
    "logit_bias": ({3: 1.0}, Capability.LOGIT_BIAS),
    "json_schema": ({}, Capability.GRAMMAR),
    "regex": ("a", Capability.GRAMMAR),
}


@pytest.mark.parametrize("name", NEEDS)
@pytest.mark.parametrize("spec", ["sample", "self_consistency(samples=3)"])
def test_an_engine_that_cannot_follow_them_is_refused_before_anything_is_said(name, spec):
    value, capability = NEEDS[name]
    engine = ScriptedEngine(replies(" 1 $"))

    async def main(**settings):
        async with orchestra.connect(engine) as connection:
            return await connection.run(spec, "x", **settings)

    assert settled({name: value}).needs == {capability}
    with pytest.raises(
        CapabilityError, match=f"scripted cannot do {capability}.*local:PATH and sglang://HOST:PORT can"
    ):
        asyncio.run(main(**{name: value}))
    assert not engine.requests
    off = {"frequency_penalty": 0.0, "presence_penalty": 0.0, "repetition_penalty": 1.0, "logit_bias": {}}
    assert asyncio.run(main(**off)).answer == "1"


def test_beam_search_refuses_what_it_would_not_follow():
    with pytest.raises(UsageError, match="beam_search weighs the model's own tokens"):
        orchestra.run("beam_search(width=2)", "numbers: 3 7 8 12 target: 55", frequency_penalty=1.0)


def test_a_thread_s_own_settings_come_before_those_of_the_run(tiny):
    @strategy
    async def two_ways(thread: Thread) -> Thread:
        bound = await thread.fork(1)[0].generate(regex="[ab]{3}")
        free = await thread.fork(1)[0].using(regex="z").generate()
        assert (bound.text[0] in "ab", free.text) == (True, "ccc")
        return free

    assert orchestra.run(two_ways(), "x", engine=f"local:{tiny}", regex="ccc").text == "ccc"
