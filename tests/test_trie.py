"""Merged rows: every unit is a chain, and no unit's loss or gradient changes."""

from __future__ import annotations

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from test_flatten import span, two_children

from orchestra.errors import UsageError
from orchestra.graph import Edge, ThreadGraph
from orchestra.training.collate import GraphCollator, weighted_loss
from orchestra.training.flatten import Row, dense_mask, flatten
from orchestra.training.trie import Unit, merge, merge_graph

TOKENS = st.lists(st.integers(3, 6), min_size=1, max_size=6)
UNITS = st.lists(st.builds(Unit, TOKENS, TOKENS, st.sampled_from([0.5, 1.0, 2.0])), min_size=1, max_size=6)


@pytest.fixture(scope="module")
def model():
    """A GPT-2 with eager attention: it computes in float64 throughout (Llama's norms and SDPA's kernel do not)."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=32, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2
    )
    config._attn_implementation = "eager"
    return transformers.GPT2LMHeadModel(config).double().eval()


def chains(row: Row) -> dict[tuple[int, ...], float]:
    """Of every entry that is no echo: the tokens it sees, in the order of their positions, and its weight."""
    mask = dense_mask(row)
    found = {}
    for i in range(len(row)):
        if not row.echoes[i]:
            seen = sorted(mask[i].nonzero().flatten().tolist(), key=lambda j: row.positions[j])
            assert [row.positions[j] for j in seen] == list(range(row.positions[i] + 1)), "not a contiguous chain"
            chain = tuple(row.tokens[j] for j in seen)
            assert chain not in found, "a chain stands twice"
            found[chain] = row.weights[i]
    return found


@settings(max_examples=200, deadline=None)
@given(UNITS)
def test_a_tree_holds_each_beginning_of_each_unit_once_and_weighs_it_as_often_as_it_is_learned(units):
    wanted: dict[tuple[int, ...], float] = {}
    for context, completion, weight in units:
        tokens = (*context, *completion)
        for size in range(1, len(tokens) + 1):
            wanted.setdefault(tokens[:size], 0.0)
            wanted[tokens[:size]] += weight if size > len(context) else 0.0
    assert chains(merge(units)) == wanted


@settings(max_examples=40, deadline=None)
@given(UNITS)
def test_merging_changes_neither_loss_nor_gradient(model, units):
    def backward(rows: list[Row]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        batch = GraphCollator(0, config=model.config, dtype=torch.float64)(rows)
        labels, weights = batch.pop("labels"), batch.pop("loss_weights")
        loss = weighted_loss(model(**batch, use_cache=False).logits, labels, weights.double(), 1.0)
        model.zero_grad()
        loss.backward()
        return loss, [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    alone = [Row.sequence([*c, *w], [0.0] * len(c) + [weight] * len(w)) for c, w, weight in units]
    loss, gradients = backward([merge(units)])
    wanted, each = backward(alone)
    torch.testing.assert_close(loss, wanted, rtol=1e-10, atol=1e-12)
    for ours, theirs in zip(gradients, each, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


def test_a_unit_without_context_is_refused():
    with pytest.raises(UsageError, match="at least one token of context"):
        merge([Unit([], [1])])


def test_threads_that_are_written_again_as_text_merge_with_the_first_and_what_was_sampled_is_learned():
    graph = ThreadGraph()
    graph.add(spans=[span("prompt", 1, 2)])
    graph.add([Edge(0, 2)], spans=[span("forced", 7), span("sampled", 10, 11)])
    graph.add([Edge(0, 2)], spans=[span("forced", 8), span("sampled", 20)])
    graph.add([Edge(0, 2)], spans=[span("forced", 7, 10, 11, 8, 20, 9), span("sampled", 30)])
    row = merge_graph(graph)
    assert len(row) < len(flatten(graph)) - 3
    assert chains(row) == {
        (1,): 0,
        (1, 2): 0,
        (1, 2, 7): 0,
        (1, 2, 7, 10): 1,
        (1, 2, 7, 10, 11): 1,
        (1, 2, 8): 0,
        (1, 2, 8, 20): 1,
        (1, 2, 7, 10, 11, 8): 0,
        (1, 2, 7, 10, 11, 8, 20): 0,
        (1, 2, 7, 10, 11, 8, 20, 9): 0,
        (1, 2, 7, 10, 11, 8, 20, 9, 30): 1,
    }


def test_a_graph_without_copies_stays_as_it_is():
    assert merge_graph(two_children()) == flatten(two_children())


def test_branches_of_a_reuse_join_stay_apart_although_they_say_the_same():
    graph = ThreadGraph()
    graph.add(spans=[span("prompt", 1)])
    for _ in range(2):
        graph.add([Edge(0, 1)], spans=[span("sampled", 5, 6)])
    graph.add([Edge(1, 2), Edge(2, 2)], spans=[span("forced", 9), span("sampled", 4)])
    assert merge_graph(graph) == flatten(graph)
    del graph.nodes[3]
    assert len(merge_graph(graph)) == 3  # nobody joins them: once is enough
