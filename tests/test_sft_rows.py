"""Supervised training on texts with tags: the loss is right, however rows are batched, packed and shared out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("trl")

from conftest import tiny_model  # noqa: E402
from torch.nn.functional import cross_entropy  # noqa: E402
from training_texts import RECORDS, config_of, folder_of, log, losses  # noqa: E402

from orchestra.errors import UsageError  # noqa: E402
from orchestra.training import sft  # noqa: E402
from orchestra.training.collate import GraphCollator  # noqa: E402
from orchestra.training.flatten import Row  # noqa: E402
from orchestra.training.pieces import pieces  # noqa: E402
from orchestra.training.sft_config import Lora, Source  # noqa: E402
from orchestra.training.text_rows import Renderer, units  # noqa: E402
from orchestra.training.texts import example  # noqa: E402
from orchestra.training.trainer import WeightedSFTTrainer  # noqa: E402
from orchestra.training.vocabulary import add_tags, tags_of  # noqa: E402


@dataclass
class Given:
    """The same rows at every step."""

    rows: Sequence[Row]

    def batch(self, step: int) -> Sequence[Row]:
        return self.rows


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="module")
def made(texts: Path) -> tuple[Any, Any, list[Row]]:
    """A random model in float64, its tokenizer, and the rows of the texts."""
    config = config_of(texts)
    tokenizer = sft.build_tokenizer(config)
    model = sft.build_model(config, tokenizer)
    add_tags(model, tokenizer, tags_of(config.tags or []))
    renderer = Renderer(tokenizer, replace(config, weights={"</Goal>": 3.0}))
    return model.double(), tokenizer, [renderer.parallel(example(record)) for record in RECORDS]


def brute_force(model: Any, row: Row, window: int = 10**6) -> tuple[Any, float]:
    """The weighted sum of losses of one row, and the weights: one forward with the mask as it is defined."""
    size, at = len(row), row.positions
    seen = torch.tensor([[row.sees(i, j) and at[i] - at[j] < window for j in range(size)] for i in range(size)])
    logits = model(
        input_ids=torch.tensor([row.tokens]),
        position_ids=torch.tensor([row.positions]),
        attention_mask=seen[None, None],
    ).logits[0]
    total = logits.new_zeros(())
    for i, before in enumerate(row.predecessors):
        if before is not None and row.weights[i]:
            total = total - row.weights[i] * logits[before].log_softmax(-1)[row.tokens[i]]
    return total, sum(row.weights)


def gradients(model: Any) -> list[Any]:
    found = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    return found


def trained(folder: Path, model: Any, tokenizer: Any, rows: Sequence[Row], accumulate: int, **how: Any) -> Any:
    """The loss of one step, as the trainer has it over all parts of the batch, with its gradients on the model."""
    trainer = WeightedSFTTrainer(
        batches=Given(rows),
        collator=GraphCollator(0, config=model.config, **how),
        model=model,
        args=sft.options(config_of(folder, accumulate=accumulate), 1),
        processing_class=tokenizer,
    )
    loss = torch.zeros((), dtype=torch.float64)
    for inputs in trainer.get_train_dataloader():
        part = trainer.compute_loss(model, inputs) / accumulate
        part.backward()
        loss += part.detach()
    return loss


@pytest.mark.parametrize("accumulate", [1, 2, 5, 7])
@pytest.mark.parametrize("pack", [None, 400, 2000])
def test_the_loss_and_its_gradient_are_those_of_one_row_after_another(
    texts: Path, made: tuple[Any, Any, list[Row]], accumulate: int, pack: int | None
) -> None:
    model, tokenizer, rows = made
    assert {len(row.views) > 1 for row in rows} == {True, False}
    sums = [brute_force(model, row) for row in rows]
    expected = sum(total for total, _ in sums) / sum(weight for _, weight in sums)
    expected.backward()
    before = gradients(model)
    loss = trained(texts, model, tokenizer, rows, accumulate, pack=pack)
    assert float(loss) == pytest.approx(float(expected.detach()), rel=1e-10)
    for one, other in zip(gradients(model), before, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


def test_windows_of_the_model_are_kept(texts: Path, made: tuple[Any, Any, list[Row]]) -> None:
    _, tokenizer, rows = made
    model = tiny_model("mistral", vocabulary=320, sliding_window=9).double()
    with torch.no_grad():
        sums = [brute_force(model, row, 9) for row in rows]
        without = [brute_force(model, row) for row in rows]
    expected, other = (float(sum(t for t, _ in found)) / sum(w for _, w in found) for found in (sums, without))
    assert abs(expected - other) > 1e-4
    for pack in (None, 400):
        loss = trained(texts, model, tokenizer, rows, 2, pack=pack)
        assert float(loss) == pytest.approx(expected, rel=1e-10)


def test_tokens_have_the_weights_that_the_run_gives_them(made: tuple[Any, Any, list[Row]]) -> None:
    _, tokenizer, rows = made
    goal = tokenizer.convert_tokens_to_ids("</Goal>")
    weights = [w for row in rows for w, token in zip(row.weights, row.tokens, strict=True) if token == goal and w]
    assert weights == [3.0] * 3
    assert {w for row in rows for w, token in zip(row.weights, row.tokens, strict=True) if token != goal} == {0.0, 1.0}


def test_parts_that_do_not_see_each_other_come_apart(made: tuple[Any, Any, list[Row]]) -> None:
    _, _, rows = made
    parts = [pieces(row) for row in rows]
    assert [len(part) for part in parts] == [1, 1, 1, 2, 1]  # the worker of async_think has a context of its own
    organiser, worker = parts[3]
    kept = [token for token, echo in zip(rows[3].tokens, rows[3].echoes, strict=True) if not echo]
    # The echo after the worker is not needed where the worker stands elsewhere.
    assert sorted(organiser.tokens + worker.tokens) == sorted(kept)
    assert all(
        piece.predecessors == [None if p is None else i - 1 for i, p in enumerate(piece.predecessors)]
        for piece in parts[3]
    )


def test_the_trie_layout_learns_every_request_and_the_whole_text(texts: Path, made: tuple[Any, Any, list[Row]]) -> None:
    model, tokenizer, _ = made
    renderer = Renderer(tokenizer, config_of(texts, layout="trie"))
    read = example(RECORDS[2])
    found = units(renderer.graph(read))
    say = tokenizer.decode
    assert [say(unit.completion) for unit in found] == [
        RECORDS[2]["completion"] + "<eos>",
        "Hm.<Parallel>\n<Outlines>\n<Outline>1: x</Outline>\n<Outline>2: y</Outline>\n</Outlines>",
        " one is x</Thread>",
        " y too</Thread>",
        "</Parallel> 5.<eos>",
    ]
    assert say(found[3].context).endswith("</Outlines>\n<Thread>\n2:")  # not after the first thread
    assert say(found[4].context).endswith("y too</Thread>\n")
    model.zero_grad()
    total = weight = 0.0
    for unit in found:  # each by itself, as the request that it was
        ids = torch.tensor([[*unit.context, *unit.completion]])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, len(unit.context) - 1 : -1]
        total += float(cross_entropy(logits, torch.tensor(unit.completion), reduction="sum"))
        weight += len(unit.completion)
    loss = trained(texts, model, tokenizer, [renderer.parallel(read)], 1)
    model.zero_grad()
    assert float(loss) == pytest.approx(total / weight, rel=1e-10)


def test_paths_come_back_as_the_run_says(texts: Path, made: tuple[Any, Any, list[Row]]) -> None:
    _, tokenizer, rows = made
    reuse, recompute, tree = (
        Renderer(tokenizer, config_of(texts, **how)).parallel(example(RECORDS[0]))
        for how in ({}, {"join": "recompute"}, {"join": "recompute", "layout": "trie"})
    )
    assert reuse.tokens == rows[0].tokens
    again = "<Path>\n1: it goes up</Path><Path>\n2: down it falls far</Path>"
    assert tokenizer.decode(recompute.tokens).count("goes up</Path>") == 2
    assert again in tokenizer.decode(recompute.tokens)
    assert len(tree) < len(recompute)
    with pytest.raises(UsageError, match="joins 2 branches by reuse"):
        Renderer(tokenizer, config_of(texts, layout="trie")).parallel(example(RECORDS[0]))


def test_a_resumed_run_is_the_uninterrupted_one(texts: Path) -> None:
    from safetensors.torch import load_file

    how: dict[str, Any] = {"parallel": (0.0, 1.0), "held_out": 1, "evaluate_every": 2, "packing": 512, "seed": 4}
    whole = sft.train_sft(config_of(texts, "whole", **how))
    (texts / "part").mkdir()
    (texts / "whole" / "checkpoint-3").rename(texts / "part" / "checkpoint-3")
    resumed = sft.train_sft(config_of(texts, "part", **how), resume=True)
    first, second = (load_file(folder / "model.safetensors") for folder in (whole, resumed))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert losses(texts / "part") == losses(texts / "whole")[3:]
    evaluated = [[line["eval_loss"] for line in log(texts / run) if "eval_loss" in line] for run in ("whole", "part")]
    assert evaluated[1] == evaluated[0][1:]
    assert len(evaluated[0]) == 3


def test_the_evaluation_loss_is_that_of_the_held_out_rows(texts: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = config_of(texts, "held", held_out=3, steps=2)
    final = sft.train_sft(config)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(final), AutoTokenizer.from_pretrained(final)
    rows = [row for batch in sft.load_data(config, tokenizer).held_out for row in batch]
    assert len(rows) == 3
    with torch.no_grad():
        sums = [brute_force(model.double(), row) for row in rows]
    expected = float(sum(total for total, _ in sums)) / sum(weight for _, weight in sums)
    (logged,) = (line["eval_loss"] for line in log(texts / "held") if "eval_loss" in line)
    assert logged == pytest.approx(expected, abs=2e-5)


def test_epochs_and_shares_of_warm_up_become_steps(texts: Path) -> None:
    config = config_of(texts, "epochs", steps=None, epochs=3.0, batch=2, warmup_share=0.25)
    data = sft.load_data(config, sft.build_tokenizer(config))
    assert data.steps == math.ceil(3 * len(RECORDS) / 2)
    assert sft.options(config, data.steps).warmup_steps == math.ceil(0.25 * data.steps)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": ""}, "data: or mixture:"),
        ({"steps": None}, "steps: or epochs:"),
        ({"mixture": {}, "data": ""}, "this model's are others"),
        ({"language": "english"}, "unknown language 'english'"),
        ({"model": {"hidden_size": 8}}, "needs its model_type"),
        ({"model": ""}, "model: is missing"),
        ({"tokenizer": ""}, "an untrained model needs a tokenizer"),
        ({"accumulate": 8}, "batch: 4 rows are fewer than the 8 parts"),
        ({"held_out": 5}, "held_out: 5 of 5 rows leaves none"),
        ({"data": "{bad}"}, "row 1: not a text of multiverse: 1:1: <Goal> is not where a block begins"),
        ({"longest": 8}, "has no rows of at most 8 tokens"),
        ({"weights": {"nowhere": 2.0}}, "weights: not all of nowhere are tokens"),
        ({"trainer": {"adam": 1}}, "trainer: "),
        ({"lora": Lora()}, "an adapter belongs to a model"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_it_starts(texts: Path, changes: dict[str, Any], message: str) -> None:
    if changes.get("data") == "{bad}":
        bad = folder_of(texts / "bad", [{"prompt": "x", "completion": "<Goal>", "language": "multiverse"}])
        changes = {"data": str(bad / "data.jsonl")}
    with pytest.raises(UsageError, match=message):
        sft.train_sft(config_of(texts, "refused", **changes))


def test_a_data_set_with_rows_and_texts_is_taken_by_either(texts: Path) -> None:
    datasets = pytest.importorskip("datasets")
    row = Row.sequence([5, 6, 7], [0, 1, 1]).columns()
    datasets.Dataset.from_list([RECORDS[4] | row] * 4).save_to_disk(str(texts / "both"))
    for made, length in ((False, 3), (True, len("No? Not now.") + 2)):
        source = Source(str(texts / "both"), texts=made)
        config = config_of(texts, f"both{made}", data=[source])
        data = sft.load_data(config, sft.build_tokenizer(config))
        assert {len(row) for row in data.batches.batch(0)} == {length}
    datasets.Dataset.from_list([Row.sequence([5, 9999], [0, 1]).columns()]).save_to_disk(str(texts / "other"))
    with pytest.raises(UsageError, match="row 0 has token 9999: it is in another model's tokens"):
        sft.train_sft(config_of(texts, "refused", data=str(texts / "other")))
