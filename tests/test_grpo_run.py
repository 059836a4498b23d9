"""`orchestra train grpo` from end to end: it resumes as if nothing had been, and an engine's failures cost no step."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("trl")

from orchestra.errors import EngineDown, EngineError, UsageError  # noqa: E402
from orchestra.evaluation.tasks import Item  # noqa: E402
from orchestra.runtime.connect import EMBEDDED  # noqa: E402
from orchestra.runtime.engine import Delta, Request, Stream  # noqa: E402
from orchestra.runtime.local.engine import LocalEngine  # noqa: E402
from orchestra.spec import parse_strategy  # noqa: E402
from orchestra.training.config import read_config  # noqa: E402
from orchestra.training.grpo_config import GRPORun  # noqa: E402
from orchestra.training.grpo_data import prompt_at  # noqa: E402
from orchestra.training.grpo_run import newest_checkpoint, train_grpo  # noqa: E402
from orchestra.training.rollouts import Play, Player, Rollout  # noqa: E402

SMOKE = Path(__file__).parents[1] / "configs" / "countdown-apr-grpo-smoke.yaml"


def config(output: Path, *overrides: str) -> GRPORun:
    small = [
        "levels={hard: 1.0}",
        # Alone in its batch a generation rounds as it always does: what may differ is then the trainer's doing.
        f"engine=local:{EMBEDDED}?max_batch=1",
        "items=3",
        "group=4",
        "prompts=2",
        "rows=4",
        "steps=4",
        "save_every=2",
        "max_tokens=60",
    ]
    return read_config(
        GRPORun, SMOKE, [f"model={EMBEDDED}", f"output={output}", *small, "learning_rate=1e-3", *overrides]
    )


def weights(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    found: dict[str, Any] = load_file(folder / "model.safetensors")
    return found


def apart(one: Path, other: Path) -> float:
    """The largest difference of two models' weights."""
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing interrupted."""
    output = tmp_path_factory.mktemp("whole")
    train_grpo(config(output))
    return output


def test_a_run_learns_something_and_says_what_rollouts_were_like(whole):
    assert apart(whole / "final", EMBEDDED) > 1e-4
    steps = [line for line in log(whole) if "rollout/reward" in line]
    assert len(steps) == 4
    said = {
        "rollout/accuracy", "rollout/children", "rollout/spawned", "rollout/malformed", "rollout/critical_path",
        "rollout/sampled_tokens", "reward/correctness", "ratio/sampler_apart", "ratio/clipped", "policy/entropy",
        "seconds/rollouts", "seconds/sync", "loss", "grad_norm",
    }  # fmt: skip
    assert said <= {name for line in steps for name in line}
    assert all("seconds/train" in line for line in steps[1:])
    # Only of an engine that has the weights of the trainer.
    assert max(line.get("ratio/sampler_apart", 0.0) for line in steps) < 1e-4


def test_a_resumed_run_equals_one_that_was_not_interrupted(whole, tmp_path):
    output = tmp_path / "again"
    shutil.copytree(whole, output)
    shutil.rmtree(output / "final")
    shutil.rmtree(output / "checkpoint-4")
    (output / "checkpoint-3").mkdir()  # what a crash in the middle of saving leaves
    (output / "checkpoint-3" / "model.safetensors").write_bytes(b"half")
    assert newest_checkpoint(output) == output / "checkpoint-2"
    train_grpo(config(output), resume=True)
    assert apart(output / "final", whole / "final") <= 1e-6


def test_a_resumed_run_asks_the_same_prompts_however_often_it_has_asked_them_all():
    items = [Item(str(i), "p", {}) for i in range(5)]
    asked = [prompt_at(items, place, seed=1).id for place in range(15)]
    assert [sorted(asked[i : i + 5]) for i in (0, 5, 10)] == [["0", "1", "2", "3", "4"]] * 3
    assert len({tuple(asked[i : i + 5]) for i in (0, 5, 10)}) == 3
    assert asked[7:9] == [prompt_at(items, place, seed=1).id for place in (7, 8)]


def test_there_is_nothing_to_resume_where_no_checkpoint_is_whole(tmp_path):
    (tmp_path / "checkpoint-3").mkdir()
    with pytest.raises(UsageError, match="nothing to resume"):
        train_grpo(config(tmp_path), resume=True)


def test_minibatches_and_epochs_make_more_steps_of_a_generation(tmp_path):
    run = config(tmp_path, "minibatches=2", "epochs=2", "save_every=1", "kl=0.01", "rewards=[correctness, concurrency]")
    train_grpo(run)
    lines = [line for line in log(tmp_path) if "loss" in line]
    assert [("rollout/reward" in line) for line in lines] == [True, False, False, False]
    assert any(line.get("ratio/max", 1.0) != 1.0 for line in lines)
    assert {"kl", "reward/concurrency"} <= {name for line in lines for name in line}
    assert [folder.name for folder in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]


def test_adapters_are_trained_and_played(tmp_path):
    pytest.importorskip("peft")
    run = config(tmp_path, "steps=2", "lora={r: 4, target_modules: [q_proj, v_proj]}", "kl=0.01")
    final = train_grpo(run)
    assert (final / "adapter_model.safetensors").is_file()
    assert max(line.get("ratio/sampler_apart", 0.0) for line in log(tmp_path)) < 1e-4

    async def says() -> str:
        import orchestra

        async with orchestra.connect(f"local:{final}") as engine:
            return (await engine.run("spawn_join", " numbers: 3 7 8 12 target: 54")).text

    assert "children:" in asyncio.run(says())


# -- engines that fail -------------------------------------------------------------------------------------------------


class Flaky(LocalEngine):
    """Its generations number `fails` end with an error. Where that says that it is down, it forgets its weights."""

    def __init__(self, fails: dict[int, EngineError]) -> None:
        super().__init__(str(EMBEDDED), max_batch=1)
        self.fails, self.asked, self.lost = fails, 0, False
        self.first: Any = None

    async def update_weights(self, weights: Any) -> None:
        await super().update_weights(weights)
        if self.first is None:
            self.first = {name: value.clone() for name, value in weights.items()}
        self.lost = False

    async def weights_kept(self) -> bool:
        return not self.lost

    def generate(self, request: Request) -> Stream:
        self.asked += 1
        error = self.fails.pop(self.asked, None)
        if error is None:
            return super().generate(request)
        if isinstance(error, EngineDown):
            self.lost = True
        stream = Stream(lambda: None)
        stream.push(Delta())
        stream.fail(error)
        return stream


def played(player: Player) -> list[Rollout]:
    prompt = " numbers: 3 7 8 12 target: 54"
    return player.play(
        [Play(Item(str(i), prompt, {}), parse_strategy("spawn_join(child_tokens=30)"), i) for i in range(4)]
    )


def texts(rollouts: list[Rollout]) -> list[str]:
    return [each.outcome.text if each.outcome else each.error for each in rollouts]


@pytest.fixture(scope="module")
def sound() -> list[str]:
    player = Player(LocalEngine(str(EMBEDDED), max_batch=1), max_tokens=60)
    try:
        return texts(played(player))
    finally:
        player.close()


def test_rollouts_that_failed_are_played_again_and_are_the_same(sound):
    player = Player(Flaky({2: EngineError("once"), 7: EngineError("and again")}), max_tokens=60)
    assert texts(played(player)) == sound
    player.close()


def test_an_engine_that_was_down_gets_its_weights_again_before_anything_is_played(sound):
    engine = Flaky({6: EngineDown("gone")})
    from orchestra.runtime.local.model import load_plain
    from orchestra.training.policy_weights import plain_weights

    player = Player(engine, max_tokens=60)
    player.update(plain_weights(load_plain(str(EMBEDDED))))
    assert texts(played(player)) == sound
    assert not engine.lost
    player.close()


def test_a_rollout_that_always_fails_is_reported_and_the_others_are_played(sound):
    class Picky(Flaky):
        def generate(self, request: Request) -> Stream:
            if request.seed == 2:
                self.fails[self.asked + 1] = EngineError("not this one")
            return super().generate(request)

    player = Player(Picky({}), max_tokens=60)
    assert texts(played(player)) == [*sound[:2], "not this one", sound[3]]
    player.close()


def test_what_cannot_be_played_at_all_is_an_error(tiny):
    player = Player(f"local:{tiny}", max_tokens=4)
    with pytest.raises(UsageError, match="no rollout could be played"):
        player.play([Play(Item("1", "", {}), parse_strategy("sample"), 0)])
    player.close()


def test_an_engine_that_stays_away_is_an_error_and_not_a_hang():
    player = Player("sglang://127.0.0.1:9?patience=0.1", patience=1.0)
    with pytest.raises(EngineDown, match="did not come back in 1 s"):
        player.update({"a": torch.zeros(1)})
    player.close()


def test_an_engine_that_fails_costs_no_optimiser_step(whole, tmp_path):
    errors: dict[int, EngineError] = {5: EngineError("a step failed"), 40: EngineDown("gone"), 90: EngineError("again")}
    train_grpo(config(tmp_path, "patience=60"), engine=Flaky(errors))
    assert not errors
    assert [line["step"] for line in log(tmp_path) if "loss" in line] == [1, 2, 3, 4]
    assert all(line["rollout/failed"] == 0 for line in log(tmp_path) if "loss" in line)
    assert apart(tmp_path / "final", whole / "final") <= 1e-6


# -- the command -------------------------------------------------------------------------------------------------------


def command(output: Path, *overrides: str) -> list[str]:
    words = [f"model={EMBEDDED}", f"output={output}", *overrides]
    return [sys.executable, "-m", "orchestra", "train", "grpo", str(SMOKE), *words]


def test_ctrl_c_ends_a_run_in_one_line_and_leaves_nothing_half(tmp_path):
    process = subprocess.Popen(
        command(tmp_path, "steps=1000", "save_every=1", "max_tokens=40"),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not newest_checkpoint(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.2)
    os.kill(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Traceback" not in error
    assert not (tmp_path / "final").exists()
    assert newest_checkpoint(tmp_path) is not None


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["rewards=[speed]"], "unknown reward 'speed'"),
        (["strategies=[spwan_join]"], "did you mean 'spawn_join'"),
        (["engine=demo:x"], "demo"),
        (["task=chess"], "train split"),
        (["levels={easy: 1.0}"], "easy"),
        (["temperature=0"], "temperature is above 0"),
        (["minibatches=3"], "cannot be split into 3"),
        (["items=1"], "asks 2 prompts"),
        (["group=0"], "group is a number of at least 1"),
        (["model="], "model= says which model"),
    ],
)
def test_what_is_wrong_in_a_configuration_is_one_line(tmp_path, overrides, said):
    with pytest.raises(UsageError, match=said):
        train_grpo(config(tmp_path, *overrides))


def test_how_many_rollouts_a_forward_has_changes_no_gradient(tmp_path):
    """TRL switches off Trainer's division by the forwards of a step; nothing may take its place."""
    norms = []
    for rows in (8, 2):
        output = tmp_path / str(rows)
        train_grpo(config(output, "rewards=[concurrency]", f"rows={rows}", "steps=1", "max_tokens=40"))
        norms.append(log(output)[0]["grad_norm"])
    assert norms[0] > 1e-4
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


