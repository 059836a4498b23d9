"""GRPO over rollouts: its gradient equals closed forms and brute force, its log-probabilities the engine's."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("trl")

from trl import GRPOConfig  # noqa: E402

import orchestra  # noqa: E402
from orchestra.evaluation.countdown import generate  # noqa: E402
from orchestra.evaluation.tasks import Item  # noqa: E402
from orchestra.graph import Edge, Span, ThreadGraph  # noqa: E402
from orchestra.outcome import Outcome  # noqa: E402
from orchestra.runtime.connect import EMBEDDED  # noqa: E402
from orchestra.training.advantages import advantages, shares  # noqa: E402
from orchestra.training.credit import Lesson, lesson, split  # noqa: E402
from orchestra.training.grpo import GraphGRPOTrainer  # noqa: E402
from orchestra.training.grpo_data import Prompts  # noqa: E402
from orchestra.training.rewards import part  # noqa: E402
from orchestra.training.rollouts import Arm, Play, Rollout  # noqa: E402


class Canned:
    """A player that has nothing to play on."""

    def update(self, weights: Any) -> float:
        return 0.0

    def play(self, plays: Sequence[Play]) -> list[Rollout]:
        raise AssertionError("nothing is played here")


def trainer_of(
    model: Any, tokenizer: Any, folder: Path, mean: str = "calls", cap: float | None = 2.0, **options: Any
) -> Any:
    arguments = GRPOConfig(
        output_dir=str(folder), per_device_train_batch_size=4, num_generations=4, max_steps=1, use_cpu=True,
        report_to=[], bf16=False, gradient_checkpointing=False, disable_tqdm=True,
        remove_unused_columns=False, **options,
    )  # fmt: skip
    made = GraphGRPOTrainer(
        player=Canned(),  # type: ignore[arg-type]
        prompts=Prompts([Item("1", "x", {"answer": ""})] * 4),
        arms=[Arm.of("sample")],
        rewards=[part("correctness")],
        mean=mean,  # type: ignore[arg-type]
        sampler_cap=cap,
        model=model,
        args=arguments,
        processing_class=tokenizer,
    )
    made.current_gradient_accumulation_steps = 1
    return made


def armed(lessons: list[Lesson], mean: str = "calls") -> list[Lesson]:
    """With their shares, of one optimiser step."""
    found = [shares(each.row, mean) for each in lessons]  # type: ignore[arg-type]
    units = sum(count for _, count in found)
    for each, (entries, _) in zip(lessons, found, strict=True):
        each.shares = [share / units for share in entries]
    return lessons


def pull(arm: int, logprob: float = math.nan) -> Outcome:
    """A rollout that sampled one token after token 0."""
    graph = ThreadGraph()
    graph.add(spans=[Span("prompt", [0], 1)])
    graph.add([Edge(0, 1)], spans=[Span("sampled", [arm], 1, logprobs=[] if math.isnan(logprob) else [logprob])])
    return Outcome(text="", graph=graph)


@pytest.fixture(scope="module")
def bandit(tmp_path_factory: pytest.TempPathFactory, make_model: Any) -> Any:
    """A trainer of a model that knows two tokens: its policy after token 0 is a bandit's with two arms."""
    import transformers
    from conftest import tiny_model

    tokenizer = transformers.AutoTokenizer.from_pretrained(make_model("llama"))
    model = tiny_model("llama", vocabulary=2, bos_token_id=0, eos_token_id=1)
    return trainer_of(model, tokenizer, tmp_path_factory.mktemp("bandit"))


def gradient(trainer: Any, lessons: list[Lesson]) -> tuple[float, Any]:
    trainer.model.zero_grad()
    loss = trainer._compute_loss(trainer.model, {"lessons": lessons})
    loss.backward()
    return loss.item(), trainer.model.lm_head.weight.grad.clone()


@pytest.mark.parametrize("right", [1, 3])
def test_the_gradient_on_two_arms_equals_the_closed_form(bandit, right):
    """With k of n rollouts right, dL/d(z1 - z0) = -k (n - k) / n^2 / (s + eps), whatever the policy is."""
    n = 4
    lessons = armed([lesson(pull(int(i < right))) for i in range(n)])
    for each, advantage in zip(lessons, advantages([1.0] * right + [0.0] * (n - right), [0] * n), strict=True):
        each.advantage = advantage
    _, found = gradient(bandit, lessons)
    with torch.no_grad():
        hidden = bandit.model.model(input_ids=torch.tensor([[0]])).last_hidden_state[0, 0]
    deviation = math.sqrt(right * (n - right) / n / (n - 1)) + 1e-4
    slope = -right * (n - right) / n**2 / deviation
    assert torch.allclose(found[1], slope * hidden, atol=1e-6)
    assert torch.allclose(found[0], -slope * hidden, atol=1e-6)


