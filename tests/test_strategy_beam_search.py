"""Beam search: exact where it can be exact, transformers' own where the definitions are the same, and counted right."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import byte_tokenizer
from engines import opened

import orchestra
from orchestra import Outcome
from orchestra.errors import CapabilityError, SpecError
from orchestra.runtime.connect import open_engine
from orchestra.runtime.engine import Engine
from orchestra.testing import check_parity, check_strategy
from orchestra.testing.scripted import ScriptedEngine, replies

SMALL = 12  # a vocabulary small enough to try everything; ids 4 and up are the first printable characters
PROMPTS = ["!#", '"', "&%$", "'"]


async def ask(engine: Engine, spec: str, prompt: str, **settings: Any) -> Outcome:
    async with orchestra.connect(engine) as connection:
        return await connection.run(spec, prompt, **settings)


def everything(model: Any, prompt: list[int], length: int, *, eos: int | None) -> dict[tuple[int, ...], float]:
    """The log-probability of every text of so many tokens, or that ends before, by full forwards."""
    found: dict[tuple[int, ...], float] = {}
    heads: dict[tuple[int, ...], float] = {(): 0.0}
    for _ in range(length):
        rows = torch.tensor([[*prompt, *head] for head in heads])
        with torch.no_grad():
            logprobs = model(rows).logits[:, -1].float().log_softmax(-1).tolist()
        heads = {
            (*head, token): score + row[token]
            for (head, score), row in zip(heads.items(), logprobs, strict=True)
            for token in range(len(row))
        }
        found |= {ids: score for ids, score in heads.items() if ids[-1] == eos}
        heads = {ids: score for ids, score in heads.items() if ids[-1] != eos}
    return found | heads


NORMS: dict[str, Callable[[float, int], float]] = {
    "alpha=0": lambda score, length: score,
    "": lambda score, length: score / ((5 + length) / 6) ** 0.6,
    "alpha=2": lambda score, length: score / ((5 + length) / 6) ** 2,
    "normalise='mean'": lambda score, length: score / length,
}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("eos", [None, 2])
def test_wide_enough_it_finds_the_best_of_all_texts(make_model: Callable[..., str], norm: str, eos: int | None) -> None:
    folder = make_model("llama", vocabulary=SMALL)

    async def main() -> None:
        async with opened(folder) as engine:
            model = engine.plain_model()
            for prompt in PROMPTS:
                start = (await engine.encode_prompt(prompt)).tokens
                tried = everything(model, start, 3, eos=eos)
                assert len(tried) == (SMALL**3 if eos is None else 11**3 + 11**2 + 11 + 1)
                best = max(tried, key=lambda ids: NORMS[norm](tried[ids], len(ids)))
                spec = f"beam_search(width=144, max_tokens=3{', ' * bool(norm)}{norm})"
                outcome = await ask(engine, spec, prompt, ignore_eos=eos is None)
                top = max(outcome.candidates, key=lambda candidate: candidate.weight)
                assert top.logprob == pytest.approx(tried[best], abs=1e-4)
                assert top.weight == pytest.approx(NORMS[norm](tried[best], len(best)), abs=1e-4)
                assert top.tokens == len(best)
                assert outcome.text == top.text
                shown = [token for token in best if token != 2]
                assert outcome.text == byte_tokenizer().decode(shown, skip_special_tokens=True)

    asyncio.run(main())


def test_one_beam_is_greedy(tiny: str) -> None:
    async def main() -> None:
        async with opened(tiny) as engine:
            for prompt in ("the answer is", "hm", "on the"):
                for ignore_eos in (True, False):
                    greedy = await ask(engine, "sample", prompt, max_tokens=30, ignore_eos=ignore_eos, logprobs=True)
                    beam = await ask(engine, "beam_search(width=1)", prompt, max_tokens=30, ignore_eos=ignore_eos)
                    if greedy.candidates[0].finish_reason == "length":  # else it goes on beside the end
                        assert beam.text == greedy.text
                        assert beam.candidates[0].logprob == pytest.approx(greedy.candidates[0].logprob, abs=1e-3)
                        assert beam.usage.sampled_tokens == beam.usage.critical_path_tokens == 30
                        assert beam.usage.forced_tokens == 0

    asyncio.run(main())


@pytest.mark.parametrize("width", [2, 3, 4, 8])
@pytest.mark.parametrize(("norm", "penalty"), [("alpha=0", 0.0), ("normalise='mean'", 1.0)])
def test_it_is_transformers_own_where_the_definitions_are_the_same(
    make_model: Callable[..., str], width: int, norm: str, penalty: float
) -> None:
    """transformers divides by length ** length_penalty and has no GNMT penalty; `never` stops it where it is exact."""
    import transformers

    folder = make_model("llama", vocabulary=SMALL)
    ended = 0

    async def main() -> None:
        nonlocal ended
        async with opened(folder) as engine:
            model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
            for prompt in PROMPTS:
                start = (await engine.encode_prompt(prompt)).tokens
                for length in (5, 12):
                    theirs = model.generate(
                        torch.tensor([start]),
                        num_beams=width,
                        max_new_tokens=length,
                        do_sample=False,
                        length_penalty=penalty,
                        early_stopping="never",
                        return_dict_in_generate=True,
                        output_scores=True,
                    )
                    spec = f"beam_search(width={width}, max_tokens={length}, {norm})"
                    ours = await ask(engine, spec, prompt)
                    said = theirs.sequences[0, len(start) :].tolist()
                    ended += said[-1] in (0, 2)
                    best = ours.candidates[max(range(len(ours.candidates)), key=lambda i: ours.candidates[i].weight)]
                    assert best.weight == pytest.approx(float(theirs.sequences_scores[0]), abs=1e-4)
                    assert ours.text == byte_tokenizer().decode(said, skip_special_tokens=True)

    asyncio.run(main())
    assert ended or penalty


# -- counted by hand ---------------------------------------------------------------------------------------------------

GREEDY_IS_WRONG = {"go": {" a": 0.6, " b": 0.4}, "a": {" c": 0.4, " d": 0.3, " $": 0.3}, "b": {" e": 0.9, " $": 0.1}}
ENDS_AT_ONCE = {**GREEDY_IS_WRONG, "a": {" $": 0.7, " c": 0.3}}


def model(table: dict[str, dict[str, float]]) -> ScriptedEngine:
    """Chances by the last word; every other word ends."""

    def top(context: str, _: int) -> dict[str, float]:
        chances = table.get(context.split()[-1], {" $": 1.0})
        return {word: math.log(chance) for word, chance in chances.items()}

    return ScriptedEngine(top=top)


def run(engine: Engine, spec: str, **settings: Any) -> Outcome:
    return asyncio.run(asyncio.wait_for(ask(engine, spec, "go", **settings), 20))


def likelihoods(outcome: Outcome) -> list[tuple[str, float]]:
    found = [(c.text, round(math.exp(c.logprob or 0.0), 4)) for c in outcome.candidates]
    return sorted(found, key=lambda pair: -pair[1])


def test_two_beams_find_what_greedy_misses_and_every_token_is_counted_once() -> None:
    """Steps: a .6 and b .4; be .36 and ac .24 (ad and a$ .18, b$ .04); both end. One is asked, then two, then two."""
    engine = model(GREEDY_IS_WRONG)
    outcome = run(engine, "beam_search(width=2, alpha=0)")
    assert likelihoods(outcome) == [(" b e", 0.36), (" a c", 0.24)]
    assert (outcome.text, outcome.finish_reason) == (" b e", "stop")
    assert [c.tokens for c in outcome.candidates] == [3, 3]
    usage = outcome.usage
    assert (usage.sampled_tokens, usage.requests, usage.critical_path_tokens) == (5, 5, 3)
    assert engine.load().sampled_tokens == 5
    assert usage.forced_tokens == 1, "b; the likeliest are gone on from where they were sampled"
    assert usage.sequential_tokens == (1 + 1) + (2 + 1) + (3 + 1)
    assert usage.total_tokens == (1 + 1) + 2 * (2 + 1) + 2 * (3 + 1)
    assert usage.wall_seconds == 3, "all beams of a step are asked at once"
    assert run(model(GREEDY_IS_WRONG), "sample").text == " a c"
    assert outcome.thread is not None
    assert outcome.thread.text == " b e"


@pytest.mark.parametrize(
    ("spec", "sampled", "texts"),
    [
        # a$ .42 ends in the second step, and be .36 can only get worse.
        ("alpha=0", 3, [(" a", 0.42)]),
        ("alpha=0, stop_when='width'", 5, [(" a", 0.42), (" b e", 0.36)]),
        # By the mean, a$ is at -.434 a token; be can still come to log(.36) / 5 = -.204, and comes to -.341.
        ("normalise='mean', max_tokens=5", 5, [(" a", 0.42), (" b e", 0.36)]),
        # Without a limit it is taken as it stands: log(.36) / 2 = -.511.
        ("normalise='mean'", 3, [(" a", 0.42)]),
    ],
)
def test_it_stops_when_the_best_cannot_be_beaten(spec: str, sampled: int, texts: list[tuple[str, float]]) -> None:
    outcome = run(model(ENDS_AT_ONCE), f"beam_search(width=2, {spec})")
    assert likelihoods(outcome) == texts
    assert outcome.usage.sampled_tokens == sampled
    assert outcome.text == (" b e" if "mean" in spec and len(texts) == 2 else " a")


def test_a_text_that_ends_below_the_width_is_dropped() -> None:
    """In the second step the order is a$ .33, ac .27, b$ .24, be .16: b$ is third, and no beam of two."""
    table = {**GREEDY_IS_WRONG, "a": {" $": 0.55, " c": 0.45}, "b": {" $": 0.6, " e": 0.4}}
    outcome = run(model(table), "beam_search(width=2, alpha=0, stop_when='width')")
    assert likelihoods(outcome) == [(" a", 0.33), (" a c", 0.27)]


def test_a_limit_ends_what_still_grows() -> None:
    outcome = run(model(GREEDY_IS_WRONG), "beam_search(width=2, alpha=0, max_tokens=2)")
    assert likelihoods(outcome) == [(" b e", 0.36), (" a c", 0.24)]
    assert {c.finish_reason for c in outcome.candidates} == {"length"}
    assert run(model(GREEDY_IS_WRONG), "beam_search(width=2)", max_tokens=1).text == " a"


@pytest.mark.parametrize(("diversity", "texts", "sampled"), [(0.5, [" a c", " a c"], 3), (1, [" a c", " b e"], 5)])
def test_a_group_pays_for_what_the_groups_before_it_took(diversity: float, texts: list[str], sampled: int) -> None:
    """After a (log .6 = -.51), a costs the second group 1.01 or 1.51; b costs it 1.2. Equal beams are asked once."""
    table = {**GREEDY_IS_WRONG, "go": {" a": 0.6, " b": 0.3, " c": 0.1}, "a": {" c": 0.6, " d": 0.2, " $": 0.2}}
    outcome = run(model(table), f"beam_search(width=2, groups=2, diversity={diversity}, alpha=0)")
    assert [c.text for c in outcome.candidates] == texts
    chances = [math.exp(c.logprob or 0.0) for c in outcome.candidates]
    assert chances == pytest.approx([0.36, 0.27 if diversity == 1 else 0.36]), "what it paid is not in its score"
    assert outcome.usage.sampled_tokens == sampled
    assert outcome.usage.critical_path_tokens == 3


def test_what_a_budget_leaves_is_the_best_so_far() -> None:
    for limit, text in [(1, " a"), (3, " b e"), (4, " b e")]:
        outcome = run(model(GREEDY_IS_WRONG), "beam_search(width=2)", budget=f"sampled_tokens={limit}")
        assert (outcome.text, outcome.stopped_by) == (text, "sampled_tokens")
        assert outcome.candidates[-1].finish_reason is None
        assert outcome.usage.sampled_tokens <= limit
    late = run(model(GREEDY_IS_WRONG), "beam_search(width=2)", budget="wall_seconds=2.5")
    assert (late.stopped_by, late.text) == ("wall_seconds", " a"), "told after the first step, and then every 16"
    table = {**GREEDY_IS_WRONG, "a": {" $": 0.55, " c": 0.45}}  # be .36 goes on, a$ .33 has ended
    done = run(model(table), "beam_search(width=2, alpha=0)", budget="sampled_tokens=3")
    assert (done.text, done.finish_reason) == (" a", "stop"), "one that has ended comes before all that grow"


def test_a_character_of_several_tokens_is_whole() -> None:
    class Bytes(ScriptedEngine):
        """A token is a byte in hexadecimal; alone it is no character."""

        async def decode(self, ids: Any, *, skip_special_tokens: bool = True) -> str:
            return bytes.fromhex(await super().decode(ids)).decode(errors="replace")

    def top(context: str, _: int) -> dict[str, float]:
        following = {"go": " e6", "e6": " 97", "97": " a5"}.get(context.split()[-1].replace("\ufffd", ""), " $")
        return {following: math.log(0.9), " 21": math.log(0.1)}

    outcome = run(Bytes(top=top), "beam_search(width=3, alpha=0, max_tokens=4)")
    assert outcome.text == "日"


def test_stop_strings_and_ids_end_beams() -> None:
    engine = model({**GREEDY_IS_WRONG, "e": {" f": 1.0}, "f": {" g": 1.0}})
    outcome = run(engine, "beam_search(width=2, alpha=0)", stop=("e f",))
    assert likelihoods(outcome)[0] == (" b e f", 0.36), "a stop string over two tokens"
    assert outcome.finish_reason == "stop"
    assert outcome.usage.critical_path_tokens == 3


def test_what_it_cannot_do_is_said() -> None:
    with pytest.raises(SpecError, match="width=4 is no multiple of groups=3"):
        run(model({}), "beam_search(width=4, groups=3)")
    with pytest.raises(CapabilityError, match="beam_search needs top_logprobs"):
        run(ScriptedEngine(replies(" a $")), "beam_search")


# -- the laws ----------------------------------------------------------------------------------------------------------

SPECS = ["beam_search(width=3)", "beam_search(width=4, groups=2, normalise='mean')"]


@pytest.mark.parametrize("spec", SPECS)
def test_the_laws_hold_on_a_script(spec: str) -> None:
    outcome = asyncio.run(check_strategy(model(GREEDY_IS_WRONG), spec, "go"))
    assert outcome.text in (" b e", " a c")


@pytest.mark.parametrize("spec", SPECS)
def test_the_laws_hold_on_real_models(tiny: str, spec: str) -> None:
    async def main() -> None:
        async with opened(tiny) as engine:
            outcome = await check_strategy(engine, spec, "the answer is", max_tokens=10)
            await check_parity(engine, outcome.graph)
        demo = open_engine("demo")
        try:
            await check_strategy(demo, spec, "numbers: 3 7 8 12 target: 55", max_tokens=12)
        finally:
            await demo.close()

    asyncio.run(main())


def test_nested_it_is_a_draft_like_any_other(tiny: str) -> None:
    async def main() -> None:
        async with opened(tiny) as engine:
            spec = "best_of(samples=2, drafts=beam_search(width=2, max_tokens=6))"
            outcome = await ask(engine, spec, "the answer is")
            alone = await ask(engine, "beam_search(width=2, max_tokens=6)", "the answer is")
            assert outcome.text == alone.text

    asyncio.run(main())


def test_a_server_finds_the_same(sglang_server: Any) -> None:
    """Log-probabilities of kernels differ in the sixth digit; the sums of the beams agree to four."""
    prompt = "numbers: 3 7 8 12 target: 55"

    async def main() -> None:
        here, there = open_engine("demo"), open_engine(f"sglang://127.0.0.1:{sglang_server.port}")
        try:
            for spec in SPECS:
                ours = await ask(here, spec, prompt, max_tokens=24)
                theirs = await ask(there, spec, prompt, max_tokens=24)
                assert theirs.text == ours.text
                assert [c.logprob for c in theirs.candidates] == pytest.approx(
                    [c.logprob for c in ours.candidates], abs=1e-3
                )
                assert theirs.usage.sampled_tokens == ours.usage.sampled_tokens
                assert theirs.usage.critical_path_tokens == ours.usage.critical_path_tokens
            assert there.eos_ids == here.eos_ids
        finally:
            await here.close()
            await there.close()

    asyncio.run(main())
