"""What a program calls: `connect`, then `run` and `stream`; and `run` for those without an event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from typing import Any, Self, TypeVar

from orchestra.answers import Extractor, extract_answer
from orchestra.budget import Budget
from orchestra.errors import UsageError
from orchestra.outcome import Outcome
from orchestra.run import Event, Run
from orchestra.runtime.connect import open_engine
from orchestra.runtime.engine import Engine, Prompt
from orchestra.spec import parse_budget, parse_strategy
from orchestra.strategies.base import Spec, execute
from orchestra.thread import Thread

T = TypeVar("T")

DEFAULT_ENGINE = "demo"


class Connection:
    """An open engine. Use it as an async context manager, from any number of tasks at once."""

    def __init__(self, url: str | Engine, engines: Mapping[str, str | Engine] | None = None) -> None:
        self._urls = {"": url, **(engines or {})}
        self._open: dict[str, Engine] = {}

    async def __aenter__(self) -> Self:
        try:
            for alias, url in self._urls.items():
                self._open[alias] = url if isinstance(url, Engine) else open_engine(url)
                await self._open[alias].open()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the engines that this connection opened; idempotent."""
        while self._open:
            alias, engine = self._open.popitem()
            if engine is not self._urls[alias]:
                await engine.close()

    @property
    def engine(self) -> Engine:
        """The engine itself.

        Raises:
            UsageError: the connection is not open.
        """
        if "" not in self._open:
            raise UsageError("the connection is not open: use 'async with orchestra.connect(...) as engine:'")
        return self._open[""]

    async def run(self, strategy: Spec, prompt: Prompt, **settings: Any) -> Outcome:
        """Run a strategy on a prompt.

        Args:
            strategy: an instance, a spec string or its JSON form.
            prompt: text, or chat messages.
            settings: `seed` (default 0: the same run gives the same result), `budget` (a `Budget` or its spec),
                `extract` (a function from text to answer), and sampling settings for all that the strategy generates
                and does not set itself (the fields of `Sampling`: `temperature`, `top_p`, `max_tokens`, penalties,
                `logit_bias` as a dict, `json_schema` as a dict, pydantic model or text, ...); `template` for the
                chat template's own arguments; `item` (as `TASK/ID`, or `ID`) and `repeat` (default 0) for a
                `replay:` engine: whose recorded samples, and which of them where the strategy does not fork.

        Raises:
            UsageError: a bad strategy, prompt or setting, or an engine that cannot do what the strategy needs.
            EngineError: the engine failed.
        """
        return await self._run(None, strategy, prompt, **settings)

    async def stream(self, strategy: Spec, prompt: Prompt, **settings: Any) -> AsyncIterator[Event]:
        """Like `run`, as events while it happens; the last one holds the outcome. Leaving the loop cancels the run."""
        events: asyncio.Queue[Event | None] = asyncio.Queue()
        task = asyncio.create_task(self._run(events.put_nowait, strategy, prompt, **settings))
        task.add_done_callback(lambda _: events.put_nowait(None))
        try:
            while (event := await events.get()) is not None:
                yield event
            yield Event("outcome", outcome=await task)
        finally:
            task.cancel()
            await asyncio.wait([task])

    async def _run(
        self,
        listener: Callable[[Event], None] | None,
        strategy: Spec,
        prompt: Prompt,
        *,
        seed: int = 0,
        budget: Budget | str | None = None,
        extract: Extractor = extract_answer,
        template: Mapping[str, Any] | None = None,
        item: str = "",
        repeat: int = 0,
        **sampling: Any,
    ) -> Outcome:
        chosen = parse_strategy(strategy if not isinstance(strategy, Mapping) else dict(strategy))
        limits = parse_budget(budget) if isinstance(budget, str) else budget
        engine = self.engine
        aliases = {alias: other for alias, other in self._open.items() if alias}
        async with Run(engine, seed, aliases, extract, listener, item=item, repeat=repeat, prompt=prompt) as run:
            root = Thread.root(run, prompt, template=template).using(**sampling)
            return await execute(chosen, root, limits)


def connect(url: str | Engine = DEFAULT_ENGINE, engines: Mapping[str, str | Engine] | None = None) -> Connection:
    """A connection to an engine, to be opened with `async with`.

    Args:
        url: see `orchestra engines`; or an engine of your own, which the connection leaves open.
        engines: further engines by alias, for strategies with judges, scorers or distillers elsewhere.
    """
    return Connection(url, engines)


def run(strategy: Spec, prompt: Prompt, *, engine: str | Engine = DEFAULT_ENGINE, **settings: Any) -> Outcome:
    """Run a strategy without an event loop of your own; works inside a running loop too (a notebook).

    Takes what `Connection.run` takes. The engine is opened for this one run: in a loop over prompts, `connect` once.
    """

    async def main() -> Outcome:
        async with connect(engine) as connection:
            return await connection.run(strategy, prompt, **settings)

    return _blocking(main())


def _blocking(work: Coroutine[Any, Any, T]) -> T:
    """Run `work` to its end on a loop of its own: in this thread if it has none, else in another."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    box: list[T] = []
    failure: list[BaseException] = []

    def target() -> None:
        try:
            box.append(asyncio.run(work))
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=target, name="orchestra-run")
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return box[0]
