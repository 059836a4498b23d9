"""A model that asks for parallel paths, and gets them: what all languages of parallel blocks have in common."""

from __future__ import annotations

from dataclasses import dataclass

from orchestra.group import gather
from orchestra.protocols.base import Branch, Fork
from orchestra.protocols.block_reader import BlockReader
from orchestra.protocols.blocks import Blocks
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
    """

    language: Blocks
    join: Join
    paths: int
    path_tokens: int | None
    stops: int

    async def run(self, thread: Thread) -> Thread:
        """The text of a thread, from where it stands."""
        reader = self.language.reader()
        if not self.language.trigger:  # nobody asks: the paths begin at once
            thread = await self._fork(thread, reader, Fork(), depth=0)
        return await self._follow(thread, reader, depth=0)

    async def _follow(self, thread: Thread, reader: BlockReader, depth: int, path_end: str = "") -> Thread:
        """Turns of a thread and the blocks between them, to the end of the text, or of the path that it is in."""
        trigger = self.language.trigger if depth < self.language.nested else ""
        for left in reversed(range(self.stops + 1)):
            stop = [tag for tag in (trigger if left else "", path_end) if tag]
            thread = await thread.generate(stop=stop, max_tokens=self.path_tokens if path_end else None)
            if not depth:
                thread.offer(thread.candidate())
            fork = reader.feed(thread.generated)
            if thread.matched is None or reader.ended:
                break
            if fork is not None and left:
                thread = await self._fork(thread, reader, fork, depth)
        return thread

    async def _fork(self, thread: Thread, reader: BlockReader, fork: Fork, depth: int) -> Thread:
        """Run the paths side by side, and write them down where they were asked for."""
        language = self.language
        branches = list(fork.branches[: self.paths]) or [Branch(str(i + 1)) for i in range(self.paths)]
        base = thread.append(language.lead)
        starts = base.fork([language.path_header(branch.label) for branch in branches])
        paths = await gather([self._path(*path, depth + 1) for path in zip(starts, branches, strict=True)])
        reader.joined(branches)
        return base.join(paths, language.join, how=self.join)

    async def _path(self, path: Thread, branch: Branch, depth: int) -> Thread:
        reader = self.language.reader(branch)
        path = await self._follow(path, reader, depth, self.language.path_end(branch.label))
        return path.append(("" if reader.ended else reader.closing(branch)) + self.language.after)
