"""An SGLang engine that brings its own server."""

from __future__ import annotations

import asyncio
from typing import Any

from orchestra.runtime.http import Server
from orchestra.runtime.sglang import SGLangEngine
from orchestra.runtime.sglang_server import SGLangServer


class OwnedSGLangEngine(SGLangEngine):
    """Starts a server on this machine when it is opened, and ends it when it is closed.

    Args:
        process: the server, not started.
        server: the way to it.
        options: see `SGLangEngine`.
    """

    def __init__(self, name: str, process: SGLangServer, server: Server, **options: Any) -> None:
        super().__init__(name, server, **options)
        self._process = process

    async def _meet(self) -> None:
        try:
            self._process.start()
            await self._process.ready()
            await super()._meet()
        except BaseException:
            await asyncio.to_thread(self._process.stop)
            raise

    async def close(self) -> None:
        """See `Engine.close`; the server ends too."""
        await super().close()
        await asyncio.to_thread(self._process.stop)