@pytest.mark.slow
def test_two_processes_learn_what_one_does(tmp_path):
    changes = ["levels={hard: 1.0}", "max_tokens=60", "rewards=[concurrency]"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m"]
    subprocess.run([*launch, *command(tmp_path / "two", *changes)[2:]], check=True, timeout=280)
    subprocess.run(command(tmp_path / "one", *changes), check=True, timeout=280)
    assert apart(tmp_path / "one" / "final", EMBEDDED) > 1e-4
    # Where a gradient is next to nothing, its rounding decides which way Adam steps: by a share of 1e-4.
    assert apart(tmp_path / "one" / "final", tmp_path / "two" / "final") <= 2e-5


def longer(outcome: Any, *, item: Item, scale: float = 1.0, **_: Any) -> float:
    """A reward of a user's own."""
    assert item.reference["answer"] == "4"
    return scale * len(set(outcome.text))


def test_own_prompts_own_rewards_and_a_mix_of_long_traces_and_pdr_rounds(tiny, tmp_path):
    file = tmp_path / "problems.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"2 + 2, {i}", "answer": "4"}) + "\n" for i in range(4)))
    run = GRPORun(
        model=tiny,
        output=str(tmp_path / "out"),
        task=str(file),
        strategies=[{"strategy": "sample", "share": 1}, {"strategy": "pdr(widths=[2])", "share": 1}],
        rewards=[{"reward": "correctness", "wrong": -1}, {"reward": f"{__name__}:longer", "weight": 0.1, "scale": 2}],
        group=2, prompts=2, rows=2, steps=2, max_tokens=12, learning_rate=1e-3, save_every=2, mean="tokens",
    )  # fmt: skip
    train_grpo(run)
    [first, second, _] = log(tmp_path / "out")
    for line in (first, second):
        # One of two prompts is a round of two drafts and a refinement, all of which are model calls that learn.
        assert line["rollout/calls"] == 2.0
        assert line["rollout/children"] > 0
        parts = line["reward/correctness"] + 0.1 * line["reward/longer"]
        assert line["rollout/reward"] == pytest.approx(parts, abs=1e-5)
    assert apart(tmp_path / "out" / "final", Path(tiny)) > 1e-4
