"""The parity law for nodes that read each other while they grow (Hogwild! Inference, arXiv:2504.06261)."""

from __future__ import annotations

from typing import Any

from orchestra.graph import ThreadGraph
from orchestra.testing.laws import LOGIT_TOLERANCE


def check_concurrent_parity(graph: ThreadGraph, model: Any) -> float:
    """One dense forward over the recorded views gives the log-probabilities that were sampled from.

    Args:
        graph: with log-probabilities in sampled spans of concurrent nodes. Those of ordinary nodes are compared too.
        model: the plain Hugging Face model, float32 (an in-process engine's `plain_model()`).

    Returns:
        The largest difference, in nats.
    """
    import torch

    from orchestra.training.concurrent import concurrent_logits, concurrent_row

    row = concurrent_row(graph)
    with torch.inference_mode():
        logits = concurrent_logits(model, graph)
    table = logits.log_softmax(-1)
    tolerance = LOGIT_TOLERANCE * max(1.0, float(logits.abs().max())) if len(logits) else 0.0
    entries = {(node, index): i for i, (node, index) in enumerate(zip(row.nodes, row.indices, strict=True))}
    worst, compared = 0.0, 0
    for node in graph.nodes:
        index = 0
        for span in node.spans:
            for k, value in enumerate(span.logprobs, index):
                entry = entries[node.id, k]
                before = row.predecessors[entry]
                assert before is not None, f"node {node.id} token {k} has a log-probability, but nothing predicts it"
                right = float(table[before, row.tokens[entry]])
                off = abs(value - right)
                worst, compared = max(worst, off), compared + bool(node.views)
                assert off <= tolerance, f"node {node.id} token {k}: {value:.6f}, but one forward gives {right:.6f}"
            index += span.count
    assert compared, "nothing to compare: no concurrent node has log-probabilities"
    return worst
