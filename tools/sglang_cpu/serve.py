"""A real SGLang server on the CPU with the embedded model, in the background: what `make sglang-cpu` starts.

    python tools/sglang_cpu/serve.py start [--port 30000] [--model PATH]
    python tools/sglang_cpu/serve.py stop

It stays when this program has ended; `stop` (or `make sglang-cpu-stop`) ends it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import sys
import time
from pathlib import Path

import orchestra
from orchestra.errors import OrchestraError
from orchestra.runtime.sglang_server import SGLangServer, end_family

STATE = Path("runs/sglang-cpu.json")
LOG = Path("runs/sglang-cpu.log")
EMBEDDED = Path(orchestra.__file__).parent / "assets" / "embedded"


def start(port: int, model: str) -> None:
    """Start it and wait until it serves; when it runs already, say so."""
    if (running := _running()) is not None:
        print(f"an SGLang server is running already: sglang://127.0.0.1:{running['port']}")
        return
    STATE.parent.mkdir(exist_ok=True)
    LOG.unlink(missing_ok=True)
    flags = {"device": "cpu", "dtype": "float32", "max_total_tokens": "262144"}
    server = SGLangServer(model, port=port, flags=flags, log=LOG, outlive=True)
    print(f"starting an SGLang server (half a minute; log: {LOG})")
    server.start()
    try:
        asyncio.run(server.ready())
    except BaseException:
        server.stop()
        raise
    assert server.process is not None  # started
    STATE.write_text(json.dumps({"pid": server.process.pid, "port": server.port}))
    print(f"ready: orchestra run 'numbers: 3 7 8 12 target: 55' --engine sglang://127.0.0.1:{server.port}")


def stop() -> None:
    """End it; nothing happens when none runs."""
    if (running := _running()) is None:
        print("no SGLang server of ours is running")
    else:
        end_family(running["pid"], lambda: _alive(running["pid"]))
        print("stopped")
    STATE.unlink(missing_ok=True)


def _running() -> dict[str, int] | None:
    with contextlib.suppress(OSError, ValueError, KeyError):
        state: dict[str, int] = json.loads(STATE.read_text())
        if _alive(state["pid"]):
            return state
    return None


def _alive(pid: int) -> bool:
    """Whether it is a server of ours: process numbers are used again."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
    return b"sglang" in command


def main() -> int:
    """Parse the command line and do it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("start", "stop"))
    parser.add_argument("--port", type=int, default=30000)
    parser.add_argument("--model", default=str(EMBEDDED))
    arguments = parser.parse_args()
    began = time.monotonic()
    try:
        if arguments.what == "start":
            start(arguments.port, arguments.model)
            print(f"{time.monotonic() - began:.0f} s")
        else:
            stop()
    except OrchestraError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
