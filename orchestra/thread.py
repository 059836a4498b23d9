"""Threads: immutable points in a run's graph, and the verbs with which strategies are written."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from random import Random
from typing import TYPE_CHECKING, Any, Literal, overload

from orchestra.answers import Reasoning, split_reasoning
from orchestra.errors import BudgetExceeded, UsageError
from orchestra.graph import Edge, Node, Span
from orchestra.group import Future, member_of
from orchestra.outcome import Candidate, Outcome
from orchestra.run import Path, Run, Watch, frontier, scope
from orchestra.runtime.engine import Capability, Prompt, Sampling
from orchestra.runtime.sampling import normal, settled
from orchestra.stem import Later, Stem, Text, before_stop, beginning, copy, encode
from orchestra.threads import Threads

if TYPE_CHECKING:
    from orchestra.budget import Budget
    from orchestra.shared_cache import Headers, Layout, SharedCache
    from orchestra.strategies.base import Spec

Join = Literal["auto", "reuse", "recompute"]


@dataclass(frozen=True)
class Thread:
    """A point in a run: what has been said so far, and where to go on.

    Threads are values. Every verb leaves its thread as it was and gives a new one, so a thread can be forked, raced
    and gone back to at any time. Two threads never share randomness: going on twice from the same thread is a fork.
    """

    _run: Run = field(repr=False)
    _stem: Stem = field(repr=False)
    path: Path = ()
    prompt: Prompt = ""
    _tail: tuple[Text, ...] = ()
    _alias: str = ""
    _defaults: tuple[tuple[str, Any], ...] = ()
    _node: Node | None = field(default=None, repr=False)
    _length: int = 0
    _before: str = field(default="", repr=False)
    matched: str | int | None = None
    _template: Mapping[str, Any] | None = field(default=None, repr=False)

    # -- what it says ------------------------------------------------------------------------------------------------

    @property
    def text(self) -> str:
        """All that stands after the prompt, forced and sampled."""
        self._touch()
        return self._said

    @property
    def _said(self) -> str:
        """The text; the program does not come after it by this."""
        return self._before + "".join(piece if isinstance(piece, str) else piece.text for piece in self._tail)

    @property
    def generated(self) -> str:
        """The sampled text of the last generation; empty before the first."""
        self._touch()
        return "".join(span.text for span in self._sampled)

    @property
    def reasoning(self) -> Reasoning:
        """The text split into thinking and solution."""
        return split_reasoning(self.text)

    @property
    def answer(self) -> str | None:
        """The answer recorded with the last generation, else the one in the text, as the run's task extracts it."""
        return self.answer_in(self.text)

    def answer_in(self, text: str) -> str | None:
        """The answer recorded with the last generation, else the one in `text`, as the run's task extracts it."""
        recorded: str | None = self._node.notes.get("answer") if self._node is not None else None
        return self._run.extract(text) if recorded is None else recorded

    @property
    def finish_reason(self) -> str | None:
        """Why the last generation ended: `stop`, `length`, ...; None before the first."""
        return self._node.finish_reason if self._node is not None else None

    @property
    def end(self) -> Edge | None:
        """The node of the last generation, and how much of it this thread keeps; None before the first."""
        return Edge(self._node.id, self._length) if self._node is not None else None

    @property
    def logprob(self) -> float | None:
        """Sum of the raw log-probabilities of the last generation (nats); None if the engine does not report them."""
        values = self.logprobs
        return sum(values) if values else None

    @property
    def logprobs(self) -> list[float]:
        """Raw log-probability of each token of the last generation (nats)."""
        return [value for span in self._sampled for value in span.logprobs]

    @property
    def tempered(self) -> list[float]:
        """Log-probability of each token of the last generation under the law that it was drawn from, if asked for."""
        return [value for span in self._sampled for value in span.tempered]

    @property
    def sampled_tokens(self) -> int:
        """Number of tokens of the last generation."""
        return sum(span.count for span in self._sampled)

    @property
    def _sampled(self) -> list[Span]:
        return [span for span in self._node.spans if span.origin == "sampled"] if self._node is not None else []

    @property
    def capabilities(self) -> frozenset[Capability]:
        """What its engine can do."""
        return self._run.engine_for(self._alias).capabilities

    @property
    def eos_ids(self) -> frozenset[int]:
        """Ids that end a sequence on its engine, as far as they are known; see `Engine.eos_ids`."""
        return self._run.engine_for(self._alias).eos_ids

    async def decode(self, ids: Sequence[int], **options: bool) -> str:
        """Text of token ids as its engine reads them; see `Engine.decode`."""
        engine = self._run.engine_for(self._alias)
        with self._run.waiting_for(engine):
            return await engine.decode(ids, **options)

    def _touch(self) -> None:
        """Reading a result is coming after it, however the program awaited it (a gather of its own, say)."""
        if self._node is not None and self._node.id not in frontier.get():
            frontier.set(frontier.get() | {self._node.id})

    def random(self, name: str) -> Random:
        """Random numbers for the strategy `name`: a function of the run's seed and of this thread's place in it."""
        return Random(f"{name}/{self._run.seed}/{self.path}")

    # -- verbs -------------------------------------------------------------------------------------------------------

    def append(self, text: str, ids: Sequence[int] | None = None) -> Thread:
        """Write `text` into the thread; it is computed when the thread is next generated or forked.

        Args:
            text: what it says.
            ids: its token ids, where the tokenizer is not to choose them: tokens that the model has weighed, say.
        """
        if ids is None:
            return replace(self, _tail=(*self._tail, text)) if text else self
        span = Span("forced", list(ids), len(ids), text)

        async def given(_: list[Edge]) -> list[Span]:
            return [replace(span, tokens=list(span.tokens))]

        return replace(self, _tail=(*self._tail, Later(text, given))) if span.count else self

    @overload
    def fork(self, what: int) -> Threads: ...
    @overload
    def fork(self, what: Sequence[str]) -> Threads: ...
    def fork(self, what: int | Sequence[str]) -> Threads:
        """Fork into `what` equal threads, or into one for each of the texts. Nothing is copied or computed."""
        texts = [""] * what if isinstance(what, int) else [what] if isinstance(what, str) else what
        if not texts:
            raise UsageError("a fork has at least one branch")
        base = self._rooted
        forks = (base._with(path=self._run.fork_path(self.path)) for _ in texts)
        return Threads(forks if isinstance(what, int) else map(Thread.append, forks, texts))

    def _with(self, **changes: Any) -> Thread:
        """`dataclasses.replace` without its checks: groups have thousands of members."""
        thread = object.__new__(Thread)
        thread.__dict__.update(self.__dict__)
        thread.__dict__.pop("_rooted", None)  # cached, and of the old one
        thread.__dict__.update(changes)
        return thread

    def _grown(self, node: Node, length: int, matched: str | int | None) -> Thread:
        """This thread after a generation in `node`, of which it keeps the first `length` tokens."""
        return self._with(
            _stem=Stem.at(self._run, node, length),
            path=tuple(node.path),
            _tail=(),
            _node=node,
            _length=length,
            _before=self._said + "".join(span.text for span in node.spans if span.origin == "sampled"),
            matched=matched,
        )

    @cached_property
    def _rooted(self) -> Thread:
        """This thread with its text put into a stem: the same one whoever asks, so that forks and joins share it."""
        if not self._tail:
            return self
        stem = Stem(self._run, (self._stem,), self._tail, self.path, self._alias)
        return replace(self, _stem=stem, _tail=(), _before=self._said)

    async def generate(self, *, watch: Watch | None = None, **sampling: Any) -> Thread:
        """Sample until a stop or a limit.

        Args:
            watch: called with every `Delta` as it comes; once it returns True the generation is cancelled, on the
                server too, and the thread is what there is of it (`finish_reason` is then `cancelled`).
            sampling: fields of `Sampling` (temperature, top_p, max_tokens, stop, ...); what is not given comes from
                `using`, the run's settings, and last `Sampling`'s defaults.

        Raises:
            BudgetExceeded: a budget ended it, or left nothing to begin with. What was sampled is in the graph.
            UsageError: wrong settings; or the context has no room.
            EngineError: the engine failed.
        """
        settings = self.sampling(**sampling)
        edges = await self._stem.edges()
        spans = await encode(self._run, edges, self._tail, self._alias)
        try:
            done = await self._run.generate(edges, spans, self.path, self._alias, settings, watch)
        except BudgetExceeded as spent:
            raise BudgetCut(spent, self) from None
        thread = self._grown(done.node, done.length, done.matched)
        if done.cut is not None:
            raise BudgetCut(done.cut, thread)
        return thread

    def sampling(self, **given: Any) -> Sampling:
        """The settings that a generation would have; see `generate`."""
        values = dict(self._defaults) | {key: value for key, value in given.items() if value is not None}
        return settled(values)

    def using(self, **sampling: Any) -> Thread:
        """Sampling settings for this thread and all that come from it, where the caller has set nothing."""
        values = normal({key: value for key, value in sampling.items() if value is not None})
        return replace(self, _defaults=tuple((values | dict(self._defaults)).items()))

    def setting(self, **sampling: Any) -> Thread:
        """Like `using`, but also where the caller has set something else."""
        return replace(self, _defaults=tuple((dict(self._defaults) | normal(sampling)).items()))

    async def before_stop(self) -> Thread:
        """Go back to before the stop string, or the stop token, that ended the last generation.

        What was sampled stays in the graph and counts; what comes next does not attend to it, and has a fork path of
        its own. A token that holds both text and the beginning of the stop string goes too, and its text is written
        anew.

        Raises:
            UsageError: no stop string or token has just ended a generation here.
            CapabilityError: the engine does not tell token ids.
        """
        if self._node is None or self.matched is None or self._tail:
            raise UsageError("before_stop() goes back from a generation that a stop string or token has just ended")
        self._touch()
        cut = await before_stop(self._run, self._node, self.matched)
        return replace(
            self,
            _stem=Stem.at(self._run, self._node, cut.length),
            path=self._run.fork_path(self.path),
            _tail=(cut.rest,) if cut.rest else (),
            _length=cut.length,
            _before=self.text.removesuffix(self.generated) + cut.kept,
            matched=None,
        )

    async def cut(self, length: int) -> Thread:
        """Go back to the first `length` tokens of the last generation, to generate anew from there.

        What was sampled stays in the graph and counts; what comes next attends to no more than these tokens, and has a
        fork path of its own. Until then the thread has no last generation. A character that the cut goes through is
        shown as incomplete.

        Raises:
            UsageError: no generation has just ended here, or it has fewer tokens.
            CapabilityError: the engine does not tell token ids.
        """
        if self._node is None or self._tail:
            raise UsageError("cut() goes back from a generation that has just ended")
        if not 0 <= length <= self.sampled_tokens:
            raise UsageError(f"cut({length}) of a generation of {self.sampled_tokens} tokens")
        self._touch()
        return replace(
            self,
            _stem=Stem.at(self._run, self._node, len(self._node) - self.sampled_tokens + length),
            path=self._run.fork_path(self.path),
            _node=None,
            _length=0,
            _before=self.text.removesuffix(self.generated) + await beginning(self._run, self._node, length),
            matched=None,
        )

    async def count(self, text: str) -> int:
        """How many tokens `text` has on this thread's engine, by itself."""
        engine = self._run.engine_for(self._alias)
        with self._run.waiting_for(engine):
            return (await engine.encode(text)).count

    async def opening(self, name: str) -> str:
        """What its model's folder says under a name of `Engine.openings`; empty for most models."""
        engine = self._run.engine_for(self._alias)
        with self._run.waiting_for(engine):
            await engine.open()
        return engine.openings.get(name, "")

    async def opened(self) -> bool:
        """Whether the prompt leaves the reasoning channel open, as some chat templates do: text begins as thinking."""
        first = next(iter(self._run.graph.view(await self._stem.edges())), None)
        spans = self._run.graph.nodes[first].spans if first is not None else []
        return any(span.text.rstrip().endswith("<think>") for span in spans if span.origin == "prompt")

    async def score(self, text: str) -> list[float]:
        """Log-probability (nats) of each token of `text` as this thread's continuation.

        Raises:
            CapabilityError: the engine cannot score.
        """
        edges = await self._stem.edges()
        before = await encode(self._run, edges, self._tail, self._alias)
        given = await encode(self._run, edges, (text,), self._alias)
        engine, streams = self._run.engine_for(self._alias), self.sampling().streams
        self._run.check_settings(engine, Sampling(streams=streams))
        node = self._run.settle(edges, before + given, self.path, self._alias)
        if streams is not None:
            node.notes["streams"] = streams
        with self._run.waiting_for(engine):
            scores = await engine.score(self._run.graph, node)
        return scores[sum(span.count for span in before) :]

    def spawn(self, prompts: Sequence[Prompt], engine: str | None = None) -> Threads:
        """New threads with contexts of their own (not forks: they see nothing of this thread), after this one.

        Messages go through the chat template with the run's own settings for it, unless another engine is named.

        Args:
            prompts: one prompt each.
            engine: alias of the engine to run them on; default: this thread's.

        Raises:
            UsageError: there is no such engine.
        """
        self._touch()
        alias = self._alias if engine is None else engine
        self._run.engine_for(alias)

        def begin(prompt: Prompt) -> Thread:
            template = self._template if alias == self._alias and not isinstance(prompt, str) else None
            root = Thread.root(self._run, prompt, path=self._run.fork_path(self.path), alias=alias, template=template)
            return root.using(**dict(self._defaults))

        return Threads(map(begin, prompts))

    @classmethod
    def root(
        cls, run: Run, prompt: Prompt, *, path: Path = (), alias: str = "", template: Mapping[str, Any] | None = None
    ) -> Thread:
        """A thread of `run` that begins with a prompt, which is encoded when it is first needed."""

        async def encoded(_: list[Edge]) -> list[Span]:
            return [await run.encode_prompt(prompt, alias, template or {})]

        stem = Stem(run, (), (Later("", encoded),), path, alias)
        return cls(run, stem, path, prompt, _alias=alias, _template=template)

    def join(self, branches: Iterable[Thread], text: str = "", how: Join = "auto") -> Thread:
        """Bring forks of this thread back into one.

        Args:
            branches: threads that were forked from this one, in the order in which they are to stand.
            text: what to write after them.
            how: `reuse`: the branches become context of what follows, which starts after the longest of them; nothing
                is computed again, and `text` must not be empty. `recompute`: their tokens are written into this thread
                one after the other. `auto`: reuse where the engine can.

        Raises:
            UsageError: a branch is no descendant of this thread, or a reuse join has no text.
            CapabilityError: the engine cannot do what `how` asks.
        """
        branches = list(branches)
        for branch in branches:
            branch._touch()
        if how == "auto":
            reuse = Capability.REUSE_JOIN in self.capabilities and bool(text)
            how = "reuse" if reuse and branches else "recompute"
        base = self._rooted
        seen = "".join(branch.text.removeprefix(self.text) for branch in branches)
        if how == "reuse":
            if not text:
                raise UsageError("a reuse join needs text: its first token is predicted by no single branch")
            stems = [branch._rooted._stem for branch in branches]
            stem = Stem(self._run, stems, (), self.path, self._alias)
            return replace(base, _stem=stem, _before=self.text + seen).append(text)

        async def copies(here: list[Edge]) -> list[Span]:
            return [span for branch in branches for span in copy(self._run, await branch._rooted._stem.edges(), here)]

        return replace(base, _tail=(Later(seen, copies),)).append(text)

    def shared(self, workers: int, layout: Layout = "combined", headers: Headers | None = None) -> SharedCache:
        """Workers who go on from here side by side and read each other's tokens as they appear; see `SharedCache`.

        Raises (when it is entered):
            CapabilityError: the engine has no concurrent cache.
        """
        from orchestra.shared_cache import Headers, SharedCache

        return SharedCache(self, workers, layout, headers or Headers())

    async def run(self, strategy: Spec, *, budget: Budget | None = None) -> Outcome:
        """Run a strategy from here, inside this run; its budget is part of the ones around it."""
        from orchestra.strategies.base import execute

        return await execute(strategy, self, budget)

    def start(
        self,
        strategy: Spec | None = None,
        *,
        work: Callable[[Thread], Coroutine[Any, Any, Any]] | None = None,
        **sampling: Any,
    ) -> Future[Any]:
        """Begin in the background: a generation, a strategy, or any coroutine function of a thread.

        Awaiting the future is coming after it. What nobody awaits is cancelled when the run ends.
        """
        if strategy is not None:
            begun: Coroutine[Any, Any, Any] = self.run(strategy)
        else:
            begun = self.generate(**sampling) if work is None else work(self)
        return Future(self._run.start(member_of(begun)))

    # -- results -----------------------------------------------------------------------------------------------------

    def candidate(self, weight: float = 1.0) -> Candidate:
        """This thread as a candidate."""
        text, logprobs = self.text, self.logprobs
        return Candidate(
            text=text,
            answer=self.answer_in(text),
            weight=weight,
            finish_reason=self.finish_reason,
            tokens=self.sampled_tokens,
            logprob=sum(logprobs) if logprobs else None,
            logprob_tokens=len(logprobs),
        )

    def offer(self, candidate: Candidate) -> None:
        """Tell the innermost strategy what it would choose from if its budget ended now."""
        scope().offers.append(candidate)


class BudgetCut(BudgetExceeded):
    """A budget ended a generation; `thread` is what there is of it."""

    def __init__(self, cut: BudgetExceeded, thread: Thread) -> None:
        Exception.__init__(self, str(cut))
        self.limit, self.ledger, self.thread = cut.limit, cut.ledger, thread
