from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestra.errors import UsageError
from orchestra.graph import Edge, Span, ThreadGraph
from orchestra.training.flatten import dense_mask, flatten


def span(origin, *tokens, weight=1.0):
    return Span(origin, list(tokens), len(tokens), weight=weight)


def two_children() -> ThreadGraph:
    """A prompt of three tokens, two sampled children, and a reuse join of both."""
    graph = ThreadGraph()
    graph.add(spans=[span("prompt", 1, 2, 3)])
    graph.add([Edge(0, 3)], spans=[span("sampled", 10, 11)])
    graph.add([Edge(0, 3)], spans=[span("sampled", 20), span("forced", 21, 22)])
    graph.add([Edge(1, 2), Edge(2, 2)], spans=[span("forced", 30), span("sampled", 31, weight=0.5)])
    return graph


def test_row_of_two_children_and_a_join():
    row = flatten(two_children())
    #                   prompt   first    echo second       join
    assert row.tokens == [1, 2, 3, 10, 11, 3, 20, 21, 22, 30, 31]
    assert row.positions == [0, 1, 2, 3, 4, 2, 3, 4, 5, 5, 6]
    assert row.nodes == [0, 0, 0, 1, 1, 0, 2, 2, 2, 3, 3]
    assert row.echoes == [False] * 5 + [True] + [False] * 5
    assert row.weights == [0, 0, 0, 1, 1, 0, 1, 0, 0, 0, 0.5]
    assert row.predecessors == [None, 0, 1, 2, 3, None, 5, 6, 7, None, 9]


def test_mask_of_two_children_and_a_join():
    row = flatten(two_children())
    seen = ["".join("x" if see else "." for see in line) for line in dense_mask(row).tolist()]
    assert seen == [
        "x..........",
        "xx.........",
        "xxx........",
        "xxxx.......",
        "xxxxx......",
        "xxx........",  # the echo sees what its token saw
        "xxx...x....",  # the second child: neither its sibling nor the echo
        "xxx...xx...",
        "xxx...xxx..",
        "xxxxx.xx.x.",  # the join leaves the second child before its last token
        "xxxxx.xx.xx",
    ]


def test_no_echo_where_the_predecessor_stands_right_before():
    graph = ThreadGraph()
    graph.add(spans=[span("prompt", 1, 2)])
    graph.add([Edge(0, 2)], spans=[span("sampled", 3)])
    graph.add([Edge(1, 1)], spans=[span("sampled", 4)])
    assert not any(flatten(graph).echoes)


def test_cut_echoes_the_token_where_it_leaves():
    graph = ThreadGraph()
    graph.add(spans=[span("prompt", 1), span("sampled", 2, 3, 4)])
    graph.add([Edge(0, 2)], spans=[span("sampled", 9)])
    row = flatten(graph)
    assert row.tokens == [1, 2, 3, 4, 2, 9]
    assert row.positions == [0, 1, 2, 3, 1, 2]
    assert [row.sees(5, j) for j in range(6)] == [True, True, False, False, False, True]


def test_an_echo_is_not_taken_for_its_token():
    graph = ThreadGraph()
    graph.add(spans=[span("prompt", 1, 2)])
    graph.add([Edge(0, 2)], spans=[span("sampled", 3)])
    graph.add([Edge(0, 2)])  # no tokens: contributes nothing
    graph.add([Edge(0, 2)], spans=[span("sampled", 4)])
    assert flatten(graph).tokens == [1, 2, 3, 2, 4]


def test_unknown_ids_are_refused():
    graph = ThreadGraph()
    graph.add(spans=[Span("sampled", [], 5, "text")])
    with pytest.raises(UsageError, match="node 0 has 5 tokens but 0 token ids"):
        flatten(graph)


def test_empty_graph_gives_an_empty_row():
    assert len(flatten(ThreadGraph())) == 0


@given(st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_mask_is_the_graph_s_own_view(seed):
    """Against an independent definition: walk the edges from each token."""
    draw = random.Random(seed)
    graph = ThreadGraph()
    for i in range(draw.randint(1, 9)):
        edges = []
        for parent in draw.sample(range(i), min(i, draw.randint(0, 3))):
            if len(graph.nodes[parent]):
                edges.append(Edge(parent, draw.randint(1, len(graph.nodes[parent]))))
        forced = [100 * i + k for k in range(draw.randint(1 if len(edges) > 1 else 0, 3))]
        sampled = [100 * i + 50 + k for k in range(draw.randint(0, 4))]
        graph.add(edges, spans=[span("forced", *forced), span("sampled", *sampled)])
    row = flatten(graph)

    def visible(node, index):
        found = {(node, k) for k in range(index + 1)}
        for parent, length in graph.nodes[node].context:
            found |= visible(parent, length - 1)
        return found

    mask = dense_mask(row)
    for i in range(len(row)):
        assert row.tokens[i] == graph.nodes[row.nodes[i]].tokens[row.indices[i]]
        assert row.positions[i] == graph.nodes[row.nodes[i]].start + row.indices[i]
        expected = visible(row.nodes[i], row.indices[i])
        allowed = {(row.nodes[j], row.indices[j]) for j in range(len(row)) if row.sees(i, j)}
        assert allowed == expected
        assert [bool(x) for x in mask[i]] == [row.sees(i, j) for j in range(len(row))]
    real = [(n, k) for n, k, echo in zip(row.nodes, row.indices, row.echoes, strict=True) if not echo]
    assert sorted(real) == [(node.id, k) for node in graph.nodes for k in range(len(node))]
    for i, before in enumerate(row.predecessors):
        node = graph.nodes[row.nodes[i]]
        if before is None:
            assert row.echoes[i] or (row.indices[i] == 0 and len(node.context) != 1)
            continue
        assert before == i - 1
        wanted = (
            (node.id, row.indices[i] - 1) if row.indices[i] else (node.context[0].parent, node.context[0].length - 1)
        )
        assert (row.nodes[before], row.indices[before]) == wanted
