"""Batches: what a model computes for a row does not depend on what stands beside it, nor on the form of the mask."""

from __future__ import annotations

import random

import pytest
import torch
import transformers
from conftest import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from test_flatten import span, two_children

from orchestra.errors import UsageError
from orchestra.graph import Edge, ThreadGraph
from orchestra.training.collate import IGNORED, GraphCollator, mask_of, weighted_loss, windows
from orchestra.training.flatten import Row, dense_mask, flatten


def with_cut() -> ThreadGraph:
    graph = ThreadGraph()
    graph.add(spans=[span("prompt", 4, 5), span("sampled", 6, 7, weight=2.0)])
    graph.add([Edge(0, 3)], spans=[span("sampled", 8, 9)])
    return graph


ROWS = [flatten(two_children()), flatten(with_cut()), Row.sequence([3, 4, 5, 6], [0, 0, 1, 1])]


@pytest.mark.parametrize("pack", [None, 16, 64])
def test_the_mask_of_a_batch_is_that_of_its_rows_and_nothing_between_them(pack):
    collator = GraphCollator(0, pack=pack)
    packs = collator._packs(ROWS)
    size = max(sum(map(len, rows)) for rows in packs)
    dense = mask_of(packs, size).dense()
    for i, rows in enumerate(packs):
        at = 0
        for row in rows:
            here = slice(at, at + len(row))
            assert torch.equal(dense[i, 0, here, here], dense_mask(row))
            assert not dense[i, 0, here, :at].any()
            assert not dense[i, 0, here, at + len(row) :].any()
            at += len(row)
        assert dense[i, 0].any(-1).all(), "an entry that sees nothing makes nan"
    assert sum(map(len, packs)) == len(ROWS)


def test_labels_and_weights_of_a_batch():
    batch = GraphCollator(0)([ROWS[1], ROWS[2]])
    assert batch["input_ids"].tolist() == [[4, 5, 6, 7, 6, 8, 9], [3, 4, 5, 6, 0, 0, 0]]
    assert batch["labels"].tolist() == [
        [IGNORED, IGNORED, 6, 7, IGNORED, 8, 9],
        [IGNORED, IGNORED, 5, 6, IGNORED, IGNORED, IGNORED],
    ]
    assert batch["loss_weights"].tolist() == [[0, 0, 2, 2, 0, 1, 1], [0, 0, 1, 1, 0, 0, 0]]
    assert batch["position_ids"].tolist()[0] == [0, 1, 2, 3, 2, 3, 4]


def test_ordinary_sequences_need_no_mask():
    assert "attention_mask" not in GraphCollator(0)([ROWS[2], ROWS[2]])
    assert "attention_mask" in GraphCollator(0, pack=8)([ROWS[2], ROWS[2]])


def test_rows_that_do_not_fit_or_are_not_there_are_refused():
    with pytest.raises(UsageError, match="11 tokens does not fit"):
        GraphCollator(0, pack=8)(ROWS)
    with pytest.raises(UsageError, match="empty batch"):
        GraphCollator(0)([])
    with pytest.raises(UsageError, match="flex_attention"):
        GraphCollator(0, mask="flex")
    with pytest.raises(UsageError, match="different lengths"):
        Row.from_columns({**ROWS[0].columns(), "echoes": [False]})


def test_columns_hold_all_of_a_row():
    for row in ROWS:
        assert Row.from_columns(row.columns()) == row
    assert Row.from_columns({"input_ids": [1, 2]}) == Row.sequence([1, 2], [1, 1])


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma3_text", "qwen3"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packing_changes_no_logits(kind, attention):
    torch.manual_seed(0)
    options = {"sliding_window": 3} if kind in ("mistral", "gemma3_text") else {}
    model = tiny_model(kind, vocabulary=64, **options).eval()
    model.set_attn_implementation(attention)

    def logits(rows: list[Row], pack: int | None) -> torch.Tensor:
        batch = GraphCollator(0, config=model.config, pack=pack)(rows)
        del batch["labels"], batch["loss_weights"]
        with torch.no_grad():
            return model(**batch, use_cache=False).logits

    row, other, plain = ROWS
    packed = logits(ROWS, 32)[0]  # longest first
    at = 0
    for one in (row, other, plain):
        alone = logits([one], None)[0]
        torch.testing.assert_close(packed[at : at + len(one)], alone, rtol=1e-5, atol=1e-5)
        at += len(one)
    if options:
        wide = tiny_model(kind, vocabulary=64, sliding_window=100).eval()
        wide.load_state_dict(model.state_dict())
        model, narrow = wide, alone
        assert (logits([plain], None)[0, 3] - narrow[3]).abs().max() > 1e-4, "a window of 3 must matter at length 4"