def test_the_ratio_to_the_old_policy_is_clipped_and_that_to_the_sampler_truncated(bandit):
    with torch.no_grad():
        now = bandit.model(input_ids=torch.tensor([[0]])).logits[0, 0].log_softmax(-1)
    cases = [  # (advantage, log of p_now / p_old, log of p_old / p_sampler)
        (1.0, 0.1, 0.2),
        (1.0, 0.5, -0.2),  # clipped above
        (-1.0, -0.5, 0.0),  # clipped below
        (-1.0, 0.5, 1.5),  # not clipped; truncated at 2
    ]
    lessons, expected = [], 0.0
    for advantage, moved, apart in cases:
        each = lesson(pull(1, float(now[1]) - moved - apart))
        each.advantage, each.old = advantage, torch.tensor([float(now[1]) - moved])
        lessons.append(each)
        ratio = math.exp(moved)
        surrogate = min(ratio * advantage, min(max(ratio, 0.8), 1.2) * advantage)
        expected -= surrogate * min(math.exp(apart), 2.0) / len(cases)
    loss, _ = gradient(bandit, armed(lessons))
    assert loss == pytest.approx(expected, abs=1e-5)
    logged = bandit._metrics["train"]
    assert logged["ratio/clipped"][-1] == 0.5
    assert logged["ratio/sampler_cut"][-1] == 0.25
    assert logged["ratio/sampler_apart"][-1] == pytest.approx(1.9 / 4, abs=1e-5)


def spoken(seed: int, children: int) -> Outcome:
    """A rollout of random tokens: a parent, children with roots of their own, and branches that share a prompt."""
    chance = torch.Generator().manual_seed(seed)

    def span(origin: Any, count: int) -> Span:
        return Span(origin, torch.randint(4, 200, (count,), generator=chance).tolist(), count)

    graph = ThreadGraph()
    graph.add(spans=[span("prompt", 4)])
    parent = graph.add([Edge(0, 4)], spans=[span("forced", 2), span("sampled", 5)])
    for index in range(children):
        root = graph.add(spans=[span("prompt", 3)], path=[index])
        graph.add([Edge(root.id, 3)], spans=[span("sampled", 2 + 3 * index)], path=[index])
    last = graph.add([Edge(parent.id, 6)], spans=[span("forced", 3), span("sampled", 4)])
    for index in range(2):
        graph.add([Edge(last.id, 7)], spans=[span("sampled", 1 + 2 * index)], path=[9, index])
    return Outcome(text="", graph=graph)


def test_the_loss_of_a_mean_of_calls_is_that_of_its_calls_one_by_one(tiny, tmp_path):
    """Each call alone, as the engine saw it: a plain sequence of its context and what it sampled."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny)
    trainer = trainer_of(model, AutoTokenizer.from_pretrained(tiny), tmp_path)
    outcomes, gains = [spoken(1, 3), spoken(2, 0)], [0.7, -1.3]
    lessons = armed([lesson(outcome) for outcome in outcomes])
    for each, advantage in zip(lessons, gains, strict=True):
        each.advantage = advantage
    _, found = gradient(trainer, [piece for each in lessons for piece in split(each)])
    _, unsplit = gradient(trainer, lessons)
    assert torch.allclose(found, unsplit, atol=1e-6)

    plain = AutoModelForCausalLM.from_pretrained(tiny)
    loss, calls = torch.zeros(()), 0
    for outcome, advantage in zip(outcomes, gains, strict=True):
        graph = outcome.graph
        sampled = [node for node in graph.nodes if node.count("sampled")]
        calls += len(sampled)
        for node in sampled:
            ids = torch.tensor([graph.path_tokens(node.id)])
            said = plain(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None]).squeeze(1)
            of_call = said[-node.count("sampled") :]
            loss = loss - advantage * (of_call.exp() / of_call.exp().detach()).mul(1.0).mean() / len(sampled)
    (loss / calls).backward()
    assert torch.allclose(found, plain.lm_head.weight.grad, atol=1e-6)


def test_the_divergence_from_the_reference_is_k3(tiny, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    trainer = trainer_of(tiny, AutoTokenizer.from_pretrained(tiny), tmp_path, mean="tokens", beta=0.5)
    with torch.no_grad():
        trainer.model.lm_head.weight.mul_(1.1)
    each = armed([lesson(spoken(3, 1))], "tokens")
    loss = trainer._compute_loss(trainer.model, {"lessons": each}).item()
    reference = AutoModelForCausalLM.from_pretrained(tiny)
    expected, count = 0.0, 0
    graph = spoken(3, 1).graph
    for node in graph.nodes:
        if sampled := node.count("sampled"):
            ids = torch.tensor([graph.path_tokens(node.id)])
            with torch.no_grad():
                ours, theirs = (
                    model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[-sampled:]
                    for model in (trainer.model, reference)
                )
            away = theirs - ours
            expected += float((away.exp() - away - 1).sum())
            count += sampled
    assert loss == pytest.approx(0.5 * expected / count, rel=1e-4)


def test_the_trainer_computes_what_the_engine_sampled_from(tmp_path):
    """Parity, for parents with several turns and all their children."""
    from transformers import AutoTokenizer

    items = generate("hard", "train", 3, 5)

    async def play() -> list[Outcome]:
        async with orchestra.connect("demo") as engine:
            return [
                await engine.run("spawn_join", item.prompt, seed=i, temperature=1.0, max_tokens=200)
                for i, item in enumerate(items)
            ]

    trainer = trainer_of(str(EMBEDDED), AutoTokenizer.from_pretrained(EMBEDDED), tmp_path)
    compared = 0
    for whole in map(lesson, asyncio.run(play())):
        for pieces in ([whole], split(whole)):
            with torch.no_grad():
                found = trainer._logprobs(trainer.model, pieces)[0]
            for each, values in zip(pieces, found, strict=True):
                said = torch.tensor(each.sampler[1:])
                sampled = ~said.isnan()
                compared += int(sampled.sum())
                assert (values[: len(said)] - said)[sampled].abs().max() < 1e-4
    assert compared > 1000
