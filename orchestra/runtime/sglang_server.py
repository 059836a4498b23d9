"""A real SGLang server as a child process: started, watched until it is ready, and ended with its whole family."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path

from orchestra.errors import EngineError, MissingExtraError, UsageError, one_of

FLAGS: Mapping[str, str] = {
    "tp": "--tensor-parallel-size",
    "dp": "--data-parallel-size",
    "pp": "--pipeline-parallel-size",
    "ep": "--expert-parallel-size",
    **{
        name: "--" + name.replace("_", "-")
        for name in (
            "attention_backend",
            "base_gpu_id",
            "chat_template",
            "chunked_prefill_size",
            "context_length",
            "device",
            "dtype",
            "kv_cache_dtype",
            "log_level",
            "max_running_requests",
            "max_total_tokens",
            "mem_fraction_static",
            "quantization",
            "random_seed",
            "reasoning_parser",
            "revision",
            "sampling_backend",
            "served_model_name",
            "tokenizer_path",
        )
    },
}
"""URL parameters that are passed on as flags of the server."""

# What runs without a GPU and without SGLang's compiled kernels.
_ON_CPU = {"attention_backend": "torch_native", "sampling_backend": "pytorch", "mem_fraction_static": "0.1"}
_CPU_SWITCHES = ("--disable-overlap-schedule", "--disable-cuda-graph", "--sleep-on-idle")  # or it spins on a core
_GPU_DEVICES = ("/dev/nvidiactl", "/dev/kfd")
_START_SECONDS, _STOP_SECONDS = 900.0, 10.0
_LOG_LINES = 12
_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG


class SGLangServer:
    """One server process on this machine.

    Args:
        model: a folder or a Hugging Face id.
        port: to listen on; 0 finds a free one.
        flags: see `FLAGS`.
        log: where its output goes; default: a temporary file.
        outlive: whether it goes on when this process ends.

    Attributes:
        port, log: as above.
    """

    def __init__(
        self,
        model: str,
        *,
        port: int = 0,
        flags: Mapping[str, str] | None = None,
        log: Path | None = None,
        outlive: bool = False,
    ) -> None:
        if find_spec("sglang") is None:
            raise MissingExtraError("starting an SGLang server", "sglang")
        for name in flags or {}:
            if name not in FLAGS:
                raise UsageError(one_of("SGLang setting", name, FLAGS))
        self.model, self.port = model, port or free_port()
        self._flags, self._outlive = dict(flags or {}), outlive
        self.log = log or Path(tempfile.gettempdir()) / f"sglang-{self.port}-{os.getpid()}.log"
        self.process: subprocess.Popen[bytes] | None = None

    def command(self) -> list[str]:
        """The command line."""
        flags = dict(self._flags)
        on_cpu = flags.setdefault("device", "cuda" if any(map(os.path.exists, _GPU_DEVICES)) else "cpu") == "cpu"
        if on_cpu:
            flags = _ON_CPU | flags
        parts = [sys.executable, "-m", "sglang.launch_server", "--model-path", self.model]
        parts += ["--host", "127.0.0.1", "--port", str(self.port), "--incremental-streaming-output"]
        for name, value in ({"log_level": "warning"} | flags).items():
            parts += [FLAGS[name], value]
        return parts + (list(_CPU_SWITCHES) if on_cpu else [])

    def start(self) -> None:
        """Start the process; `ready` says when it serves."""
        environment = dict(os.environ)
        command = self.command()
        if "cpu" in command:
            environment |= {"SGLANG_USE_CPU_ENGINE": "1"}
            environment.setdefault("OMP_NUM_THREADS", "1")
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # its family ends as one, and a Ctrl-C is for us to pass on
                preexec_fn=None if self._outlive or sys.platform != "linux" else _die_with_parent(),
            )

    async def ready(self, seconds: float = _START_SECONDS) -> None:
        """Wait until it serves.

        Raises:
            EngineError: it ended, or takes longer than `seconds`; with the end of its log.
        """
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self.process is None or self.process.poll() is not None:
                code = None if self.process is None else self.process.returncode
                raise EngineError(f"the SGLang server for {self.model} ended with code {code}: {self.last_words()}")
            if await _healthy(self.port):
                return
            await asyncio.sleep(0.25)
        raise EngineError(
            f"the SGLang server for {self.model} was not ready after {seconds:g} seconds: {self.last_words()}"
        )

    def last_words(self) -> str:
        """What its log says about the end, in one line, and where the rest is."""
        with contextlib.suppress(OSError):
            lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
            errors = [line for line in lines if "Error" in line and not line.startswith("File")]
            said = errors[-1:] or lines[-_LOG_LINES:]
            return f"{' | '.join(said)[:600] or 'it said nothing'} (log: {self.log})"
        return f"its log {self.log} cannot be read"

    def stop(self) -> None:
        """End it and all its processes: asked first, then killed; idempotent."""
        process, self.process = self.process, None
        if process is not None:
            end_family(process.pid, lambda: process.poll() is None)
            process.wait()


def end_family(leader: int, alive: Callable[[], bool], seconds: float = _STOP_SECONDS) -> None:
    """End the process group of `leader`: asked first, killed after `seconds`."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, signal.SIGTERM)
        deadline = time.monotonic() + seconds
        while alive() and time.monotonic() < deadline:
            time.sleep(0.05)
        os.killpg(leader, signal.SIGKILL)  # the rest of the family, and the leader if it does not listen


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


async def _healthy(port: int) -> bool:
    """Whether `GET /health` is answered with 200; raw, so that waiting needs no connection pool."""
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return False
    try:
        writer.write(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
        async with asyncio.timeout(5):
            return b" 200 " in await reader.readline()
    except (OSError, TimeoutError):
        return False
    finally:
        writer.close()


def _die_with_parent() -> Callable[[], None]:
    """Linux: have the child ended when we die without a chance to end it. The library is loaded before the fork."""
    libc = ctypes.CDLL(None)

    def before_exec() -> None:
        libc.prctl(_DEATH_SIGNAL, signal.SIGTERM)

    return before_exec
