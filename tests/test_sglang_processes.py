"""Real processes and real signals: Ctrl-C reaches the server, owned servers end with whoever started them."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
from test_sglang import PROMPT, idle, running

from orchestra.errors import EngineError
from orchestra.runtime.connect import open_engine

ORCHESTRA = [sys.executable, "-m", "orchestra"]


def until(condition, seconds: float = 60.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.1)
    return False


def test_ctrl_c_ends_the_requests_on_the_server(sglang_server) -> None:
    url = f"sglang://127.0.0.1:{sglang_server.port}"
    command = [*ORCHESTRA, "run", PROMPT, "-e", url, "-s", "self_consistency(samples=64)", "--temperature", "1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    assert until(lambda: sum(running(sglang_server)) > 32)  # more than an earlier test may have left in its report
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=30)
    assert process.returncode == 130
    assert b"Traceback" not in error
    assert asyncio.run(idle(sglang_server))


def test_a_killed_client_leaves_no_request_on_the_server(sglang_server) -> None:
    """It could not say anything: its connections are closed, and that says it."""
    url = f"sglang://127.0.0.1:{sglang_server.port}?n=off"
    command = [*ORCHESTRA, "run", PROMPT, "-e", url, "-s", "first_finish(samples=64)", "--temperature", "1"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert until(lambda: sum(running(sglang_server)) > 32)  # more than an earlier test may have left in its report
    process.kill()
    process.wait()
    assert until(lambda: running(sglang_server) == (0, 0))


def test_a_server_that_does_not_start_is_one_line_with_its_log(tmp_path: Path) -> None:
    if find_spec("sglang") is None:
        pytest.skip("SGLang is not installed here: make .venv/.sglang")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")

    async def main() -> str:
        with pytest.raises(EngineError) as caught:
            await open_engine(f"sglang:{tmp_path / 'model'}").open()
        return str(caught.value)

    said = asyncio.run(main())
    assert "\n" not in said
    assert "ended with code" in said
    log = Path(said.rpartition("log: ")[2].rstrip(")"))
    assert "Traceback" in log.read_text()
    log.unlink()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_an_owned_server_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    if find_spec("sglang") is None:
        pytest.skip("SGLang is not installed here: make .venv/.sglang")
    program = tmp_path / "own.py"
    program.write_text(
        "import asyncio, orchestra\n"
        "async def main():\n"
        "    async with orchestra.connect('sglang:demo?max_total_tokens=8192') as connection:\n"
        f"        print((await connection.run('sample', {PROMPT!r}, max_tokens=5)).usage.sampled_tokens, flush=True)\n"
        "        print(connection.engine._process.process.pid, flush=True)\n"
        "        await asyncio.sleep(600)\n"
        "asyncio.run(main())\n"
    )
    for how in (signal.SIGINT, signal.SIGKILL):
        process = subprocess.Popen([sys.executable, str(program)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        assert process.stdout is not None
        assert process.stdout.readline() == b"5\n"
        leader = int(process.stdout.readline())
        process.send_signal(how)
        process.wait(60)
        assert until(lambda leader=leader: not family(leader)), f"after {how.name} the server goes on"


def family(leader: int) -> list[int]:
    """Processes of a group that are still there, zombies left out."""
    found = []
    for path in Path("/proc").iterdir():
        try:
            state, _, group = (path / "stat").read_text().rpartition(")")[2].split()[:3]
        except (OSError, ValueError):
            continue
        if path.name.isdigit() and int(group) == leader and state != "Z":
            found.append(int(path.name))
    return found


def test_families_are_seen() -> None:
    assert os.getpid() in family(os.getpgrp())
