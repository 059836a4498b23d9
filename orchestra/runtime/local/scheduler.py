"""Continuous batching: which generations run, what each step computes, what becomes of the results.

One thread owns a scheduler, in inference mode. Each step packs the next token of every slot, prefill chunks of nodes
that somebody waits for (ancestors first, each once), and echoes of predecessors, into one forward.
"""

from __future__ import annotations

from concurrent.futures import InvalidStateError
from contextlib import suppress
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from orchestra.errors import EngineError
from orchestra.graph import ThreadGraph
from orchestra.runtime.attention.kernels import Kernel
from orchestra.runtime.attention.plan import Shared
from orchestra.runtime.engine import Delta
from orchestra.runtime.local.cache import Cache
from orchestra.runtime.local.gang import LocalGang
from orchestra.runtime.local.jobs import Context, Job, Score
from orchestra.runtime.local.model import LoadedModel
from orchestra.runtime.local.pack import Pack
from orchestra.runtime.local.sampler import Batch, log_probabilities
from orchestra.runtime.local.segments import Segment


class Wanted(NamedTuple):
    """Rows of a step whose logits somebody waits for, and the tokens whose log-probabilities they give."""

    score: Score
    rows: list[int]
    targets: list[int]


class Stable(NamedTuple):
    """What a step of pure decoding can take over from the last one, while nobody came, left or moved."""

    jobs: list[Job]
    batch: Batch
    shared: list[Shared]


