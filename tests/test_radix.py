"""The tree of prefixes against a search through all token strings."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestra.graph import Edge, Span, ThreadGraph
from orchestra.runtime.local import radix
from orchestra.runtime.local.admission import Admission
from orchestra.runtime.local.cache import Cache
from orchestra.runtime.local.integrity import check_integrity
from orchestra.runtime.local.nodes import snapshot
from orchestra.runtime.local.segments import Memory


def cache_of(keep=0):
    cache = Cache(Memory(1, 1, 2, torch.float32, torch.device("cpu")), 0, keep)
    return cache, Admission(cache, 8, lambda *_: None)


def learn(cache, graph):
    nodes = [snapshot(node, graph.view(node.context), node.tokens) for node in graph.nodes]
    return cache.learn(graph, nodes)


def compute(cache, run):
    """Pretend that everything of a run was computed; a key is the sum of its path's tokens, so that mixing is seen."""
    for state in run.states:
        if state is not cache.root and state.computed < len(state.tokens):
            cache.reserve(state, len(state.tokens))
            total = path_of(state)[: state.start]
            for i, token in enumerate(state.tokens):
                total.append(token)
                state.segment.keys[:, :, i] = state.segment.values[:, :, i] = digest(total)
            cache.tokens += len(state.tokens) - state.computed
            state.computed = len(state.tokens)


def path_of(state):
    return [token for other, n in state.context for token in other.tokens[:n]] + state.tokens


def digest(tokens):
    value = 0
    for token in tokens:
        value = (value * 7 + token + 1) % 65_521
    return float(value)


def random_graph(draw, joins):
    """Forced nodes over two letters: forks, cuts, twins, and reuse joins."""
    graph = ThreadGraph()
    for _ in range(draw.randint(1, 6)):
        tokens = [draw.randint(0, 1) for _ in range(draw.randint(1, 5))]
        edges = []
        if graph.nodes and draw.random() < 0.8:
            for parent in draw.sample(graph.nodes, min(len(graph.nodes), draw.choice([1, 1, 2 if joins else 1]))):
                edges.append(Edge(parent.id, draw.randint(1, len(parent))))
        graph.add(edges, spans=[Span("forced", tokens, len(tokens))])
    return graph


def strings(graph):
    """Token strings of all ordinary paths."""
    found = []
    for node in graph.nodes:
        above = node
        while len(above.context) == 1:
            above = graph.nodes[above.context[0].parent]
        if not above.context:
            found.append(graph.path_tokens(node.id))
    return found


def common(one, other):
    most = min(len(one), len(other))
    return next((i for i in range(most) if one[i] != other[i]), most)


@given(st.integers(0, 10**9))
@settings(max_examples=100, deadline=None)
def test_a_prompt_finds_the_longest_path_with_its_tokens(seed):
    search(seed)


def test_the_search_notices_sabotage(monkeypatch):
    true = radix.split

    def shifted(state, length, serial):
        if state.segment is not None:
            state.segment.keys[:] = state.segment.keys.roll(1, 2)
        return true(state, length, serial)

    for name, broken in (("split", shifted), ("_common", lambda *_: 0)):
        with monkeypatch.context() as patch:
            patch.setattr(radix, name, broken)
            with pytest.raises(AssertionError):
                _ = [search(seed) for seed in range(60)]


def search(seed):
    draw = random.Random(seed)
    cache, admission = cache_of(keep=draw.choice([0, 10**6]))
    live = []
    for _ in range(6):
        prompt = ThreadGraph()
        tokens = [draw.randint(0, 1) for _ in range(draw.randint(1, 8))]
        for a, b in ((0, len(tokens) // 2), (len(tokens) // 2, len(tokens))):
            if a < b:
                edges = [Edge(0, len(prompt.nodes[0]))] if prompt.nodes else []
                prompt.add(edges, spans=[Span("prompt", tokens[a:b], b - a)])
        there = [string for graph in live for string in strings(graph)]
        run = learn(cache, prompt)
        last = prompt.nodes[-1]
        context = run.context(prompt.view([Edge(last.id, len(last))]))
        found = sum(min(state.computed, n) for state, n in context)
        assert [token for state, n in context for token in state.tokens[:n]] == tokens
        if not cache.keep:  # else ended runs may have left more
            assert found == max((common(tokens, string) for string in there), default=0)
        assert found >= max((common(tokens, string) for string in there), default=0)
        check_integrity(cache, admission)
        compute(cache, run)
        check_integrity(cache, admission)
        cache.release(run)

        graph = random_graph(draw, joins=True)
        compute(cache, learn(cache, graph))
        live.append(graph)
        if draw.random() < 0.4:
            cache.release(cache.runs[id(live.pop(draw.randrange(len(live))))])
        check_integrity(cache, admission)
        for state in cache.sealed:  # whoever shares, splits or keeps a stretch has the keys of its own path
            if state.parent is not None:
                path = path_of(state)[: state.start]
                for i, token in enumerate(state.tokens[: state.computed]):
                    path.append(token)
                    assert float(state.segment.keys[0, 0, i, 0]) == digest(path)
    for graph in live:
        cache.release(cache.runs[id(graph)])
    check_integrity(cache, admission)
    assert cache.memory.bytes == cache.kept_bytes
    cache.forget_kept()
    assert cache.memory.bytes == cache.tokens == 0
    assert not cache.root.branches


def test_nodes_of_one_run_never_share_tokens():
    """A join attends to each of its branches, also when another run has made one of them, and they say the same."""
    cache, admission = cache_of()
    other, graph = ThreadGraph(), ThreadGraph()
    other.add(spans=[Span("prompt", [1, 2], 2)])
    other.add([Edge(0, 2)], spans=[Span("forced", [3, 4], 2)])
    learn(cache, other)
    graph.add(spans=[Span("prompt", [1, 2], 2)])
    twins = [graph.add([Edge(0, 2)], spans=[Span("forced", [3, 4], 2)]) for _ in range(2)]
    graph.add([Edge(twin.id, 2) for twin in twins], spans=[Span("forced", [5], 1)])
    run = learn(cache, graph)
    view = graph.view([Edge(3, 1)])
    assert sum(n for _, n in run.context(view)) == 2 + 2 + 2 + 1
    check_integrity(cache, admission)