def random_row(seed: int) -> Row:
    """A row of a random tree with cuts and reuse joins."""
    rng = random.Random(seed)
    graph = ThreadGraph()
    graph.add(spans=[span("prompt", *range(rng.randint(1, 20)))])
    for _ in range(rng.randint(1, 12)):
        parents = rng.sample(graph.nodes, min(len(graph.nodes), rng.choice([1, 1, 1, 2, 3])))
        edges = [Edge(node.id, rng.randint(1, len(node))) for node in parents]
        tokens = range(rng.randint(1, 30))
        graph.add(edges, spans=[span("forced", 1), span("sampled", *tokens)])
    return flatten(graph)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6))
def test_a_block_mask_is_the_dense_one(seed):
    row = random_row(seed)
    size = 2 * len(row) + 3
    mask = mask_of([[row, row]], size)
    assert torch.equal(mask.dense()[0, 0, : len(row), : len(row)], dense_mask(row))
    entries = torch.arange(size)
    block = mask.flex()
    spelled = block.mask_mod(torch.tensor(0), torch.tensor(0), entries.view(-1, 1), entries)
    assert torch.equal(spelled, mask.dense()[0, 0])


def test_flex_attention_computes_with_a_block_mask_what_a_matrix_says():
    from torch.nn.attention.flex_attention import flex_attention

    torch.manual_seed(0)
    rows = [random_row(seed) for seed in range(8)]
    size = sum(map(len, rows)) + 5
    assert size > 300, "several blocks"
    mask = mask_of([rows], size)
    query, key, value = torch.randn(3, 1, 2, size, 16).unbind()
    block = mask.flex()
    assert not block.to_dense()[0, 0].all(), "blocks that nobody sees are left out"
    # Uncompiled: transformers compiles it, which on a CPU takes a compiler.
    ours = flex_attention(query, key, value, block_mask=block)
    theirs = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask.dense())
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
def test_a_model_with_flex_attention_computes_what_a_matrix_does():
    torch.manual_seed(0)
    model = tiny_model(vocabulary=64).eval().cuda()

    def logits(attention: str) -> torch.Tensor:
        model.set_attn_implementation(attention)
        mask = "flex" if attention == "flex_attention" else "dense"
        batch = GraphCollator(0, mask=mask, config=model.config, pack=160)([ROWS[0]] * 12)
        del batch["labels"], batch["loss_weights"]
        with torch.no_grad():
            return model(**{name: table.to("cuda") for name, table in batch.items()}, use_cache=False).logits

    torch.testing.assert_close(logits("flex_attention"), logits("sdpa"), rtol=1e-4, atol=1e-4)


def test_the_loss_is_the_weighted_mean_of_what_is_learned():
    torch.manual_seed(0)
    batch = GraphCollator(0)(ROWS)
    logits = torch.randn(*batch["labels"].shape, 64)
    total = weight = 0.0
    for i, row in enumerate(ROWS):
        for at, before in enumerate(row.predecessors):
            if before is not None and row.weights[at]:
                total -= row.weights[at] * float(logits[i, before].log_softmax(-1)[row.tokens[at]])
                weight += row.weights[at]
    loss = weighted_loss(logits, batch["labels"], batch["loss_weights"])
    assert float(loss) == pytest.approx(total / weight, rel=1e-5)


def test_kinds_of_layer_that_rows_cannot_be_trained_on_are_named():
    assert windows(transformers.LlamaConfig()) == {"": None}
    assert windows(transformers.MistralConfig(sliding_window=7)) == {"": 7}
    with pytest.raises(UsageError, match="chunked_attention"):
        windows(transformers.Llama4TextConfig(num_hidden_layers=4))