class Scheduler:
    """See the module.

    Args:
        model: the loaded model.
        kernel: of the attention.
        max_batch: most generations in slots.
        prefill: most prefill tokens a step; a long prompt is cut so that others go on decoding.
        limit: bytes of keys and values above which segments without readers are evicted; None for no limit.
        copy_bytes: see `COPY_BYTES`; 0 reads every context segment in place.

    Attributes:
        outbox: `(job, delta or error)` to be delivered.
        cache, arena, runs: what is on the engine.
        sampled, computed: the counters of `Load`.
    """

    def __init__(
        self, model: LoadedModel, kernel: Kernel, max_batch: int, prefill: int, limit: int | None, copy_bytes: int
    ) -> None:
        self.model, self.memory = model, model.memory
        self.kernel, self.max_batch, self.prefill = kernel, max_batch, prefill
        self.cache = Cache(model.memory, limit, copy_bytes)
        self.arena, self.runs = self.cache.arena, self.cache.runs
        self.waiting: dict[Job, None] = {}  # a set in order of arrival
        self.scores: list[Score] = []
        self.outbox: list[tuple[Job, Delta | EngineError]] = []
        self.sampled = self.computed = 0
        self.gangs: dict[LocalGang, None] = {}
        self._prefilling: list[Job] = []
        self._stable: Stable | None = None

    # -- what comes in -------------------------------------------------------------------------------------------

    def submit(self, job: Job) -> None:
        """Take a generation."""
        run = self.cache.learn(job.graph, job.nodes)
        job.state = run.nodes[job.nodes[-1].id]
        if job.state.job is not None:
            job.done = True
            self.outbox.append((job, EngineError(f"node {job.state.id} is being generated already")))
            return
        job.context = self.cache.pin(run, job.view)
        job.cached = sum(min(state.done, n) for state, n in job.context)
        job.forced = len(job.state.tokens)
        job.state.job = job
        self.waiting[job] = None

    def submit_score(self, score: Score) -> None:
        """Take a scoring."""
        score.context = self.cache.pin(self.cache.learn(score.graph, score.nodes), score.view)
        self.scores.append(score)

    def cancel(self, job: Job) -> None:
        """End a generation now; its last delta holds everything that it sampled."""
        if not job.done:
            self.outbox.append((job, job.finish("cancelled")))
            self._retire(job)

    def fail(self, error: EngineError) -> None:
        """End everything that is waiting or running with an error, and forget all keys and values."""
        for job in self.jobs():
            self.outbox += [(job, job.finish(None)), (job, error)]
            self._retire(job)
        for score in list(self.scores):
            self._end_score(score)
            with suppress(InvalidStateError):  # its reader has been cancelled
                score.future.set_exception(error)
        for run in self.runs.values():
            for state in run.nodes.values():
                self.cache.drop(state)
        self.close_gangs(list(self.gangs))
        self.arena.trim()

    def release(self, graph: ThreadGraph) -> None:
        """Forget a run."""
        run = self.runs.pop(id(graph), None)
        if run is None:
            return
        for job in self.jobs():
            if job.graph is graph:
                self.cancel(job)
        for score in [score for score in self.scores if score.graph is graph]:
            self._end_score(score)
            score.future.cancel()
        self.close_gangs([gang for gang in self.gangs if gang.graph is graph])
        for state in run.nodes.values():
            self.cache.drop(state)
        self.arena.trim()

    def close_gangs(self, gangs: list[LocalGang]) -> None:
        """Forget gangs and what they share."""
        for gang in gangs:
            if gang in self.gangs:
                gang.close()
                del self.gangs[gang]

    @property
    def stalled(self) -> bool:
        """Whether a gang waits for its program."""
        return any(gang.jobs() and not gang.complete() for gang in self.gangs)

    def jobs(self) -> list[Job]:
        """All generations, running ones first."""
        return [job for slab in self.arena.slabs.values() for job in slab.jobs] + list(self.waiting)

    # -- a step --------------------------------------------------------------------------------------------------

    def step(self) -> bool:
        """Compute one packed row; returns whether there was anything to compute."""
        self.cache.evict()
        candidates = self._admit()
        if self.arena.make_room():
            self._stable = None
        pack = Pack(self.memory, self.kernel, self.prefill, self.model.rotary)
        for slab in self.arena.slabs.values():
            if slab.jobs and (slab.gang is None or self._ready(slab.gang, pack)):
                pack.add_slab(slab)
        silent = self._feed_forced(pack)
        starts = self._feed_starts(pack, candidates)
        wanted = self._feed_scores(pack)
        if not pack.rows:
            return False
        plain = not (self._prefilling or starts or wanted or pack.filled or self.gangs)
        stable = self._stable if plain else None
        if stable is None:
            stable = self._stabilise(pack, silent, [job for job, _ in starts])
        self._stable = stable if plain else None
        tokens, positions = pack.finish(stable.shared)
        keep = None
        if not plain:
            rows = [first + job.slot for slab, first, _ in pack.slots for job in slab.jobs if job not in silent]
            rows += [row for _, row in starts]
            rows += [row for want in wanted for row in want.rows]
            keep, index = np.unique(np.array(rows, np.int64), return_inverse=True)
        logits = self.model.forward(tokens, positions, keep, pack.plan)
        self._commit(pack)
        if keep is not None:
            logits = logits[torch.from_numpy(index)]
            self._give_scores(wanted, logits[len(stable.jobs) :])
        if stable.jobs:
            self._draw(stable, logits[: len(stable.jobs)])
        return True

    def _ready(self, gang: LocalGang, pack: Pack) -> bool:
        """Whether a gang makes a step now; what its members read is computed first, as far as the budget goes."""
        if not gang.complete():
            return False
        if (wrong := gang.wrong()) is not None:
            for job in gang.jobs().copy():
                self.outbox += [(job, job.finish(None)), (job, EngineError(wrong))]
                self._retire(job)
            return False
        gang.settle()
        if not self._feed_context(pack, gang.unsettled()):
            return False
        gang.feed(pack)
        return True

    def _admit(self) -> list[Job]:
        """Give slots to generations with forced tokens and a computed context.

        Returns:
            Those that may start in this step otherwise, or have context to be computed; in order of arrival.
        """
        for job in [job for job in self.waiting if job.gang is not None and job.gang.jobs()]:
            self._place(job)  # the others of its gang wait for it
            self._prefilling.append(job)
        running = sum(len(slab.jobs) for slab in self.arena.slabs.values())
        if running and self.cache.full():
            return []  # those that run will end, and free what they hold
        candidates = []
        for job in list(self.waiting):
            if job.gang is None:
                running += 1
            elif not job.gang.jobs():
                running += job.gang.members  # a gang comes in as a whole
            if running > self.max_batch:
                break
            if job.forced and all(state.done >= n for state, n in job.context):
                self._place(job)
                self._prefilling.append(job)
            else:
                candidates.append(job)
        return candidates

    def _place(self, job: Job) -> None:
        self._stable = None
        self.waiting.pop(job, None)
        self.cache.place(job)

    def _retire(self, job: Job) -> None:
        """Take a generation out; what it computed stays."""
        self._stable = None
        self.waiting.pop(job, None)
        if job in self._prefilling:
            self._prefilling.remove(job)
        self.cache.seal(job)
        self.cache.unpin(job.context)

    def _end_score(self, score: Score) -> None:
        self.scores.remove(score)
        if score.segment is not None:
            score.segment.free()
        self.cache.unpin(score.context)

    def _feed_forced(self, pack: Pack) -> set[Job]:
        """Feed forced tokens; returns the generations that have more of them, and so nothing to sample yet."""
        fed = {slab: counts for slab, _, counts in pack.slots}
        silent = set()
        for job in self._prefilling:
            assert job.slab is not None
            if job.slab not in fed:
                continue  # of a gang that stands still
            if not pack.add_forced(job, fed[job.slab]):
                silent.add(job)
        return silent

    def _feed_starts(self, pack: Pack, candidates: list[Job]) -> list[tuple[Job, int]]:
        """Compute missing context; returns those whose first token can be drawn, with the row that predicts it."""
        starts = []
        for job in candidates:
            if self._feed_context(pack, job.context) and not job.forced:
                starts.append((job, self._predictor(pack, job)))
        return starts

    def _feed_context(self, pack: Pack, context: Context) -> bool:
        """Fill nodes, ancestors first, as far as the budget goes; returns whether all are ready within this step."""
        ready = True
        for state, n in context:
            if state.done >= n:
                continue
            if state in pack.filled:
                ready &= state.done + pack.filled[state][0] >= n
                continue
            if state.job is not None or pack.budget <= 0 or not ready:
                ready = False
                continue
            # Ids are topological and views closed, so what this node sees came before it here, and is ready.
            take = min(pack.budget, n - state.done)
            seen = [(other, state.view[other.id]) for other, _ in context if other.id in state.view]
            pack.add_fill(state, seen, take)
            ready &= state.done + take >= n
        return ready

    def _predictor(self, pack: Pack, work: Job | Score) -> int:
        """The row that predicts the first token of a node with one context parent."""
        assert work.before is not None
        parent, index = work.before
        state = next(state for state, _ in work.context if state.id == parent)
        return pack.row_of(state, index, work.context)

    def _feed_scores(self, pack: Pack) -> list[Wanted]:
        wanted = []
        for score in [score for score in self.scores if score.future.cancelled()]:
            self._end_score(score)
        for score in self.scores:
            if not self._feed_context(pack, score.context) or pack.budget <= 0:
                continue
            rows, targets = [], []
            if score.fed == 0:
                score.segment = Segment(self.memory, len(score.tokens))
                if score.before is None:
                    score.result.append(0.0)
                else:
                    rows.append(self._predictor(pack, score))
                    targets.append(score.tokens[0])
            fed = pack.add_score(score)
            following = score.tokens[score.fed + 1 : score.fed + len(fed) + 1]
            rows += fed[: len(following)]
            wanted.append(Wanted(score, rows, targets + following))
            score.fed += len(fed)
        return wanted

    def _stabilise(self, pack: Pack, silent: set[Job], starts: list[Job]) -> Stable:
        jobs = []
        for slab, first, _ in pack.slots:
            for slot, job in enumerate(slab.jobs):
                if job not in silent:
                    jobs.append(job)
                for state, length in job.inplace:
                    pack.read(state, length, [first + slot])
            if slab.gang is not None:
                slab.gang.read(pack, first)
        jobs += starts
        batch = Batch([job.sampling for job in jobs], [job.key for job in jobs], [job.steering for job in jobs])
        return Stable(jobs, batch, pack.groups())

    def _commit(self, pack: Pack) -> None:
        """Count what was computed, now that it is there."""
        for slab, _, counts in pack.slots:
            slab.used[: len(counts)] += counts
            for job, n in zip(slab.jobs, counts.tolist(), strict=True):
                job.fed += n
        for state, (take, _) in pack.filled.items():
            state.computed += take
        self._prefilling = [job for job in self._prefilling if job.fed < job.forced]
        self.computed += pack.computed
        self.cache.tokens += pack.computed - pack.scratch

    def _draw(self, stable: Stable, logits: Tensor) -> None:
        positions = np.array([job.state.start + len(job.state.tokens) for job in stable.jobs])
        tokens, logprobs, top = stable.batch.draw(logits, positions)
        ended = []
        for i, job in enumerate(stable.jobs):
            if tokens[i] < 0:
                assert job.steering is not None
                error = EngineError(f"no token is left to go on with: {job.steering.stuck()}")
                self.outbox += [(job, job.finish(None)), (job, error)]
                ended.append(job)
                continue
            self.sampled += 1
            delta = job.accept(tokens[i], logprobs[i], None if top is None else top[i])
            if delta is not None:
                self.outbox.append((job, delta))
                if job.done:
                    ended.append(job)
                    continue
            if job.slab is None:
                self._place(job)
            slab = job.slab
            assert slab is not None
            slab.token[job.slot], slab.position[job.slot] = tokens[i], positions[i]
        for job in ended:
            self._retire(job)

    def _give_scores(self, wanted: list[Wanted], logits: Tensor) -> None:
        at = 0
        for score, rows, targets in wanted:
            if rows:
                score.result += log_probabilities(logits[at : at + len(rows)], targets)
                at += len(rows)
            if score.fed == len(score.tokens):
                self._end_score(score)
                with suppress(InvalidStateError):
                    score.future.set_result(score.result)
