"""The README's Python runs as written, and its command lines are real."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from orchestra.cli import app

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("code", [code for language, code in BLOCKS if language == "python"])
def test_python_runs_as_written(code: str, tmp_path: Path) -> None:
    script = tmp_path / "readme.py"
    script.write_text(code, encoding="utf-8")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 4  # one answer, then three strategies


@pytest.mark.parametrize("line", re.findall(r"^orchestra (.*?)(?:\s+#.*)?$", README, re.MULTILINE))
def test_command_lines_parse(line: str) -> None:
    command = line.split()[0]
    options = set(re.findall(r"--[a-z-]+", line))
    shown = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200", "TERM": "dumb"})
    assert shown.exit_code == 0, shown.output
    assert all(option in shown.output for option in options), f"{options} of {line!r}"
