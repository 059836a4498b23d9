"""What a step feeds besides the next token of each slot: forced tokens, missing context, texts to be scored."""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import NamedTuple

from orchestra.runtime.local.jobs import Job, Score
from orchestra.runtime.local.lockstep import LockStep
from orchestra.runtime.local.nodes import Context
from orchestra.runtime.local.pack import Pack


class Wanted(NamedTuple):
    """Rows of a step whose logits somebody waits for, and the tokens whose log-probabilities they give."""

    score: Score
    rows: list[int]
    targets: list[int]


def feed_forced(pack: Pack, prefilling: Iterable[Job]) -> set[Job]:
    """Feed forced tokens; returns the generations that have more of them, and so nothing to sample yet."""
    fed = {slab: counts for slab, _, counts in pack.slots}
    silent = set()
    for job in prefilling:
        assert job.slab is not None
        if job.slab not in fed:
            continue  # of a gang that stands still
        if not pack.add_forced(job, fed[job.slab]):
            silent.add(job)
    return silent


def feed_starts(pack: Pack, candidates: list[Job], complete: Container[LockStep]) -> list[tuple[Job, int]]:
    """Compute missing context; returns those whose first token can be drawn, with the row that predicts it.

    Members of a group start only if it is `complete`.
    """
    starts = []
    for job in candidates:
        if feed_context(pack, job.context) and not job.given and (job.group is None or job.group in complete):
            starts.append((job, _predictor(pack, job)))
    return starts


def feed_context(pack: Pack, context: Context) -> bool:
    """Fill nodes, ancestors first, as far as the budget goes; returns whether all are ready within this step."""
    ready = True
    for state, n in context:
        if state.done >= n:
            continue
        if state in pack.filled:
            ready &= state.done + pack.filled[state][0] >= n
            continue
        if state.growing or pack.budget <= 0 or not ready:
            ready = False
            continue
        # Contexts are topological and closed, so what this stretch sees came before it here, and is ready.
        take = min(pack.budget, n - state.done)
        pack.add_fill(state, state.context, take)
        ready &= state.done + take >= n
    return ready


def _predictor(pack: Pack, work: Job | Score) -> int:
    """The row that predicts the first token of a node with one context parent."""
    assert work.predictor is not None
    state, index = work.predictor
    return pack.row_of(state, index, work.context)


def feed_scores(pack: Pack, scores: Iterable[Score]) -> list[Wanted]:
    """Feed what is to be scored, as far as the budget goes."""
    wanted = []
    for score in scores:
        if not score.admitted or not feed_context(pack, score.context) or pack.budget <= 0:
            continue
        rows, targets = [], []
        if score.fed == 0:
            if score.predictor is None:
                score.result.append(0.0)
            else:
                rows.append(_predictor(pack, score))
                targets.append(score.tokens[0])
        fed = pack.add_score(score)
        following = score.tokens[score.fed + 1 : score.fed + len(fed) + 1]
        rows += fed[: len(following)]
        wanted.append(Wanted(score, rows, targets + following))
        score.fed += len(fed)
    return wanted
