"""New weights for a running SGLang server."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from orchestra.errors import EngineError
from orchestra.extras import require
from orchestra.runtime.http import Refused, Server


class ServerWeights:
    """The weights that a server was given. Their digest is the server's weight version."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._given = ""

    async def give(self, weights: Mapping[str, Any], name: str) -> None:
        """Have the server `name` load them.

        Where it has that version already (of several processes that share a server, one is first), nothing is sent.

        Raises:
            EngineError: the server refuses them, or is gone.
        """
        require("torch", "safetensors", what="giving a server new weights", extra="local")
        from orchestra.runtime.weight_files import digest, write

        version = await asyncio.to_thread(digest, weights)
        if version != await self._server.insist(self._version):
            with tempfile.TemporaryDirectory(prefix="orchestra-weights-") as folder:
                await asyncio.to_thread(write, weights, Path(folder))
                body = {"model_path": folder, "weight_version": version, "flush_cache": True}
                try:
                    await self._server.insist(partial(self._server.ask, "POST", "/update_weights_from_disk", body))
                except Refused as refusal:
                    raise EngineError(f"{name} refuses the weights: {refusal}") from refusal
        self._given = version

    async def kept(self) -> bool:
        """Whether the server still has them: one that began anew has not."""
        return not self._given or await self._server.insist(self._version) == self._given

    async def _version(self) -> str:
        return str((await self._server.ask("GET", "/model_info")).get("weight_version"))
