"""What a run returns: typed, JSON-serialisable, the same on every engine."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from pydantic import BaseModel, Field, PrivateAttr

from orchestra.graph import Node, ThreadGraph

if TYPE_CHECKING:
    from orchestra.thread import Thread


class Usage(BaseModel):
    """What a run cost.

    Attributes:
        prompt_tokens, forced_tokens, sampled_tokens: tokens by who wrote them, each counted once in the graph.
        cached_tokens: context tokens whose keys and values were already on the engine when a request came.
        critical_path_tokens: sampled tokens along the longest dependent chain to the result.
        sequential_tokens, total_tokens: input and output tokens of the calls on the heaviest dependent chain, and of
            all calls, the input anew with each: `B_seq` and `B_total` of Parallel-Distill-Refine (arXiv 2510.01123).
        requests: generations.
        wall_seconds: time from start to result.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    forced_tokens: int = 0
    sampled_tokens: int = 0
    critical_path_tokens: int = 0
    sequential_tokens: int = 0
    total_tokens: int = 0
    requests: int = 0
    wall_seconds: float = 0.0

    @classmethod
    def of(cls, nodes: Iterable[Node], **measured: float) -> Usage:
        """Count `nodes`; `measured` are the fields that the nodes alone do not tell."""
        tokens = {"prompt": 0, "forced": 0, "sampled": 0}
        cached = requests = 0
        for node in nodes:
            cached += node.cached_tokens
            requests += node.started is not None
            for span in node.spans:
                tokens[span.origin] += span.count
        return cls(
            prompt_tokens=tokens["prompt"],
            cached_tokens=cached,
            forced_tokens=tokens["forced"],
            sampled_tokens=tokens["sampled"],
            requests=requests,
            **measured,
        )


class Candidate(BaseModel):
    """One complete attempt that a strategy chose from.

    Attributes:
        text: the whole response.
        answer: what the extractor found in it.
        weight: what it counted for in the choice (a vote, a score, a probability).
        finish_reason: of its last generation.
        tokens: sampled tokens that it took.
        logprob: sum of the raw log-probabilities of its last generation, if the engine reports them (nats).
        logprob_tokens: how many tokens that is the sum over.
    """

    text: str
    answer: str | None = None
    weight: float = 1.0
    finish_reason: str | None = None
    tokens: int = 0
    logprob: float | None = None
    logprob_tokens: int = 0


class Outcome(BaseModel):
    """The result of a strategy.

    Attributes:
        text: the response: all that stands after the prompt on the chosen thread.
        answer: the answer in it, if one was found.
        candidates: what was chosen from; the chosen one included.
        usage: cost.
        graph: everything that happened.
        finish_reason: of the last generation of the chosen thread.
        stopped_by: the budget that ended the run early, if one did.
        log_evidence: of a sampler that estimates it: the log of the normaliser of its target (nats).
        approximate: what makes the result something else than a draw from the target that the strategy names.
    """

    text: str = ""
    answer: str | None = None
    candidates: list[Candidate] = Field(default_factory=list)
    usage: Usage = Field(default_factory=Usage)
    graph: ThreadGraph = Field(default_factory=ThreadGraph, repr=False)
    finish_reason: str | None = None
    stopped_by: str | None = None
    log_evidence: float | None = None
    approximate: list[str] = Field(default_factory=list)
    _thread: Thread | None = PrivateAttr(None)

    @property
    def thread(self) -> Thread | None:
        """The chosen thread, to go on from inside the run; None when the result is no one thread's."""
        return self._thread

    def as_candidate(self, weight: float = 1.0) -> Candidate:
        """This outcome as a candidate of an enclosing strategy."""
        logprobs = self._thread.logprobs if self._thread else []
        return Candidate(
            text=self.text,
            answer=self.answer,
            weight=weight,
            finish_reason=self.finish_reason,
            tokens=self.usage.sampled_tokens,
            logprob=sum(logprobs) if logprobs else None,
            logprob_tokens=len(logprobs),
        )
