"""Continuous batching: which generations run, what each step computes, what becomes of the results.

One thread owns a scheduler, in inference mode. Each step packs the next token of every slot, prefill chunks of nodes
that somebody waits for (ancestors first, each once), and echoes of predecessors, into one forward.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container
from concurrent.futures import InvalidStateError
from contextlib import suppress
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from orchestra.errors import EngineError
from orchestra.graph import ThreadGraph
from orchestra.runtime.attention.kernels import Kernel
from orchestra.runtime.attention.plan import Plan
from orchestra.runtime.engine import Delta
from orchestra.runtime.local.admission import Admission, Work
from orchestra.runtime.local.cache import Cache
from orchestra.runtime.local.feeding import Wanted, feed_context, feed_forced, feed_scores, feed_starts
from orchestra.runtime.local.gang import LocalGang
from orchestra.runtime.local.integrity import check_integrity
from orchestra.runtime.local.jobs import Job, Score
from orchestra.runtime.local.lockstep import LockStep
from orchestra.runtime.local.model import LoadedModel
from orchestra.runtime.local.pack import Pack
from orchestra.runtime.local.sampler import Batch, log_probabilities


class Stable(NamedTuple):
    """What a step of pure decoding can take over from the last one, while nobody came, left or moved."""

    jobs: list[Job]
    batch: Batch
    plan: Plan


class Scheduler:
    """See the module.

    Args:
        model: the loaded model.
        kernel: of the attention.
        max_batch: most generations in slots.
        prefill: most prefill tokens a step; a long prompt is cut so that others go on decoding.
        limit: most bytes of keys and values, padding of the arena included; None for no limit.
        copy_bytes: see `COPY_BYTES`; 0 reads every context segment in place.
        keep: bytes of keys and values that ended runs may leave for prompts to come.

    Attributes:
        outbox: `(job, delta or error)` to be delivered.
        cache, arena, runs: what is on the engine.
        admission, waiting, scores: who may hold memory, and who waits for it.
        sampled, computed: the counters of `Load`.
        paused: identities of the graphs of groups that were stopped, and will want their slots again.
    """

    def __init__(
        self,
        model: LoadedModel,
        kernel: Kernel,
        max_batch: int,
        prefill: int,
        limit: int | None,
        copy_bytes: int,
        keep: int = 0,
    ) -> None:
        self.model, self.memory = model, model.memory
        self.memory.limit = limit
        self.kernel, self.max_batch, self.prefill = kernel, max_batch, prefill
        self.cache = Cache(model.memory, copy_bytes, keep)
        self.arena, self.runs = self.cache.arena, self.cache.runs
        self.admission = Admission(self.cache, max_batch, self._refuse)
        self.cache.demand = self.admission.demand
        self.waiting, self.scores = self.admission.waiting, self.admission.scores
        self.outbox: list[tuple[Job, Delta | EngineError]] = []
        self.sampled = self.computed = 0
        self.gangs: dict[LocalGang, None] = {}
        self.paused: set[int] = set()
        self._prefilling: list[Job] = []
        self._stable: Stable | None = None

    # -- what comes in -------------------------------------------------------------------------------------------

    def submit(self, job: Job) -> None:
        """Take a generation."""
        run = self.cache.learn(job.graph, job.nodes[:-1], job.nodes[-1])
        state = self.cache.open(run, job.nodes[-1])
        if state is None:
            job.done = True
            self.outbox.append((job, EngineError(f"node {job.nodes[-1].id} is being generated already")))
            if job.group is not None:
                job.group.leave(job)
            return
        place = run.nodes[job.nodes[-1].id]
        job.state, job.forced = state, len(state.tokens)
        job.context = run.context(job.view, place.pieces[:-1])
        job.cached = sum(min(other.done, n) for other, n in job.context)
        if not state.tokens:
            before = run.nodes[job.before[0]].after(job.before[1] + 1) if job.before is not None else None
            if len(place.pieces) > 1:
                before = place.pieces[-2].state, place.pieces[-2].end
            assert before is not None  # the first token of a root, and of a join, is forced
            job.predictor = before[0], before[1] - 1
            if job.group is not None:
                job.feed_predictor()
        state.job = job
        self.admission.arrive(job)

    def submit_score(self, score: Score) -> None:
        """Take a scoring."""
        run = self.cache.learn(score.graph, score.nodes)
        score.context = run.context(score.view)
        if score.before is not None:
            state, length = run.nodes[score.before[0]].after(score.before[1] + 1)
            score.predictor = state, length - 1
        self.admission.arrive(score)

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
        self.close_gangs(list(self.gangs))
        self.cache.forget_kept()
        for state in list(self.cache.sealed):
            self.cache.drop(state)
        self.arena.trim()

    def release(self, graph: ThreadGraph) -> None:
        """Forget a run."""
        run = self.runs.get(id(graph))
        if run is None:
            return
        for score in [score for score in self.scores if score.graph is graph]:
            self._end_score(score)
            score.future.cancel()
        for job in sorted(self.jobs(), key=lambda job: -job.number):
            if job.graph is graph:
                self.cancel(job)
        self.close_gangs([gang for gang in self.gangs if gang.graph is graph])
        self.cache.release(run)
        self.paused.discard(id(graph))
        self.arena.trim()
        self._stable = None

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
        """All generations, admitted ones first."""
        return [work for work in self.admission.admitted if isinstance(work, Job)] + list(self.waiting)

    def check_integrity(self) -> None:
        """See `integrity`; to be called between two steps."""
        check_integrity(self.cache, self.admission, self.gangs)

    # -- a step --------------------------------------------------------------------------------------------------

    def step(self) -> bool:
        """Compute one packed row; returns whether there was anything to compute."""
        for score in [score for score in self.scores if score.future.cancelled()]:
            self._end_score(score)
        self.admission.grow()
        self.admission.admit()
        for gang in self.gangs:
            if need := gang.need:
                self.admission.demand(need)
        if self.admission.changed:
            self._prefilling = [job for job in self._prefilling if job.slab is not None]
        candidates, complete = self._start()
        if self.admission.changed:
            self._stable, self.admission.changed = None, False
        pack = Pack(self.memory, self.kernel, self.prefill, self.model.rotary)
        for slab in self.arena.slabs.values():
            if slab.jobs and (slab.gang is None or self._ready(slab.gang, pack)):
                pack.add_slab(slab)
        silent = feed_forced(pack, self._prefilling)
        starts = feed_starts(pack, candidates, complete)
        wanted = feed_scores(pack, self.scores)
        if not pack.rows:
            return False
        plain = not (self._prefilling or starts or wanted or pack.filled or self.gangs)
        stable = self._stable if plain else None
        tokens, positions = pack.inputs()
        if stable is None:
            stable = self._stabilise(pack, silent, [job for job, _ in starts], positions)
        else:
            stable.plan.advance(positions)
        self._stable = stable if plain else None
        keep = None
        if not plain:
            rows = [first + job.slot for slab, first, _ in pack.slots for job in slab.jobs if job not in silent]
            rows += [row for _, row in starts]
            rows += [row for want in wanted for row in want.rows]
            keep, index = np.unique(np.array(rows, np.int64), return_inverse=True)
        logits = self.model.forward(tokens, positions, keep, stable.plan)
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
        if not feed_context(pack, gang.unsettled()):
            return False
        gang.feed(pack)
        return True

    def _start(self) -> tuple[list[Job], Container[LockStep]]:
        """Place generations with tokens to be fed and a computed context.

        Returns:
            Those that may start in this step otherwise, or have context to be computed, in order of arrival; and the
            groups that may.
        """
        candidates = []
        entering = sorted(self.admission.entering, key=lambda job: job.number)
        ready = {job for job in entering if all(state.done >= n for state, n in job.context)}
        counts = Counter(job.group for job in ready if job.group is not None)
        complete = {group for group, n in counts.items() if n == group.members}
        for job in entering:
            if job in ready and (job.given or (job.pending is not None and job.group in complete)):
                self._place(job)
                if job.given:
                    self._prefilling.append(job)
            else:
                candidates.append(job)
        return candidates, complete

    def _place(self, job: Job) -> None:
        self._stable = None
        del self.admission.entering[job]
        self.cache.place(job)

    def _retire(self, job: Job) -> None:
        """Take a generation out; what it computed stays."""
        self._stable = None
        if job in self._prefilling:
            self._prefilling.remove(job)
        if job.group is not None:
            job.group.leave(job)
        self.admission.leave(job)

    def _refuse(self, work: Work, error: EngineError) -> None:
        """End what can never fit into memory."""
        if isinstance(work, Job):
            for job in [work] if work.group is None else list(work.group.jobs):
                self.outbox += [(job, job.finish(None)), (job, error)]
                self._retire(job)
            return
        self._end_score(work)
        with suppress(InvalidStateError):  # its reader has been cancelled
            work.future.set_exception(error)

    def _end_score(self, score: Score) -> None:
        self.admission.leave(score)

    def _stabilise(self, pack: Pack, silent: set[Job], starts: list[Job], positions: Tensor) -> Stable:
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
        return Stable(jobs, batch, pack.finish(positions))

    def _commit(self, pack: Pack) -> None:
        """Count what was computed, now that it is there."""
        for slab, _, counts in pack.slots:
            slab.used[: len(counts)] += counts
            for job, n in zip(slab.jobs, counts.tolist(), strict=True):
                if job.pending is None:
                    job.fed += n
                else:
                    self.cache.inherit(job)
        for state, (take, _) in pack.filled.items():
            state.computed += take
        self._prefilling = [job for job in self._prefilling if job.fed < job.given]
        self.computed += pack.computed
        self.cache.tokens += pack.computed - pack.scratch

    def _draw(self, stable: Stable, logits: Tensor) -> None:
        positions = np.array([job.state.start + len(job.state.tokens) for job in stable.jobs])
        counts = [job.sampled for job in stable.jobs] if stable.batch.counts else ()
        tokens, logprobs, top, tempered = stable.batch.draw(logits, positions, counts)
        ended = []
        for i, job in enumerate(stable.jobs):
            if tokens[i] < 0:
                assert job.steering is not None
                error = EngineError(f"no token is left to go on with: {job.steering.stuck()}")
                self.outbox += [(job, job.finish(None)), (job, error)]
                ended.append(job)
                continue
            self.sampled += 1
            law = None if tempered is None else tempered[i]
            delta = job.accept(tokens[i], logprobs[i], None if top is None else top[i], law)
            if job.group is not None:
                job.group.note(job, tokens[i], logprobs[i], law)
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
        for group in {job.group for job in stable.jobs if job.group is not None}:
            stopped = group.stopped()
            self.outbox += [(job, job.finish("paused")) for job in stopped]
            self.paused |= {id(job.graph) for job in stopped}
            ended += stopped
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
