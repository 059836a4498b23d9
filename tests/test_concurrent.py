"""The parallel forward over concurrent views is the step-by-step run, and the law that says so can fail."""

from __future__ import annotations

import random

import pytest

torch = pytest.importorskip("torch")

from conftest import tiny_model  # noqa: E402

from orchestra.errors import UsageError  # noqa: E402
from orchestra.graph import Edge, Read, Span, ThreadGraph, View  # noqa: E402
from orchestra.testing import check_concurrent_parity  # noqa: E402
from orchestra.testing.laws import LOGIT_TOLERANCE, row_logits  # noqa: E402
from orchestra.training.concurrent import (  # noqa: E402
    by_rotating_keys,
    by_rotating_queries,
    concurrent_logits,
    concurrent_row,
)
from orchestra.training.flatten import flatten  # noqa: E402
from orchestra.training.lockstep import Feed, LockStep  # noqa: E402

YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10_000.0, "original_max_position_embeddings": 512}
PARTIAL = {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5}
MODELS = {
    "llama": ("llama", {}),
    "llama, one key head": ("llama", {"key_heads": 1}),
    "qwen3": ("qwen3", {}),
    "llama, YaRN": ("llama", {"rope_parameters": YARN}),
}
MORE_MODELS = MODELS | {
    "phi3, partial rotary": ("phi3", {"rope_parameters": PARTIAL}),
    "gemma": ("gemma", {}),
    "qwen2": ("qwen2", {}),
}


def model_of(name: str):
    kind, options = MORE_MODELS[name]
    return tiny_model(kind, **options)


class Workers:
    """Random workers in lock-step, played by the slow oracle and recorded as a graph.

    Each worker writes steps: a header of a few forced tokens, then samples. Now and then one ends its step; what it
    wrote then belongs to the history, which everybody reads first, and it begins another.
    """

    def __init__(self, model, seed: int, workers: int = 3, ticks: int = 12) -> None:
        self.draw = random.Random(seed)
        self.noise = torch.Generator().manual_seed(seed)
        self.cache = LockStep(model)
        self.graph = ThreadGraph()
        self.seen: dict[int, list[dict[int, int]]] = {}  # of each concurrent node, by token: {node: tokens read}
        self.history: list[int] = []
        self._prompt([], 5)
        self._prompt([Edge(0, 5)], 3)
        self.now = [self._begin(worker) for worker in range(workers)]
        self.queues = [self._header() for _ in range(workers)]
        for _ in range(ticks):
            self._tick()
        for node, seen in self.seen.items():
            self.graph.nodes[node].views = compress(seen)
        self.graph.check_integrity()

    def _header(self) -> list[int]:
        return [self.draw.randrange(4, 267) for _ in range(self.draw.randint(1, 3))]

    def _prompt(self, edges: list[Edge], count: int) -> None:
        """An ordinary node."""
        tokens = [self.draw.randrange(4, 267) for _ in range(count)]
        node = self.graph.add(edges, spans=[Span("prompt", tokens, count)])
        for token in tokens:
            reads = [(str(edge.parent), edge.length) for edge in edges]
            self.cache.step({str(node.id): Feed(torch.tensor([token]), reads)})
        self.history.append(node.id)

    def _begin(self, worker: int) -> int:
        node = self.graph.add_concurrent(waits=[], path=[worker], spans=[Span("forced", [9], 1)])
        node.spans.clear()
        self.seen[node.id] = []
        return node.id

    def _tick(self) -> None:
        fed = {}
        for worker, queue in enumerate(self.queues):
            if not queue and self.draw.random() < 0.2:
                self.history.append(self.now[worker])
                self.now[worker] = self._begin(worker)
                queue += self._header()
        for worker, queue in enumerate(self.queues):
            node = self.graph.nodes[self.now[worker]]
            if queue:
                token, span = queue.pop(0), Span("forced")
            else:
                table = self.logits[str(node.id)].detach().log_softmax(-1)
                token = int(torch.multinomial(table.exp(), 1, generator=self.noise))
                span = Span("sampled", logprobs=[float(table[0, token])])
            span.tokens, span.count = [token], 1
            fed[worker] = (node, token)
            node.spans.append(span)
        feeds = {}
        for worker, (node, token) in fed.items():
            others = [other for i, other in enumerate(self.now) if i != worker]
            reads = {other: len(self.graph.nodes[other]) for other in [*self.history, *others]}
            self.seen[node.id].append(reads)
            feeds[str(node.id)] = Feed(torch.tensor([token]), [(str(n), length) for n, length in reads.items()])
        self.logits = self.cache.step(feeds)


