"""The in-process engine: PyTorch on an unchanged Hugging Face decoder, its cache the thread graph."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import astuple
from functools import partial
from typing import Any, Self

import torch
import transformers

from orchestra.errors import CapabilityError, EngineError, OrchestraError, PromptError, UsageError
from orchestra.graph import Node, Span, ThreadGraph
from orchestra.runtime.attention.cost import COPY_BYTES
from orchestra.runtime.attention.kernels import KERNELS
from orchestra.runtime.engine import Capability, Delta, Engine, Gang, Load, Look, Prompt, Request, Sampling, Stream
from orchestra.runtime.local import sampler
from orchestra.runtime.local.detokenize import Detokenizer, Endings, Finder
from orchestra.runtime.local.gang import LocalGang
from orchestra.runtime.local.grammar import Grammars
from orchestra.runtime.local.jobs import Job, Score
from orchestra.runtime.local.lockstep import LockStep
from orchestra.runtime.local.model import FORWARDS, LoadedModel, load_model, load_plain
from orchestra.runtime.local.nodes import Snapshot, snapshot
from orchestra.runtime.local.prompts import Prompts
from orchestra.runtime.local.scheduler import Scheduler
from orchestra.runtime.local.sources import Source
from orchestra.runtime.local.steering import Steering
from orchestra.runtime.local.streams import Variants, fingerprint, variants
from orchestra.runtime.local.worker import Worker
from orchestra.runtime.openings import KEY, openings_of
from orchestra.runtime.sampling import check

_CHUNK = 16  # tokens from the worker's thread at a time, when nobody looks at them one by one


class LocalEngine(Engine):
    """Runs a causal language model in this process. The model is loaded on first use, or by `open`.

    Args:
        source: a model folder (the network is never asked), or a Hugging Face id.
        dtype: `float32`, `bfloat16` or `float16`.
        device: a torch device.
        kernel: `auto`, or `reference` (slow, the oracle).
        forward: `auto`, or `transformers` (the module's own, the oracle of the lean one).
        max_batch: most generations decoded at once.
        prefill: most prompt tokens computed in one step; longer prompts take several, others go on decoding.
        memory: most bytes of keys and values, padding included; None for no limit. What nobody reads is evicted, then
            generations wait, then the youngest give way and are computed again; one that does not fit alone is refused.
        prefix_cache: bytes of keys and values that ended runs may leave for prompts that begin like theirs; 0 for none.
            Runs that are there at the same time share in any case.
        copy_bytes: see `attention.cost.COPY_BYTES`; 0 reads every context segment in place.
        adapter: folder of a PEFT adapter for the model; a `source` that is one itself names its model.
        streams: folders of ParScale checkpoints whose streams were made for this model: further values of
            `Sampling.streams`. Each number of streams has keys and values, and so limits, of its own.
        debug: check the cache's invariants after every step; a broken one is an error of all that runs.
        hint: appended to the error for words outside the vocabulary: what the model speaks, who speaks more.
    """

    capabilities = frozenset(Capability)

    def __init__(
        self,
        source: str,
        *,
        dtype: str = "float32",
        device: str = "cpu",
        kernel: str = "auto",
        forward: str = "auto",
        max_batch: int = 128,
        prefill: int = 512,
        memory: int | None = None,
        prefix_cache: int = 0,
        copy_bytes: int = COPY_BYTES,
        adapter: str | None = None,
        streams: Sequence[str] = (),
        debug: bool = False,
        hint: str = "",
    ) -> None:
        if kernel not in KERNELS:
            raise UsageError(f"unknown kernel {kernel!r} (known: {', '.join(KERNELS)})")
        if forward not in FORWARDS:
            raise UsageError(f"unknown forward {forward!r} (known: {', '.join(FORWARDS)})")
        for name, value in (("max_batch", max_batch), ("prefill", prefill)):
            if value < 1:
                raise UsageError(f"{name} must be at least 1, got {value}")
        for name, bytes_ in (("memory", memory), ("prefix_cache", prefix_cache)):
            if bytes_ is not None and bytes_ < 0:
                raise UsageError(f"{name} is a number of bytes, got {bytes_}")
        self.name = f"local:{source}"
        self.source, self.dtype, self.device, self.kernel, self.hint = source, dtype, device, kernel, hint
        self.adapter, self.forward = adapter, forward
        self._scheduling = (kernel, max_batch, prefill, memory, copy_bytes, prefix_cache)
        self._debug = debug
        self._lock = threading.Lock()
        self._streams = tuple(streams)
        self._variants: Variants | None = None
        self._prompts: Prompts | None = None
        self._workers: dict[int, Worker] = {}  # by number of streams, made for the first that asks
        self._endings: dict[tuple[str, ...], Endings] = {}
        self._grammars: Grammars | None = None  # made for the first generation that has one
        self._closed = False

    async def open(self) -> Self:
        """Load the model now.

        Raises:
            UsageError: there is no such model, or the engine cannot run it; one line that says why.
        """
        if not self._workers:
            await asyncio.to_thread(self._open)
        return self

    def _open(self, streams: int | None = None) -> tuple[LoadedModel, Prompts, Worker]:
        with self._lock:
            if self._closed:
                raise EngineError(f"{self.name} is closed")
            if self._variants is None or self._prompts is None:
                how = self.dtype, self.device, self.adapter, self.forward, bool(self._streams)
                model = load_model(self.source, *how)
                place = Source.of(self.source, self.adapter)
                self._variants = variants(model, place, self._streams)  # compared now: nothing runs on the model yet
                self._prompts = Prompts(model.tokenizer, model.context, self.hint, model.eos)
                self.context_length = model.context
                self.openings = openings_of(getattr(model.module.config, KEY, None))
            models, own = self._variants
            count = own if streams is None else streams
            if count not in models:
                has = ", ".join(map(str, sorted(models)))
                raise UsageError(f"{self.name} has no {count} streams (it has {has}); ?streams=DIR adds a checkpoint's")
            if count not in self._workers:
                self._workers[count] = Worker(Scheduler(models[count], *self._scheduling), self._debug)
            return models[count], self._prompts, self._workers[count]

    async def encode_prompt(self, prompt: Prompt, **template: Any) -> Span:
        """See `Engine.encode_prompt`."""
        await self.open()
        return self._open()[1].prompt(prompt, **template)

    async def encode(self, text: str) -> Span:
        """See `Engine.encode`."""
        await self.open()
        return self._open()[1].forced(text)

    async def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """See `Engine.decode`."""
        await self.open()
        return self._open()[1].continuation(list(ids), skip_special=skip_special_tokens)

    @property
    def eos_ids(self) -> frozenset[int]:
        """See `Engine.eos_ids`; known once the engine is open."""
        return frozenset() if self._variants is None else self._variants.models[1].eos

    def generate(self, request: Request) -> Stream:
        """See `Engine.generate`."""
        started: tuple[Worker, Job] | None = None

        def cancel() -> None:
            if started is not None:
                worker, job = started
                worker.cancel(job)

        stream = Stream(cancel, request.chunk)
        try:
            model, prompts, worker = self._open(request.sampling.streams)
            job = self._job(request, stream, model, prompts, worker)
            self._note(stream, model)
            worker.submit(job)
            started = worker, job
        except OrchestraError as error:
            stream.fail(error)
        return stream

    @staticmethod
    def _note(stream: Stream, model: LoadedModel) -> None:
        """Say in how many streams a generation is computed."""
        if model.streams is not None:
            stream.push(Delta(notes={"streams": model.streams.streams}))

    def _job(self, request: Request, stream: Stream, model: LoadedModel, prompts: Prompts, worker: Worker) -> Job:
        graph, node, sampling = request.graph, request.node, request.sampling
        if (wrong := check(sampling)) is not None:
            raise UsageError(wrong)
        if request.gang is not None and model.streams is not None:
            # Prefixes have no position: a query that is turned to another place would see them differently.
            raise CapabilityError(f"{self.name} has a concurrent cache without streams only (streams=1)")
        view, snapshots, before = _look(worker, graph, node)
        forced = snapshots[-1].tokens
        if before is None and not forced:
            raise PromptError("nothing to go on from: the prompt is empty")
        room = model.context - node.start - len(forced)
        if room < 1:
            raise PromptError(
                f"the prompt has {node.start + len(forced)} tokens; with the answer, "
                f"{self.name} has room for {model.context}"
            )
        ends: dict[int, tuple[str | int | None, bool]] = {}
        if not sampling.ignore_eos:
            ends.update(dict.fromkeys(model.eos, (None, True)))
        ends.update({token: (token, False) for token in sampling.stop_ids})
        decode = partial(prompts.decode, skip_special=sampling.skip_special_tokens)
        before_it = forced or _last_tokens(graph, before)
        endings = finder = None
        if stops := sampling.stop:
            endings = self._endings.get(stops) or self._endings.setdefault(stops, Endings(prompts.decode_all, stops))
            finder = Finder(stops, Detokenizer(prompts.decode_all, before_it))
            # Who stops at the end of sequence by its name means that token, and not that the model has ended.
            ends.update({token: (text, False) for token in model.eos if (text := prompts.decode_all([token])) in stops})
        return Job(
            graph,
            snapshots,
            view,
            None if forced else before,
            sampling,
            sampler.noise_key(request.seed, request.path),
            min(room, sampling.max_tokens or room),
            ends,
            endings,
            stream,
            asyncio.get_running_loop(),
            request.chunk or _CHUNK,
            Detokenizer(decode, before_it),
            finder,
            gang=request.gang if isinstance(request.gang, LocalGang) else None,
            steering=self._steering(sampling, model, prompts),
        )

    def generate_in_step(self, requests: Sequence[Request], look: Look) -> list[Stream]:
        """See `Engine.generate_in_step`; at most `max_batch`, all in one number of streams."""
        numbers = {request.sampling.streams for request in requests}
        if len(numbers) > 1:
            raise UsageError("generations in lock-step have one number of streams")
        model, prompts, worker = self._open(next(iter(numbers), None))
        if len(requests) > (most := self._scheduling[1]):
            raise UsageError(f"{len(requests)} generations in lock-step; {self.name} takes {most} (max_batch=)")
        group = LockStep(look)
        jobs: list[Job] = []
        streams = []

        def cancel(index: int) -> None:
            if index < len(jobs):
                worker.cancel(jobs[index])

        for index, request in enumerate(requests):
            streams.append(Stream(partial(cancel, index), request.chunk))
            job = self._job(request, streams[-1], model, prompts, worker)
            self._note(streams[-1], model)
            if job.nodes[-1].tokens:
                raise UsageError("generations in lock-step begin with a sampled token, not with text")
            job.group, group.jobs[job] = group, index
            jobs.append(job)
        worker.submit_together(jobs)
        return streams

    def forget(self, graph: ThreadGraph, nodes: Iterable[int]) -> None:
        """See `Engine.forget`."""
        known = list(nodes)
        for worker in list(self._workers.values()):
            worker.forget(graph, known)

    def gang(self, graph: ThreadGraph, members: int) -> Gang:
        """See `Engine.gang`."""
        model, _, worker = self._open(1)
        if model.rotary is None or model.memory.windows:
            what = "sliding windows" if model.memory.windows else "positions that are no plain rotation"
            raise CapabilityError(f"{self.name} has no concurrent cache: the model has {what}")
        most = self._scheduling[1]
        if not 1 <= members <= most:
            raise UsageError(f"a gang has 1 to {most} members (max_batch), not {members}")
        return worker.gang(graph, members, model.context, model.rotary)

    def _steering(self, sampling: Sampling, model: LoadedModel, prompts: Prompts) -> Steering | None:
        """What changes a generation's logits; None if nothing does."""
        if not sampling.steers:
            return None
        vocabulary: int = model.module.config.get_text_config().vocab_size
        if wrong := [token for token, _ in sampling.logit_bias if not 0 <= token < vocabulary]:
            raise UsageError(f"logit_bias names token {wrong[0]}; {self.name} has tokens 0 to {vocabulary - 1}")
        if Capability.GRAMMAR in sampling.needs and self._grammars is None:
            self._grammars = Grammars(model.tokenizer, prompts, vocabulary, model.eos)
        return Steering(sampling, self._grammars.start(sampling) if self._grammars is not None else None)

    async def score(self, graph: ThreadGraph, node: Node) -> list[float]:
        """See `Engine.score`. The first token of a root, or of a reuse join, is predicted by nothing: 0."""
        await self.open()
        model, _, worker = self._open(node.notes.get("streams"))
        view, snapshots, before = _look(worker, graph, node, whole=True)
        tokens = list(node.tokens)
        if not tokens:
            return []
        if node.start + len(tokens) > model.context:
            raise PromptError(f"{node.start + len(tokens)} tokens to score; {self.name} has room for {model.context}")
        future: Future[list[float]] = Future()
        worker.score(Score(graph, snapshots, view, before, tokens, node.start, future))
        return await asyncio.wrap_future(future)

    async def update_weights(self, weights: Mapping[str, Any]) -> None:
        """See `Engine.update_weights`: in memory, between two steps. A model with streams keeps its weights."""
        await self.open()
        model, _, worker = self._open()
        assert self._variants is not None  # open
        if len(self._variants.models) > 1:
            raise CapabilityError(f"{self.name} has learned streams, which were made for the weights that it has")
        await asyncio.wrap_future(worker.between_runs(lambda: model.update(weights)))

    async def release(self, graph: ThreadGraph) -> None:
        """See `Engine.release`."""
        for leaving in [worker.release(graph) for worker in list(self._workers.values())]:
            await asyncio.wrap_future(leaving)

    def load(self) -> Load:
        """See `Engine.load`; of all numbers of streams together."""
        loads = [astuple(worker.load()) for worker in list(self._workers.values())]
        return Load(*map(sum, zip(*loads, strict=True)))

    async def check_integrity(self) -> None:
        """Check the cache's invariants now.

        Raises:
            AssertionError: what is wrong.
        """
        await self.open()
        for worker in list(self._workers.values()):
            await asyncio.wrap_future(worker.check_integrity())

    def facts(self) -> dict[str, Any]:
        """See `Engine.facts`; loads the model if need be."""
        model, _, _ = self._open()
        config = model.module.config
        assert self._variants is not None  # open
        models, own = self._variants
        streams = {"streams": own, "streams_known": sorted(models)} if len(models) > 1 else {}
        return {
            "engine": "local",
            "model": self.name.removeprefix("local:"),
            "architecture": config.model_type,
            "parameters": sum(parameter.numel() for parameter in model.module.parameters()),
            "fingerprint": fingerprint(models),
            "context_length": model.context,
            "dtype": self.dtype,
            "device": self.device,
            "kernel": self.kernel,
            "forward": "transformers" if model.lean is None else "lean",
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            **streams,
        }

    def plain_model(self) -> Any:
        """The model with its own attention, loaded anew: what the parity law compares with."""
        return load_plain(self.source, self.dtype, adapter=self.adapter)

    async def close(self) -> None:
        """See `Engine.close`; generations in flight end as cancelled."""
        with self._lock:
            self._closed = True
        for worker in self._workers.values():
            await asyncio.to_thread(worker.close)
        self._variants = self._prompts = None


def _look(
    worker: Worker, graph: ThreadGraph, node: Node, whole: bool = False
) -> tuple[dict[int, int], list[Snapshot], tuple[int, int] | None]:
    """What the worker must know about a node's context, read now: the graph grows on this thread, not on the worker's.

    Args:
        worker: whose knowledge counts.
        graph: the run.
        node: whose context to read.
        whole: leave the node itself out.

    Returns:
        The view, the nodes, and the token that predicts the node's first one.
    """
    view = graph.view(node.context)
    snapshots = []
    for i, length in view.items():
        if worker.known(graph, i) < length:
            seen = graph.nodes[i]
            tokens = seen.tokens
            if len(tokens) < length:
                raise EngineError(
                    f"node {i} has {length} tokens but only {len(tokens)} token ids; a local engine needs all"
                )
            snapshots.append(snapshot(seen, graph.view(seen.context), tokens))
    if not whole:
        snapshots.append(snapshot(node, view, list(node.tokens)))
    edge = node.context[0] if len(node.context) == 1 else None
    return view, snapshots, None if edge is None else (edge.parent, edge.length - 1)


def _last_tokens(graph: ThreadGraph, before: tuple[int, int] | None) -> Sequence[int]:
    if before is None:
        return ()
    parent, index = before
    return graph.nodes[parent].tokens[max(0, index - 7) : index + 1]
