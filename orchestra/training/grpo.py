"""Group relative policy optimisation on rollouts of strategies: TRL's `GRPOTrainer`, taught what a thread graph is.

What TRL lacks is here: a rollout is one row with positions and a node mask, in which every model call of it stands
(the parent's, its children's, those of all roots), and the loss is a mean over calls or tokens, whichever sampled them.
What TRL has is TRL's: models and adapters, the reference model, its memory-saving log-probabilities, the order of
prompts, logging, saving, resuming, accelerate.

The loss of a token is that of PPO, min(r A, clip(r) A), with r its ratio to the policy that made the rollouts, times
the truncated ratio min(p_trainer / p_sampler, cap) of that policy's probabilities as the trainer and as the sampler
computed them, plus `beta` times the k3 estimate of the divergence from the reference model.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import gather_object, send_to_device
from datasets import Dataset
from torch import Tensor
from trl import GRPOTrainer

from orchestra.errors import UsageError
from orchestra.evaluation.runner import sample_seed
from orchestra.evaluation.tasks import Item
from orchestra.outcome import Outcome
from orchestra.training.advantages import Mean, Scale, advantages, calls, shares
from orchestra.training.collate import GraphCollator
from orchestra.training.credit import Lesson, batches, even, lesson
from orchestra.training.grpo_data import Prompts, prompt_at
from orchestra.training.policy_weights import plain_weights
from orchestra.training.rewards import Part, children, problems, total
from orchestra.training.rollouts import Arm, Play, Player, Rollout, assign


class GraphGRPOTrainer(GRPOTrainer):  # type: ignore[misc]  # TRL is untyped to mypy
    """`GRPOTrainer` whose rollouts are strategies.

    TRL's own arguments mean what they mean there: `epsilon`, `epsilon_high`, `beta`, `num_iterations`,
    `num_generations`, `steps_per_generation`, `temperature`. Its rewards, vLLM, tools and loss types are not used.

    Args:
        player: plays rollouts; its engine gets the weights before each generation.
        prompts: what is asked.
        arms: who answers.
        rewards: their weighted sum is what is learned.
        scale: of advantages.
        mean: of the loss.
        sampler_cap: see the module; None leaves that ratio out.
        protocol: malformed rollouts are counted by it; empty: they are not.
        rollout_func: plays in the player's place: from plays to rollouts, in the same order.
        options: TRL's.
    """

    def __init__(
        self,
        *,
        player: Player,
        prompts: Prompts,
        arms: Sequence[Arm],
        rewards: Sequence[Part],
        scale: Scale = "group",
        mean: Mean = "calls",
        sampler_cap: float | None = 2.0,
        protocol: str = "",
        rollout_func: Callable[[Sequence[Play]], list[Rollout]] | None = None,
        **options: Any,
    ) -> None:
        # Which prompts a step asks is settled in `_asked`; the dataset says how many there are.
        dataset = Dataset.from_dict({"item": list(range(len(prompts.items)))})
        super().__init__(reward_funcs=[part.function for part in rewards], train_dataset=dataset, **options)
        self.player, self.prompts, self.arms, self.rewards = player, prompts, list(arms), list(rewards)
        self.scale, self.mean, self.sampler_cap, self.protocol = scale, mean, sampler_cap, protocol
        self.rollout_func = rollout_func or player.play
        if self._local_batch % self.num_generations:
            raise UsageError(
                f"each process plays whole groups: {self._local_batch} rollouts are no multiple of "
                f"{self.num_generations}"
            )
        self._buffered_inputs: list[list[Lesson]] | None = None
        self.collator = GraphCollator(self._tokenizer.pad_token_id, config=self.model.config, weights=False)
        self._trained_at = 0.0

    @property
    def _local_batch(self) -> int:
        size: int = self.args.per_device_train_batch_size * self.args.steps_per_generation
        return size

    # -- rollouts ----------------------------------------------------------------------------------------------------

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        """The lessons of one forward; a generation when those of the last one are used up."""
        forwards = self.args.steps_per_generation
        if self._step % (forwards * self.num_iterations) == 0 or self._buffered_inputs is None:
            if self._trained_at:
                self._note("seconds/train", time.monotonic() - self._trained_at)
            count = self._local_batch // self.num_generations
            first = self.accelerator.process_index * count
            items = self._asked(first, count)
            seed = sample_seed(self.args.seed, "generation", self.state.global_step)
            self._buffered_inputs = self._generation(assign(items, self.num_generations, self.arms, seed, first))
            self._trained_at = time.monotonic()
        assert self._buffered_inputs is not None  # see above
        return {"lessons": self._buffered_inputs[self._step % forwards]}

    def _asked(self, first: int, count: int) -> list[Item]:
        """Prompts `first` and on of this generation: a function of the step, so that a resumed run asks the same."""
        of_all = count * self.accelerator.num_processes
        steps = self.args.steps_per_generation // self.args.gradient_accumulation_steps * self.num_iterations
        begin = self.state.global_step // max(steps, 1) * of_all + first
        return [prompt_at(self.prompts.items, place, self.args.seed) for place in range(begin, begin + count)]

    def _generation(self, plays: list[Play]) -> list[list[Lesson]]:
        """Play, judge, and cut into the forwards of the optimiser steps to come."""
        self._note("seconds/sync", self._sync())
        began = time.monotonic()
        rollouts = self.rollout_func(plays)
        self._note("seconds/rollouts", time.monotonic() - began)
        lessons = self._judge(rollouts)
        accumulate = self.args.gradient_accumulation_steps
        minibatches = max(1, self.args.steps_per_generation // accumulate)
        if minibatches > 1:
            random.Random(self.state.global_step).shuffle(lessons)
        skip = not self.beta
        forwards: list[list[Lesson]] = []
        for part in even([1] * len(lessons), minibatches):
            step = [lessons[i] for i in part]
            self._weigh(step)
            forwards += batches(step, self.args.steps_per_generation // minibatches, skip)
        if minibatches > 1:  # only the first step learns from rollouts of the very policy that it changes
            with torch.no_grad():
                for forward in filter(None, forwards):
                    self._remember(forward, "old", self._logprobs(self.model, forward)[0])
        return forwards

    def _sync(self) -> float:
        """Give the engine the weights; the first process first: of a server that all of them use, the others see it."""
        began = time.monotonic()
        weights = plain_weights(self.model, self.accelerator)
        with self.accelerator.main_process_first():
            self.player.update(weights)
        return time.monotonic() - began

    def _judge(self, rollouts: Sequence[Rollout]) -> list[Lesson]:
        """Rewards and advantages of what was played; what failed is left out of its group."""
        played = [(i // self.num_generations, each) for i, each in enumerate(rollouts) if each.outcome is not None]
        lessons, rewards, facts = [], [], []
        for _, rollout in played:
            outcome, item = rollout.outcome, rollout.play.item
            assert outcome is not None  # see above
            correct = self.prompts.grade(item, outcome.answer)
            values = [part(outcome, correct=correct, item=item) for part in self.rewards]
            rewards.append(total(self.rewards, values))
            lessons.append(lesson(outcome, tempered=self.temperature != 1))
            facts.append(self._facts(outcome, correct, lessons[-1], values) | {"rollout/reward": rewards[-1]})
        everybody: list[float] = gather_object(rewards)
        found = advantages(rewards, [group for group, _ in played], self.scale, batch=everybody)
        for each, advantage in zip(lessons, found, strict=True):
            each.advantage = advantage
        self._report(rollouts, facts)
        self._note("rollout/groups_that_teach", _share([bool(advantage) for advantage in found]))
        return lessons

    def _facts(self, outcome: Outcome, correct: bool | None, made: Lesson, values: list[float]) -> dict[str, float]:
        spawned = children(outcome.graph)
        return {
            **({} if correct is None else {"rollout/accuracy": float(correct)}),
            "rollout/children": float(spawned),
            "rollout/spawned": float(spawned > 0),
            **({"rollout/malformed": float(problems(outcome, self.protocol) > 0)} if self.protocol else {}),
            "rollout/critical_path": float(outcome.usage.critical_path_tokens),
            "rollout/sampled_tokens": float(outcome.usage.sampled_tokens),
            "rollout/calls": float(len(calls(made.row))),
            "rollout/row_tokens": float(len(made.row)),
            "rollout/cut_off": float(outcome.stopped_by is not None or outcome.finish_reason == "length"),
            **{f"reward/{part.name}": value for part, value in zip(self.rewards, values, strict=True)},
        }

    def _report(self, rollouts: Sequence[Rollout], facts: list[dict[str, float]]) -> None:
        """Means over the rollouts of all processes go to the log."""
        failed: list[str] = gather_object([each.error for each in rollouts if each.outcome is None])
        everything: list[dict[str, float]] = gather_object(facts)
        self._note("rollout/failed", float(len(failed)))
        for name in dict.fromkeys(name for fact in everything for name in fact):
            self._note(name, statistics.fmean(fact[name] for fact in everything if name in fact))
        self._note("rollout/reward_std", statistics.pstdev([fact["rollout/reward"] for fact in everything] or [0.0]))

    def _weigh(self, step: list[Lesson]) -> None:
        """How much each token counts in an optimiser step, of all processes."""
        found = [shares(each.row, self.mean) for each in step]
        units = sum(gather_object([sum(count for _, count in found)]))
        for each, (entries, _) in zip(step, found, strict=True):
            each.shares = [share / max(units, 1.0) for share in entries]

    def _note(self, name: str, value: float) -> None:
        self._metrics["train"][name].append(value)

    # -- learning ----------------------------------------------------------------------------------------------------

    def _compute_loss(self, model: Any, inputs: Mapping[str, Any]) -> Tensor:
        lessons: list[Lesson] = inputs["lessons"]
        if not lessons:
            if self.accelerator.num_processes == 1:
                return torch.zeros((), device=self.accelerator.device, requires_grad=True)
            lessons = [_nothing(self._buffered_inputs or [])]  # all processes must take part in the forward
        logprobs, entropy = self._logprobs(model, lessons)
        if lessons[0].old is None:  # the first time that these are learned from: by the policy that made them
            self._remember(lessons, "old", logprobs)
        width = logprobs.shape[1]
        weight = self._padded([each.shares[1:] for each in lessons], width)
        advantage = torch.tensor([[each.advantage] for each in lessons], device=weight.device)
        old = self._recall(lessons, "old", width)
        ratio = (logprobs - old).exp()
        high = self.epsilon_low if self.epsilon_high is None else self.epsilon_high
        clipped = ratio.clamp(1 - self.epsilon_low, 1 + high)
        surrogate = torch.min(ratio * advantage, clipped * advantage)
        apart = old - self._padded([each.sampler[1:] for each in lessons], width)
        apart = torch.where(apart.isnan() | (weight == 0), 0.0, apart)
        if self.sampler_cap is not None:
            surrogate = surrogate * apart.exp().clamp(max=self.sampler_cap)
        loss = -surrogate
        if self.beta:
            away = self._reference(model, lessons, width) - logprobs
            divergence = away.exp() - away - 1
            loss = loss + self.beta * divergence
            self._measure("kl", divergence, weight)
        self._measure("policy/entropy", entropy, weight)
        self._measure("ratio/clipped", (ratio * advantage > clipped * advantage).float(), weight)
        self._measure("ratio/sampler_apart", apart.abs(), weight)
        if self.sampler_cap is not None:
            self._measure("ratio/sampler_cut", (apart.exp() > self.sampler_cap).float(), weight)
        self._note("ratio/max", float(ratio.detach()[weight > 0].max()) if bool((weight > 0).any()) else 1.0)
        # The shares have divided by all there is in a step. Gradients are averaged over processes, once more; those of
        # the forwards of a step are summed, because TRL has switched off Trainer's division by their number.
        processes: int = self.accelerator.num_processes
        return (loss * weight).sum() * processes

    def _measure(self, name: str, values: Tensor | None, weight: Tensor) -> None:
        """The mean over sampled tokens goes to the log."""
        sampled = weight > 0
        if values is not None and bool(sampled.any()):
            self._note(name, float(values.detach()[sampled].mean()))

    def _logprobs(self, model: Any, lessons: Sequence[Lesson]) -> tuple[Tensor, Tensor | None]:
        """Log-probabilities of entries 1 and on of each row, `[rows, longest - 1]`; 0 where nothing was sampled."""
        batch = self.collator([each.row for each in lessons])
        with self.accelerator.autocast():
            found = model(**send_to_device(batch, self.accelerator.device), fused_lm_head=True)
        return found.log_probs, getattr(found, "entropy", None)

    def _reference(self, model: Any, lessons: list[Lesson], width: int) -> Tensor:
        """Log-probabilities by the model at the start, computed when they are first asked for."""
        if lessons[0].reference is None:
            with torch.no_grad():
                if self.ref_model is not None:
                    found = self._logprobs(self.ref_model, lessons)[0]
                else:
                    with self.accelerator.unwrap_model(model).disable_adapter():
                        found = self._logprobs(model, lessons)[0]
            self._remember(lessons, "reference", found)
        return self._recall(lessons, "reference", width)

    @staticmethod
    def _remember(lessons: Sequence[Lesson], name: str, logprobs: Tensor) -> None:
        for each, values in zip(lessons, logprobs.detach(), strict=True):
            setattr(each, name, values[: len(each.row) - 1].clone())

    def _recall(self, lessons: Sequence[Lesson], name: str, width: int) -> Tensor:
        rows = [getattr(each, name) for each in lessons]
        return torch.stack([torch.nn.functional.pad(row, (0, width - len(row))) for row in rows])

    def _padded(self, rows: Sequence[Sequence[float]], width: int) -> Tensor:
        made = torch.tensor([[*row, *[0.0] * (width - len(row))] for row in rows])
        return made.to(self.accelerator.device)


def _nothing(forwards: list[list[Lesson]]) -> Lesson:
    """A lesson from which nothing is learned."""
    for forward in forwards:
        for each in forward:
            return Lesson(each.row, 0.0, [0.0] * len(each.row), each.sampler)
    raise UsageError("no rollout of this process could be played")


def _share(values: Sequence[bool]) -> float:
    return sum(values) / max(len(values), 1)