def compress(seen: list[dict[int, int]]) -> list[View]:
    """Views of a node, from what each of its tokens reads."""
    views: list[View] = []
    for k, reads in enumerate(seen):
        view = views[-1] if views else None
        if view is not None and [read.node for read in view.reads] == list(reads):
            if view.first == k - 1:
                view.reads = [r._replace(grows=reads[r.node] - r.length) for r in view.reads]
            if view.lengths(k) == list(reads.values()):
                continue
            view.reads = view.reads if view.first < k - 1 else [r._replace(grows=0) for r in view.reads]
        views.append(View(k, [Read(node, length) for node, length in reads.items()]))
    return views


@pytest.fixture(scope="module")
def llama():
    return model_of("llama")


@pytest.fixture(scope="module")
def played(llama):
    return Workers(llama, 0).graph


@pytest.mark.parametrize("name", MODELS)
def test_the_forward_gives_what_lock_step_decoding_sampled_from(name):
    model = model_of(name)
    for seed, workers in enumerate((2, 4)):
        graph = Workers(model, seed, workers).graph
        assert check_concurrent_parity(graph, model) < 1e-4
        assert len([node for node in graph.nodes if node.views]) > workers, "no step ended: nothing is in the history"
        assert any(read.grows for node in graph.nodes for view in node.views for read in view.reads)


@pytest.mark.parametrize("name", MORE_MODELS)
def test_rotating_keys_and_rotating_queries_are_the_same(name):
    # The graph is the same whatever model sampled it.
    graph, model = Workers(model_of("llama"), 3).graph, model_of(name)
    with torch.no_grad():
        one, other = (concurrent_logits(model, graph, attend) for attend in (by_rotating_keys, by_rotating_queries))
    assert torch.allclose(one, other, atol=LOGIT_TOLERANCE)


@pytest.mark.parametrize("name", MORE_MODELS)
@pytest.mark.parametrize("attend", [by_rotating_keys, by_rotating_queries])
def test_an_ordinary_graph_gives_what_the_model_gives_with_its_own_attention_and_positions(name, attend):
    model, graph = model_of(name), ThreadGraph()
    graph.add(spans=[Span("prompt", [1, 5, 9, 30], 4)])
    graph.add([Edge(0, 2)], spans=[Span("sampled", [7, 8], 2)])
    graph.add([Edge(0, 4)], spans=[Span("sampled", [11, 12, 13], 3)])
    graph.add([Edge(2, 2), Edge(1, 2)], spans=[Span("forced", [17, 18, 3], 3)])
    row = flatten(graph)
    expected = row_logits(model, graph)[[i for i in range(len(row)) if not row.echoes[i]]]
    with torch.no_grad():
        assert torch.allclose(concurrent_logits(model, graph, attend), expected, atol=LOGIT_TOLERANCE)


def test_the_slow_oracle_gives_what_the_model_gives_on_plain_text():
    for name in MODELS:
        model, tokens = model_of(name), torch.tensor([[1, 5, 9, 30, 7], [1, 6, 6, 200, 9]])
        cache = LockStep(model)
        with torch.no_grad():
            ours = torch.stack([cache.step({"text": Feed(tokens[:, i])})["text"] for i in range(5)], 1)
            assert torch.allclose(ours, model(tokens).logits, atol=LOGIT_TOLERANCE)


def pair(length: int = 5) -> ThreadGraph:
    """A prompt and two workers, token k of each reading the other's tokens up to k."""
    graph = ThreadGraph()
    graph.add(spans=[Span("prompt", [1, 20, 21], 3)])
    for i in range(2):
        tokens = list(range(40 + 10 * i, 40 + 10 * i + length))
        graph.add_concurrent(waits=[0], path=[i], spans=[Span("forced", tokens, length)])
    for me, other in ((1, 2), (2, 1)):
        graph.nodes[me].views = [View(0, [Read(0, 3), Read(other, 1, 1)])]
    return graph


