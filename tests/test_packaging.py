"""What a user installs: a light import, and a wheel that works away from the clone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ("torch", "transformers", "trl", "datasets", "numpy", "matplotlib", "networkx")


@pytest.mark.parametrize("module", ["orchestra", "orchestra.cli", "orchestra.evaluation.runner", "orchestra.testing"])
def test_import_is_light(module: str) -> None:
    code = f"import sys, {module}; print([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; from orchestra.cli import main; main(['--help']); main(['run', '--help']);"
        f"sys.exit(str([name for name in {HEAVY!r} if name in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == "[]"


def test_constraints_pin_every_requirement() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = project["dependencies"] + [each for name in ("local", "train", "dev") for each in extras[name]]
    names = {each.split(">")[0].split("[")[0].lower().replace("_", "-") for each in wanted} - {project["name"]}
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in pins if "==" in line}
    assert names <= pinned
    assert "torch==2.13.0" in pins
    assert not [line for line in pins if "@" in line or "://" in line or "+" in line]


@pytest.mark.slow
def test_wheel_works_outside_the_clone(tmp_path: Path) -> None:
    # A copy: building leaves folders in the source tree.
    source = tmp_path / "source"
    keep = ["pyproject.toml", "setup.py", "README.md", "LICENSE", "orchestra", "tasks"]
    source.mkdir()
    for name in keep:
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif path.exists():
            shutil.copy(path, source / name)
    wheels = tmp_path / "wheels"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "-q", "--no-deps", "-w", wheels, source], check=True)
    shutil.rmtree(source)
    (wheel,) = wheels.glob("*.whl")

    home = tmp_path / "venv"
    venv.create(home, symlinks=True, with_pip=False)
    (packages,) = home.glob("lib/python*/site-packages")
    subprocess.run([*pip, "install", "-q", "--no-deps", "--target", packages, wheel], check=True)
    # The dependencies are those of this environment; but `orchestra` must come from the wheel.
    (theirs,) = {Path(p) for p in sys.path if p.endswith("site-packages")} & set(Path(sys.prefix).glob("lib/*/*"))
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PYTHONPATH": f"{packages}:{theirs}"}

    def call(code: str) -> str:
        done = subprocess.run(
            [home / "bin" / "python", "-c", code],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = call("import orchestra; print(orchestra.__file__)").strip()
    assert Path(where).is_relative_to(packages)
    assert "countdown" in call("from orchestra.cli import main; main(['tasks'])")
    answer = "import orchestra; print(orchestra.run('spawn_join', 'numbers: 3 7 8 12 target: 54', max_tokens=40).text)"
    assert "children: free" in call(answer)
    metadata = call("import importlib.metadata as m; print(m.entry_points(name='orchestra')['orchestra'].value)")
    assert metadata.strip() == "orchestra.cli:main"
