"""Recycling a model with streams: who learns, from what, held against what; resumed, saved, refused."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("trl")

from parscale_checkpoints import write  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from orchestra.cli.train import app  # noqa: E402
from orchestra.errors import UsageError  # noqa: E402
from orchestra.evaluation.countdown import LEVELS, Level, split_of  # noqa: E402
from orchestra.parscale.model import ParScale  # noqa: E402
from orchestra.training import tokenizer as words  # noqa: E402
from orchestra.training.config import ParScaleConfig, read_config  # noqa: E402
from orchestra.training.flatten import Row  # noqa: E402
from orchestra.training.parscale import build_model, row_losses, train_parscale, validate  # noqa: E402
from orchestra.training.parscale_data import load_data, row  # noqa: E402

ROOT = Path(__file__).parents[1]
EMBEDDED = ROOT / "orchestra" / "assets" / "embedded"
SMOKE = ROOT / "configs" / "parscale-smoke.yaml"
CHAT = (
    "{% for m in messages %}{{ m.role }} : {{ m.content }} {% endfor %}{% if add_generation_prompt %}reply{% endif %}"
)


def smoke(*overrides: str) -> ParScaleConfig:
    return read_config(ParScaleConfig, SMOKE, [f"backbone={EMBEDDED}", *overrides])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("streams")
    train_parscale(smoke(f"output={output}", "prefix_tokens=16"))
    return output


def log(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def test_a_frozen_backbone_stays_and_the_streams_learn(run: Path) -> None:
    before, after = load_file(EMBEDDED / "model.safetensors"), load_file(run / "final" / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
    fresh = dict(build_model(smoke("prefix_tokens=16")).named_parameters())
    learned = after.keys() - before.keys()
    assert len(learned) == 4 * 2 + 4
    assert not any(torch.equal(fresh[name], after[name]) for name in learned)


def test_the_validation_loss_is_that_of_the_saved_model(run: Path) -> None:
    from transformers import AutoTokenizer

    curve = {line["step"]: line["validation_loss"] for line in log(run) if "validation_loss" in line}
    assert list(curve) == [0, 5, 10]
    final = ParScale.from_pretrained(run / "final").eval()
    total = weight = 0.0
    held_out = load_data(smoke(), AutoTokenizer.from_pretrained(run / "final")).held_out
    assert sum(map(len, held_out)) >= 16
    for made in (made for batch in held_out for made in batch):  # one row at a time, without padding
        logs = final(torch.tensor([made.tokens])).logits[0].log_softmax(-1).detach()
        for place in range(1, len(made.tokens)):
            total -= made.weights[place] * float(logs[place - 1, made.tokens[place]])
            weight += made.weights[place]
    assert curve[10] == pytest.approx(total / weight, abs=2e-5)
    assert validate(final, held_out).loss == pytest.approx(total / weight, rel=1e-4)


def test_a_resumed_run_ends_in_the_same_weights(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "checkpoint-5", tmp_path / "checkpoint-5")
    resumed = train_parscale(smoke(f"output={tmp_path}", "prefix_tokens=16"), resume=True)
    first, second = (load_file(folder / "model.safetensors") for folder in (run / "final", resumed))
    assert first.keys() == second.keys()
    assert all(torch.allclose(first[name], second[name], atol=1e-6) for name in first)
    assert 0 not in {line["step"] for line in log(tmp_path)}


def test_held_out_problems_are_of_the_dev_split_and_every_arm_sees_the_same_batches() -> None:
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(EMBEDDED)
    one, four = (load_data(smoke(f"streams={count}"), loaded) for count in (1, 4))
    assert one.held_out == four.held_out == load_data(smoke("seed=7"), loaded).held_out
    assert [one.training.batch(step) for step in range(4)] == [four.training.batch(step) for step in range(4)]
    assert load_data(smoke("seed=7"), loaded).training.batch(0) != one.training.batch(0)
    for batches, split in ((one.held_out, "dev"), ([one.training.batch(step) for step in range(5)], "train")):
        found = {problem_split(loaded.decode(made.tokens)) for batch in batches for made in batch}
        assert found - {None} == {split}


def problem_split(text: str) -> str | None:
    """The split of the problem of four numbers that a demonstration begins with; None where there are fewer."""
    numbers, _, rest = text.partition("numbers:")[2].partition("target:")
    found = [int(number) for number in numbers.split() if number.isdigit()]
    return split_of(found, int(rest.split()[0])) if len(found) == 4 else None


def test_the_whole_model_learns_a_text_from_jsonl(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    lines = [f" numbers: {i % 9 + 1} 3 target: {i % 9 + 4}" for i in range(40)]
    data.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    changes = ("train=all", "held_out=8", "steps=20", "batch_tokens=60", "learning_rate=2e-3", "validate_every=0")
    config = smoke(f"output={tmp_path / 'run'}", f"data={data}", *changes, "stream_learning_rate=4e-3")
    final = train_parscale(config)
    curve = [line["validation_loss"] for line in log(tmp_path / "run") if "validation_loss" in line]
    assert len(curve) == 2
    assert curve[1] < curve[0] - 1
    state = torch.load(tmp_path / "run" / "checkpoint-20" / "scheduler.pt", weights_only=True)
    assert sorted(set(state["base_lrs"])) == [2e-3, 4e-3]
    grown = ParScale.from_pretrained(final)
    assert not torch.equal(grown.lm_head.weight, ParScale.recycle(EMBEDDED, 1).lm_head.weight)


def test_one_stream_trains_the_plain_model(tmp_path: Path) -> None:
    final = train_parscale(smoke(f"output={tmp_path}", "streams=1", "train=all", "steps=2"))
    assert load_file(final / "model.safetensors").keys() == load_file(EMBEDDED / "model.safetensors").keys()
    config = json.loads((final / "config.json").read_text())
    assert (config["model_type"], config["parscale_n"]) == ("llama_parscale", 1)
    assert ParScale.from_pretrained(final).streams is None


def test_what_is_given_is_not_learned() -> None:
    loaded = words.build()
    loaded.chat_template = CHAT
    prompt, completion = " numbers: 3 7 target: 10", " 3 + 7 = 10"
    asked, told = words.encode(prompt), words.encode(completion)
    assert row({"text": prompt}, loaded, 99) == Row.sequence([words.BOS, *asked, words.EOS], [1.0] * (len(asked) + 2))
    both = row({"prompt": prompt, "completion": completion}, loaded, 99)
    assert both.tokens == [words.BOS, *asked, *told, words.EOS]
    assert both.weights == [0.0] * (len(asked) + 1) + [1.0] * (len(told) + 1)
    cut = row({"prompt": prompt, "completion": completion}, loaded, 3)
    assert (cut.tokens, cut.weights) == (both.tokens[:3], [0.0] * 3)
    turns = [{"role": "spawn:", "content": "3 7"}, {"role": "answer:", "content": "10"}]
    talk = row({"messages": turns}, loaded, 99)
    assert talk.weights == [0.0, *[1.0] * (len(talk) - 1)]
    half = row({"prompt": turns[:1], "completion": turns[1:]}, loaded, 99)
    assert half.tokens == talk.tokens
    assert [token for token, weight in zip(half.tokens, half.weights, strict=True) if weight] == words.encode(
        " answer: : 10"
    )


def test_another_number_of_streams_grows_on_the_backbone_of_a_checkpoint(tmp_path: Path) -> None:
    place = write(tmp_path / "three", "llama", count=3)
    kept = build_model(smoke(f"backbone={place}", "streams=3"))
    grown = build_model(smoke(f"backbone={place}", "streams=2"))
    assert torch.equal(kept.streams.keys, ParScale.from_pretrained(place).streams.keys)
    assert grown.streams.streams == 2
    assert torch.equal(grown.lm_head.weight, kept.lm_head.weight)


def test_fresh_streams_leave_the_model_nearly_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    # On problems that it is not sure of; on those that it knows, any small prefix does.
    monkeypatch.setitem(LEVELS, "large", Level("large", largest=75, above=50, openings=(1, 6)))
    config = smoke("held_out=60", "levels={large: 1}", "batch_tokens=1000", "longest=700")
    held_out = load_data(config, words.build()).held_out
    plain_loss = validate(ParScale.recycle(EMBEDDED, 1), held_out).loss
    grown = ParScale.recycle(EMBEDDED, 4, prefix_tokens=16)
    noise = dataclasses.replace(grown.streams, values=torch.randn_like(grown.streams.values) * 0.02)
    assert validate(grown, held_out).loss < 1.10 * plain_loss
    grown.set_streams(noise)  # what it is better than
    assert validate(grown, held_out).loss > 1.12 * plain_loss


def test_the_standard_error_is_that_of_a_ratio() -> None:
    model = build_model(smoke())
    held_out = load_data(smoke("held_out=40"), words.build()).held_out
    found = validate(model, held_out)
    rows = [made for batch in held_out for made in batch]
    random, means = torch.Generator().manual_seed(0), []
    losses = row_losses(model, held_out)
    for _ in range(2000):  # the bootstrap
        drawn = losses[torch.randint(len(rows), (len(rows),), generator=random)].sum(0)
        means.append(float(drawn[0] / drawn[1]))
    spread = torch.tensor(means).std().item()
    assert math.isclose(found.stderr, spread, rel_tol=0.25)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["streams=1"], "leaves nothing to train"),
        (["train=some"], "train: Input should be 'all' or 'streams'"),
        (["backbone="], "backbone: is missing"),
        (["backbone=./nowhere"], "no model folder './nowhere'"),
        (["data=./nowhere.jsonl"], "cannot load the data ./nowhere.jsonl"),
        (["levels={huge: 1}"], "unknown Countdown level 'huge'"),
        (["data={short}"], "has 1 rows to learn from: too few to hold 16 out"),
        (["data={long}"], "has 0 rows to learn from"),
        (["data={odd}"], "needs a column text, messages, or prompt and completion; this row has question"),
        (["data={talk}"], "the tokenizer has no chat template"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_it_starts(overrides: list[str], message: str, tmp_path: Path) -> None:
    records: dict[str, Any] = {
        "short": {"text": "1"},
        "odd": {"question": "1"},
        "talk": {"messages": [{"role": "a", "content": "1"}]},
    }
    records["long"] = {"prompt": " 1" * 400, "completion": " 2"}
    for name, record in records.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(record) + "\n")
    places = {f"{{{name}}}": str(tmp_path / f"{name}.jsonl") for name in records}
    filled = [
        override.replace(name, place) for override in overrides for name, place in places.items() if name in override
    ]
    with pytest.raises(UsageError, match=message):
        train_parscale(smoke(f"output={tmp_path / 'run'}", *(filled or overrides)))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words_", "message"),
    [
        (["parscale", "nowhere.yaml"], "there is no configuration file nowhere.yaml"),
        (["parscale", str(SMOKE), "stepz=3"], "unknown key stepz"),
        (["parscale", str(SMOKE), "output=/nowhere", "--resume"], "there is no checkpoint in /nowhere"),
    ],
)
def test_the_command_line_says_what_is_wrong(words_: list[str], message: str) -> None:
    result = CliRunner().invoke(app, words_)
    assert isinstance(result.exception, UsageError)
    assert message in str(result.exception)
