"""The thread graph: its rules, its critical path against networkx, and its JSON."""

from __future__ import annotations

import networkx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestra.errors import UsageError
from orchestra.graph import Edge, Read, Span, ThreadGraph, View


def span(origin: str, count: int, first: int = 0) -> Span:
    return Span(origin, list(range(first, first + count)), count, "x" * count)  # type: ignore[arg-type]


@st.composite
def graphs(draw: st.DrawFn) -> ThreadGraph:
    """Any graph that the rules allow: cuts, nested forks, reuse joins, empty nodes, waits."""
    graph = ThreadGraph()
    for i in range(draw(st.integers(1, 12))):
        parents = draw(st.lists(st.integers(0, i - 1), max_size=3, unique=True)) if i else []
        context = [Edge(p, draw(st.integers(0, len(graph.nodes[p])))) for p in parents]
        waits = draw(st.lists(st.integers(0, i - 1), max_size=2)) if i else []
        forced = draw(st.integers(1 if len(graph._solid(context)) > 1 else 0, 3))
        graph.add(context, waits=waits, spans=[span("forced", forced), span("sampled", draw(st.integers(0, 4)), 100)])
    return graph


@given(graphs())
def test_rules_hold_and_json_round_trips(graph: ThreadGraph) -> None:
    graph.check_integrity()
    again = ThreadGraph.from_json(graph.to_json())
    assert again == graph
    assert again.nodes[0].origins == graph.nodes[0].origins


@given(graphs())
def test_view_is_the_closure_by_definition(graph: ThreadGraph) -> None:
    """Token by token: a token of a node sees the node's context, and what the tokens in it see."""

    def seen(context: list[Edge]) -> set[tuple[int, int]]:
        tokens = {(p, i) for p, length in context for i in range(length)}
        return tokens.union(*(seen(graph.nodes[p].context) for p, _ in context)) if context else tokens

    for node in graph.nodes:
        view = graph.view(node.context)
        assert {(p, i) for p, n in view.items() for i in range(n)} == seen(node.context)
        assert list(view) == sorted(view)


@given(graphs(), st.sampled_from(["sampled_tokens", "seconds"]))
def test_critical_path_is_networkx_longest_path(graph: ThreadGraph, by: str) -> None:
    for node in graph.nodes:
        node.started, node.ended = 0.0, float(node.id % 3)
    view = networkx.DiGraph()
    view.add_nodes_from(range(-1, len(graph.nodes)))
    for node in graph.nodes:
        weight = node.weight(by)  # type: ignore[arg-type]
        view.add_edge(-1, node.id, weight=weight)
        for parent in graph.predecessors(node.id):
            view.add_edge(parent, node.id, weight=weight)
    expected = networkx.dag_longest_path_length(view)
    assert graph.critical_path_length(by=by) == expected  # type: ignore[arg-type]
    assert graph.to_networkx().number_of_edges() == sum(len(n.context) + len(n.waits) for n in graph.nodes)


def test_positions_cuts_and_empty_nodes() -> None:
    graph = ThreadGraph()
    root = graph.add(spans=[span("prompt", 5)])
    long, short = (graph.add([Edge(root.id, 5)], spans=[span("sampled", n)]) for n in (7, 2))
    cut = graph.add([Edge(long.id, 3)], spans=[span("sampled", 1)])
    empty = graph.add([Edge(long.id, 7)])
    after = graph.add([Edge(empty.id, 0)], spans=[span("sampled", 1)])
    before = graph.add([Edge(long.id, 0)], spans=[span("sampled", 1)])
    join = graph.add([Edge(long.id, 7), Edge(short.id, 2)], spans=[span("forced", 1)])
    assert [n.start for n in (root, long, short, cut, empty, after, before, join)] == [0, 5, 5, 8, 12, 12, 5, 12]
    assert after.context == [Edge(long.id, 7)]
    assert before.context == [Edge(root.id, 5)]
    assert graph.view(join.context) == {root.id: 5, long.id: 7, short.id: 2}
    assert graph.path_tokens(cut.id) == [*range(5), *range(3), 0]
    with pytest.raises(UsageError, match="joins 2 branches by reuse"):
        graph.path_tokens(join.id)


@pytest.mark.parametrize(
    ("context", "spans", "message"),
    [
        ([Edge(7, 1)], [span("forced", 1)], "unknown node 7"),
        ([Edge(0, 9)], [span("forced", 1)], "takes 9 tokens of node 0, which has 3"),
        ([Edge(1, 1), Edge(2, 1)], [span("sampled", 1)], "needs text"),
        ([Edge(1, 1), Edge(2, 1)], [], "needs text"),
    ],
)
def test_what_breaks_the_rules_is_refused(context: list[Edge], spans: list[Span], message: str) -> None:
    graph = ThreadGraph()
    graph.add(spans=[span("prompt", 3)])
    for _ in range(2):
        graph.add([Edge(0, 3)], spans=[span("sampled", 2)])
    with pytest.raises(UsageError, match=message):
        graph.add(context, spans=spans)
    assert len(graph.nodes) == 3


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", '{"nodes":[{"id":1}]}', '{"nodes":[{"id":0,"context":[[0,1]]}]}', '{"nodes":[{"id":0,"start":4}]}',
     '{"nodes":[{"id":0,"spans":[{"origin":"sampled","tokens":[1],"count":2}]}]}'],
)  # fmt: skip
def test_bad_json_is_one_clear_error(text: str) -> None:
    with pytest.raises(UsageError):
        ThreadGraph.from_json(text)


def concurrent_pair():
    graph = ThreadGraph()
    prompt = graph.add(spans=[Span("prompt", [1, 2, 3], 3)])
    pair = [graph.add_concurrent(waits=[0], path=[i], spans=[Span("forced", [9], 1)]) for i in range(2)]
    for node, other in (pair, pair[::-1]):
        node.spans.append(Span("sampled", [4, 5, 6], 3))
        node.views = [View(0, [Read(prompt.id, 3), Read(other.id, 1)]), View(1, [Read(0, 3), Read(other.id, 2, 1)])]
    return graph


def test_a_concurrent_view_grows_with_its_reader():
    graph = concurrent_pair()
    node = graph.nodes[1]
    assert node.view_of(0).lengths(0) == [3, 1]
    assert [node.view_of(k).lengths(k) for k in (1, 3)] == [[3, 2], [3, 4]]
    assert ThreadGraph.from_json(graph.to_json()) == graph


def test_concurrent_nodes_are_read_by_views_only():
    graph = concurrent_pair()
    with pytest.raises(UsageError, match="by a view"):
        graph.add([Edge(1, 2)])
    with pytest.raises(UsageError, match="no token string"):
        graph.lineage(2)
    with pytest.raises(UsageError, match="begins with a forced token"):
        graph.add_concurrent(waits=[], path=[], spans=[])
    assert len(graph.nodes) == 3


@pytest.mark.parametrize(
    ("views", "wrong"),
    [
        ([View(1)], "not with 0"),
        ([View(0), View(0)], "not with 0"),
        ([View(0, [Read(1, 1)])], "itself"),
        ([View(0, [Read(7, 1)])], "none"),
        ([View(0, [Read(2, 2, 1)])], "more tokens"),
    ],
)
def test_views_that_cannot_be_are_refused(views, wrong):
    graph = concurrent_pair()
    graph.nodes[1].views = views
    with pytest.raises(UsageError, match=wrong):
        graph.check_integrity()
