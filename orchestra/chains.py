"""The heaviest chains of dependencies in a run, kept up to date while it grows."""

from __future__ import annotations

from collections.abc import Iterable

from orchestra.graph import Node, ThreadGraph


class Chains:
    """For each node of a graph, the heaviest chain of nodes that ends with it, in two weights.

    *Depth* counts sampled tokens: the critical path. *Sequential tokens* count input and output of every call, the
    input anew with each: `B_seq` of Parallel-Distill-Refine (arXiv 2510.01123), a proxy for latency.

    Args:
        graph: whose nodes are added here in the order of their ids.
    """

    def __init__(self, graph: ThreadGraph) -> None:
        self._graph = graph
        self._depth: list[int] = []
        self._sequential: list[int] = []
        self._input: list[int] = []

    def add(self, node: Node, context: int) -> None:
        """Add a node, before anything was sampled into it, with the number of tokens that it attends to."""
        before = list(self._graph.predecessors(node.id))
        self._depth.append(self.depth(before))
        self._sequential.append(self.sequential(before))
        self._input.append(context + len(node))

    def add_siblings(self, nodes: list[Node], context: int) -> None:
        """Add empty nodes that differ in nothing."""
        self.add(nodes[0], context)
        for chain in (self._depth, self._sequential, self._input):
            chain += [chain[-1]] * (len(nodes) - 1)

    def call(self, node: Node) -> None:
        """An engine is asked to fill the node."""
        self._sequential[node.id] += self._input[node.id]

    def grow(self, node: Node, count: int) -> None:
        """Tokens were sampled into a node."""
        self._depth[node.id] += count
        self._sequential[node.id] += count

    def depth(self, nodes: Iterable[int]) -> int:
        """Sampled tokens on the heaviest chain that ends in one of `nodes`."""
        return max((self._depth[n] for n in nodes), default=0)

    def sequential(self, nodes: Iterable[int]) -> int:
        """Input and output tokens of the calls on the heaviest chain that ends in one of `nodes`."""
        return max((self._sequential[n] for n in nodes), default=0)

    def total(self, nodes: Iterable[Node]) -> int:
        """Input and output tokens of all calls among `nodes`."""
        return sum(self._input[n.id] + n.count("sampled") for n in nodes if n.started is not None)