def test_places_are_those_of_each_readers_view():
    row = concurrent_row(pair(2))
    assert row.places.tolist() == [
        [0, -1, -1, -1, -1, -1, -1],
        [0, 1, -1, -1, -1, -1, -1],
        [0, 1, 2, -1, -1, -1, -1],
        [0, 1, 2, 4, -1, 3, -1],
        [0, 1, 2, 5, 6, 3, 4],
        [0, 1, 2, 3, -1, 4, -1],
        [0, 1, 2, 3, 4, 5, 6],
    ]
    assert row.predecessors == [None, 0, 1, None, 3, None, 5]


@pytest.mark.parametrize("attend", [by_rotating_keys, by_rotating_queries])
def test_a_worker_sees_the_others_token_of_the_same_step_and_none_later(llama, attend):
    graph, other = pair(), pair()
    other.nodes[2].spans[0].tokens[3] = 99
    with torch.no_grad():
        one, changed = (concurrent_logits(llama, g, attend)[3:8] for g in (graph, other))
    assert torch.allclose(one[:3], changed[:3], atol=1e-5)
    assert ((one - changed)[3:].abs().amax(-1) > 1e-2).all()


def test_gradients_of_both_forms_are_the_same():
    graph, found = pair(), []
    for attend in (by_rotating_keys, by_rotating_queries):
        model = model_of("llama").train()
        concurrent_logits(model, graph, attend).log_softmax(-1)[:, 7].sum().backward()
        found.append([parameter.grad for parameter in model.parameters()])
    for one, other in zip(*found, strict=True):
        assert one.abs().max() > 0
        assert torch.allclose(one, other, atol=1e-4 * float(one.abs().max()))


def test_the_models_own_attention_is_put_back(llama):
    before = llama.config._attn_implementation
    concurrent_logits(llama, pair())
    assert llama.config._attn_implementation == before

    def broken(*_):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        concurrent_logits(llama, pair(), broken)
    assert llama.config._attn_implementation == before


def wrong_positions(graph):
    """Headers of others in the other order: the same keys at other places."""
    for node in graph.nodes:
        for view in node.views:
            view.reads.reverse()


def no_same_step(graph):
    """What others write is seen one step late."""
    for node in graph.nodes:
        for view in node.views:
            view.reads = [r._replace(length=r.length - 1) if r.grows else r for r in view.reads]


def unseen(graph):
    """The others are not read."""
    for node in graph.nodes:
        for view in node.views:
            view.reads = [r for r in view.reads if not r.grows]


def other_number(graph):
    span = next(s for node in graph.nodes if node.views for s in node.spans if s.logprobs)
    span.logprobs[-1] += 0.01


@pytest.mark.parametrize("sabotage", [wrong_positions, no_same_step, unseen, other_number])
def test_the_law_notices(llama, played, sabotage):
    graph = ThreadGraph.from_json(played.to_json())
    check_concurrent_parity(graph, llama)
    sabotage(graph)
    with pytest.raises(AssertionError, match="one forward gives"):
        check_concurrent_parity(graph, llama)


def test_the_law_needs_something_to_compare(llama):
    with pytest.raises(AssertionError, match="nothing to compare"):
        check_concurrent_parity(pair(), llama)
    graph = pair()
    graph.nodes[1].spans = [Span("sampled", [5, 6], 2, logprobs=[-1.0, -1.0])]
    graph.nodes[1].views = [View(0)]
    graph.nodes[2].views = [View(0)]
    with pytest.raises(AssertionError, match="nothing predicts it"):
        check_concurrent_parity(graph, llama)


def test_what_has_no_one_place_is_refused(llama):
    graph = pair()
    graph.nodes[1].views = [View(0, [Read(0, 3), Read(0, 3)])]
    with pytest.raises(UsageError, match="names a node twice"):
        concurrent_logits(llama, graph)
    changing = tiny_model(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0})
    with pytest.raises(UsageError, match="the same everywhere and always"):
        concurrent_logits(changing, pair())
