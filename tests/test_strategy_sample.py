"""One generation, and the temperature at which others draw."""

from __future__ import annotations

import pytest
from voters import laws_on, laws_on_the_embedded_model, run

from orchestra.errors import CapabilityError, SpecError
from orchestra.runtime.engine import Capability
from orchestra.spec import parse_strategy
from orchestra.testing.scripted import ScriptedEngine, replies, words


def test_it_is_one_generation() -> None:
    outcome = run("sample", replies(" x x answer: 3 $"))
    assert (outcome.text, outcome.answer, outcome.finish_reason) == (" x x answer: 3", "3", "stop")
    usage = outcome.usage
    assert (usage.requests, usage.sampled_tokens, usage.critical_path_tokens) == (1, 5, 5)
    assert (usage.sequential_tokens, usage.total_tokens) == (6, 6)  # the prompt has one word
    [candidate] = outcome.candidates
    assert (candidate.text, candidate.tokens, candidate.logprob) == (outcome.text, 5, -5.0)


def test_its_parameters_reach_the_engine_and_win_over_the_runs() -> None:
    engine = ScriptedEngine(replies(" a b c d $"))
    spec = "sample(temperature=0.7, top_p=0.9, max_tokens=3, stop=['b'])"
    outcome = run(spec, engine=engine, temperature=0.1, max_tokens=2)
    [request] = engine.requests
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.max_tokens, sampling.stop) == (0.7, 0.9, 3, ("b",))
    assert outcome.text == " a b"


@pytest.mark.parametrize("wrong", ["max_tokens=0", "temperature=-1", "top_p=0", "top_p=1.5", "tempreature=1"])
def test_nonsense_is_refused(wrong: str) -> None:
    with pytest.raises(SpecError, match=wrong.split("=")[0]):
        parse_strategy(f"sample({wrong})")


def test_samples_are_drawn_at_the_usual_temperature_unless_somebody_says_otherwise() -> None:
    for spec, settings, expected in [
        ("sample", {}, 0.0),
        ("sample(temperature=0.3)", {"temperature": 0.7}, 0.3),
        ("sample", {"temperature": 0.7}, 0.7),
        ("self_consistency(samples=2)", {}, 0.6),
        ("self_consistency(samples=2)", {"temperature": 0.7}, 0.7),
        ("self_consistency(samples=2, drafts=sample(temperature=0.3))", {"temperature": 0.7}, 0.3),
        ("self_consistency(samples=2, drafts=spawn_join)", {}, 0.6),
        ("first_finish(samples=2, until='thinking')", {}, 0.6),
    ]:
        engine = ScriptedEngine(replies(" x $"))
        run(spec, engine=engine, **settings)
        assert {request.sampling.temperature for request in engine.requests} == {expected}, spec


def test_a_missing_capability_is_named_with_an_engine_that_has_it() -> None:
    engine = ScriptedEngine(replies(" x $"))
    engine.capabilities -= {Capability.LOGPROBS, Capability.CONTINUE}
    for spec, message in [
        ("best_of", r"best_of needs logprobs.*local:"),
        ("self_consistency(drafts=spawn_join)", "self_consistency needs continue"),
        ("first_finish(until='thinking')", "first_finish needs continue"),
        ("confidence_vote", r"confidence_vote needs top_logprobs.*local:PATH and sglang:"),
    ]:
        with pytest.raises(CapabilityError, match=message):
            run(spec, engine=engine)


def test_the_laws() -> None:
    laws_on(ScriptedEngine(lambda *_: words(30)[0]), "sample")
    laws_on_the_embedded_model("sample(temperature=1)", max_tokens=60)
