"""A model that asks for parallel paths, and gets them: what all languages of parallel blocks have in common."""

from __future__ import annotations

from dataclasses import dataclass

from orchestra.group import gather
from orchestra.protocols.base import Branch, Fork
from orchestra.protocols.block_reader import BlockReader
from orchestra.protocols.blocks import Blocks
from orchestra.strategies.one_thread import turn
from orchestra.thread import Join, Thread


@dataclass(frozen=True)
class ForkJoin:
    """How the blocks of a text are run.

    Whatever a model writes, its text goes on: a plan without outlines, a tag where none belongs and a block nested too
    deep are plain text, and nothing is forked. A path that ends without its end tag is given one.

    Attributes:
        language: what the model speaks.
        join: how paths come back; see `Thread.join`.
        paths: most paths of a block; of more outlines the first ones are run. Where the language leaves the number to
            the runtime it is this one.
        path_tokens: most tokens that one generation of a path may sample.
        stops: how often a thread is stopped at a tag; then it is written to its end.
        total: most paths in all. A thread shares half of what is left to it among the paths of a block, so that a
            model that asks for ever, in every path, ends; and that this does not depend on the schedule.
    """

    language: Blocks
    join: Join
    paths: int
    path_tokens: int | None
    stops: int
    total: int = 1024

    async def run(self, thread: Thread, opening: str | None = None) -> Thread:
        """The text of a thread, from where it stands.

        Args:
            thread: stands after the prompt.
            opening: forced there; None: what the model's folder says.
        """
        thread = thread.using(skip_special_tokens=False)  # the tags of published checkpoints are special
        reader = self.language.reader()
        opening = await thread.opening(self.language.name) if opening is None else opening
        thread = thread.append(opening)
        reader.feed(opening)
        if not self.language.trigger:  # nobody asks: the paths begin at once
            thread, _ = await self._fork(thread, reader, Fork(), 0, self.total)
        return await self._follow(thread, reader, 0, self.total)

    async def _follow(self, thread: Thread, reader: BlockReader, depth: int, left: int, path_end: str = "") -> Thread:
        """Turns of a thread and the blocks between them, to the end of the text, or of the path that it is in."""
        trigger = self.language.trigger if depth < self.language.nested else ""
        for stopped in range(self.stops + 1):
            asks = trigger if left and stopped < self.stops else ""
            stop = [tag for tag in (asks, path_end) if tag]
            limit = self.path_tokens if depth else None
            generate = Thread.generate if depth else turn  # paths by themselves are no result
            thread = await generate(thread, stop=stop, max_tokens=limit)
            fork = reader.feed(thread.generated)
            if thread.matched is None or reader.ended:
                break
            if fork is not None and asks:
                thread, left = await self._fork(thread, reader, fork, depth, left)
        return thread

    async def _fork(self, thread: Thread, reader: BlockReader, fork: Fork, depth: int, left: int) -> tuple[Thread, int]:
        """Run the paths side by side, and write them down where they were asked for."""
        language, most = self.language, min(self.paths, left)
        branches = list(fork.branches[:most]) or [Branch(str(i + 1)) for i in range(most)]
        left -= len(branches)
        share = left // 2 // len(branches)
        base = thread.append(language.lead)
        starts = base.fork([language.path_header(branch.label) for branch in branches])
        paths = await gather([self._path(*path, depth + 1, share) for path in zip(starts, branches, strict=True)])
        reader.joined(branches)
        return base.join(paths, language.join, how=self.join), left - share * len(branches)

    async def _path(self, path: Thread, branch: Branch, depth: int, left: int) -> Thread:
        reader = self.language.reader(branch)
        path = await self._follow(path, reader, depth, left, self.language.path_end(branch.label))
        return path.append(("" if reader.ended else reader.closing(branch)) + self.language.after)
