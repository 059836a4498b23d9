"""A small model has learned to read another worker's words while they are written, and is lost without them."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

import orchestra  # noqa: E402
from orchestra.runtime.local.model import load_plain  # noqa: E402
from orchestra.runtime.local.sources import load_tokenizer  # noqa: E402
from orchestra.strategies import Hogwild  # noqa: E402
from orchestra.testing import check_concurrent_parity  # noqa: E402
from orchestra.training import dictation_probe, dictation_sft, tokenizer  # noqa: E402
from orchestra.training.concurrent import concurrent_logits, concurrent_row  # noqa: E402
from orchestra.training.config import read_config  # noqa: E402
from orchestra.training.dictation import (  # noqa: E402
    CHANCE,
    HEADERS,
    MODEL,
    PROMPT,
    STRATEGY,
    TOKENS,
    WORDS,
    build_graph,
    draw,
    score,
)
from orchestra.training.dictation_probe import Report, play, probe  # noqa: E402
from orchestra.training.lockstep import LockStep  # noqa: E402

CONFIG = Path(__file__).parents[1] / "configs" / "dictation.yaml"


@pytest.fixture(scope="module")
def model():
    return load_plain(str(MODEL))


@pytest.fixture(scope="module")
def words():
    return load_tokenizer(str(MODEL))


def check(together: Report, alone: Report) -> None:
    assert together.share
    assert together.accuracy > 0.95
    assert not alone.share
    assert abs(alone.accuracy - CHANCE) < 3 * alone.stderr
    for report in (together, alone):
        # Alice says letters, and nobody can know which.
        assert report.letters > 0.96
        assert report.entropy > 4.65


def test_bob_follows_alice_while_she_speaks_and_is_at_chance_without_her(model, words):
    check(*(probe(model, words, 256, share=share) for share in (True, False)))


def test_bob_needs_the_word_of_the_same_step(model, words, monkeypatch):
    class Late(LockStep):
        """Workers see each other's tokens one step late."""

        def step(self, feeds):
            written = {block: len(layers[0]) for block, layers in self._keys.items()}
            late = {
                block: feed._replace(reads=[(other, written[other]) for other, _ in feed.reads if other in written])
                for block, feed in feeds.items()
            }
            return super().step(late)

    monkeypatch.setattr(dictation_probe, "LockStep", Late)
    assert probe(model, words, 64, share=True).accuracy < 0.1


def test_the_parallel_forward_expects_of_bob_what_he_wrote_in_lock_step(model, words):
    ((alice, bob),) = play(model, words, 1, share=True, seed=3)
    ids = [words(text, add_special_tokens=False).input_ids for text in (alice, bob)]
    graph = build_graph(words(PROMPT).input_ids, [i[0] for i in ids], [i[1:] for i in ids], share=True)
    row = concurrent_row(graph)
    table = concurrent_logits(model, graph).softmax(-1)
    bobs = [i for i, (node, index) in enumerate(zip(row.nodes, row.indices, strict=True)) if node == 2 and index > 0]
    assert [int(table[row.predecessors[i]].argmax()) for i in bobs] == ids[1][1:]
    assert score(alice, bob).right == TOKENS - 1


@pytest.mark.parametrize("layout", ["combined", "interleaved"])
def test_the_strategy_lets_bob_follow_alice(model, layout):
    # Interleaved workers see what others have finished; here nobody finishes before the end.
    hogwild = Hogwild(layout=layout, max_tokens=TOKENS, **STRATEGY)

    async def main() -> list[str]:
        async with orchestra.connect(f"local:{MODEL}") as engine:
            runs = (engine.run(hogwild, PROMPT, temperature=1.0, seed=seed) for seed in range(48))
            outcomes = await asyncio.gather(*runs)
        check_concurrent_parity(outcomes[0].graph, model)
        return [outcome.text for outcome in outcomes]

    runs = [text.split(HEADERS[1]) for text in asyncio.run(main())]
    rates = torch.tensor([score(*run).right / (TOKENS - 1) for run in runs])
    error = float(rates.std()) / len(rates) ** 0.5
    if layout == "combined":
        assert rates.mean() > 0.95
    else:
        assert abs(rates.mean() - CHANCE) < 3 * error


