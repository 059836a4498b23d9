"""Beam search: exact where it can be exact, transformers' own where the definitions are the same, and counted right."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import byte_tokenizer
from engines import opened

import orchestra
from orchestra import Outcome
from orchestra.runtime.engine import Engine

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


def ids_of(outcome: Outcome, index: int = 0) -> tuple[int, ...]:
    """Tokens of a candidate, less an end of sequence: there are no merges among these characters."""
    thread = outcome.thread
    assert thread is not None
    [later] = thread._tail
    return tuple(asyncio.run(later.spans([]))[0].tokens)  # type: ignore[union-attr]


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