def test_words_are_tokens(words):
    for text in (PROMPT, *HEADERS, " ".join(WORDS)):
        ids = words(text, add_special_tokens=False).input_ids
        assert len(ids) == len(text.split())
        assert words.decode(ids).split() == text.split()
    assert words(PROMPT).input_ids[0] == tokenizer.BOS
    assert words.get_vocab() == tokenizer.vocabulary(WORDS)


def test_scores():
    assert score(" alice: a b c d", " bob: wait A B C") == (3, 3)
    assert score("a b c d", "wait A C B") == (1, 3)
    assert score("a b c d", "A B C D") == (0, 3)
    assert score("a b c d", "wait a b c") == (0, 3)
    assert score("a b", "") == (0, 0)


def test_a_run_holds_each_letter_once_and_bob_one_step_behind():
    said, written = draw(random.Random(1))
    assert len(said) == len(written) == TOKENS == len(set(said))
    assert score(" ".join(said), " ".join(written)) == (TOKENS - 1, TOKENS - 1)


def test_the_loss_is_the_weighted_mean_over_what_predecessors_predict(tmp_path):
    config = read_config(dictation_sft.DictationConfig, CONFIG, ["hidden=16", "batch_tokens=60", "alone=0"])
    batch = dictation_sft.Batches(config)(4)
    model = dictation_sft.build_model(config)
    trainer = dictation_sft.ConcurrentTrainer.__new__(dictation_sft.ConcurrentTrainer)
    loss = float(trainer.compute_loss(model, batch).detach())
    ids, total, weight = batch["input_ids"], 0.0, 0.0
    prompt, length = len(PROMPT.split()) + 1, (ids.shape[1] - len(PROMPT.split()) - 3) // 2
    assert len(ids) > 1
    for run in ids.tolist():
        alice, bob = run[prompt : prompt + 1 + length], run[prompt + 1 + length :]
        graph = build_graph(run[:prompt], [alice[0], bob[0]], [alice[1:], bob[1:]], share=True)
        logs = concurrent_logits(model, graph).log_softmax(-1).detach()
        for first, tokens, each in ((prompt, alice, config.alice_weight), (prompt + 1 + length, bob, 1.0)):
            for k in range(length):
                total -= each * float(logs[first + k, tokens[k + 1]])
                weight += each
    assert loss == pytest.approx(total / weight, rel=1e-5)


def test_a_resumed_run_ends_in_the_same_weights(tmp_path):
    import shutil

    from safetensors.torch import load_file

    options = ["steps=8", "save_every=4", "hidden=16", "batch_tokens=100", "probe_runs=2", "warmup_steps=2"]

    def run(folder: Path, resume: bool) -> dict:
        config = read_config(dictation_sft.DictationConfig, CONFIG, [*options, f"output={folder}"])
        return load_file(dictation_sft.train(config, resume=resume) / "model.safetensors")

    first = run(tmp_path / "one", False)
    shutil.copytree(tmp_path / "one" / "checkpoint-4", tmp_path / "two" / "checkpoint-4")
    second = run(tmp_path / "two", True)
    assert first.keys() == second.keys()
    assert all(torch.allclose(first[name], second[name], atol=1e-6) for name in first)
    assert any(
        not torch.equal(first[name], start)
        for name, start in load_file(tmp_path / "one" / "checkpoint-4" / "model.safetensors").items()
    )


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_recipe_learns_it_from_scratch(tmp_path):
    final = dictation_sft.train(read_config(dictation_sft.DictationConfig, CONFIG, [f"output={tmp_path}"]))
    model, words = load_plain(str(final)), load_tokenizer(str(final))
    check(*(probe(model, words, 256, share=share) for share in (True, False)))
