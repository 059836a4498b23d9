"""Advantages, what each token counts, and rewards: against numbers made by hand, and brute force."""

from __future__ import annotations

import math
import random
import sys
from fractions import Fraction
from types import ModuleType

import pytest

from orchestra.errors import UsageError
from orchestra.evaluation.tasks import Item
from orchestra.graph import Edge, Span, ThreadGraph
from orchestra.outcome import Outcome, Usage
from orchestra.protocols import apr
from orchestra.training.advantages import advantages, calls, shares
from orchestra.training.credit import batches, lesson, split
from orchestra.training.flatten import flatten
from orchestra.training.rewards import (
    accelerated,
    acceleration,
    children,
    concurrency,
    correctness,
    part,
    problems,
    thread_lengths,
    total,
    well_formed,
)
from orchestra.training.rollouts import Arm, assign


def span(origin, count, logprob=None):
    tokens = list(range(4, 4 + count))
    return Span(origin, tokens, count, logprobs=[] if logprob is None else [logprob] * count)


def family(*sizes: int) -> ThreadGraph:
    """A parent of `sizes[0]` tokens, children of the others, and a parent's last turn of one token."""
    graph = ThreadGraph()
    root = graph.add(spans=[span("prompt", 3)])
    parent = graph.add([Edge(root.id, 3)], spans=[span("forced", 2), span("sampled", sizes[0], -0.5)])
    for index, size in enumerate(sizes[1:]):
        own = graph.add(spans=[span("prompt", 4)], path=[index])
        graph.add([Edge(own.id, 4)], spans=[span("sampled", size, -1.0 - index)], path=[index])
    graph.add([Edge(parent.id, 2 + sizes[0])], spans=[span("forced", 2), span("sampled", 1, -0.25)])
    return graph


def outcome(critical: int = 60, sampled: int = 100, text: str = "x") -> Outcome:
    return Outcome(text=text, usage=Usage(critical_path_tokens=critical, sampled_tokens=sampled))


# -- advantages --------------------------------------------------------------------------------------------------------


def test_advantages_are_centred_and_scaled_as_asked_for():
    rewards, groups = [1.0, 0.0, 0.0, 0.0, 2.0, 2.0], [0, 0, 0, 0, 1, 1]
    assert advantages(rewards, groups, "none") == [0.75, -0.25, -0.25, -0.25, 0, 0]
    of_group = math.sqrt((0.75**2 + 3 * 0.25**2) / 3) + 1e-4
    assert advantages(rewards, groups, "group") == pytest.approx([0.75 / of_group, *[-0.25 / of_group] * 3, 0, 0])
    mean = 5 / 6
    of_batch = math.sqrt(sum((reward - mean) ** 2 for reward in rewards) / 5) + 1e-4
    assert advantages(rewards, groups, "batch")[0] == pytest.approx(0.75 / of_batch)
    assert advantages(rewards[:4], groups[:4], "batch", batch=rewards)[0] == pytest.approx(0.75 / of_batch)


def test_a_group_of_one_or_of_equals_teaches_nothing():
    for scale in ("group", "none", "batch"):
        assert advantages([1.0, 3.0, 3.0], ["a", "b", "b"], scale) == [0, 0, 0]


def test_an_unknown_scale_is_refused():
    with pytest.raises(UsageError, match="group, none or batch"):
        advantages([1.0], [0], "std")  # type: ignore[arg-type]


# -- what a token counts -----------------------------------------------------------------------------------------------


def test_every_model_call_of_a_rollout_is_counted_children_and_all_turns_of_the_parent():
    row = flatten(family(5, 2, 7))
    assert sorted(calls(row).values()) == [1, 2, 5, 7]
    assert sum(weight > 0 for weight in row.weights) == 15


def test_a_mean_of_calls_equals_brute_force():
    chance = random.Random(3)
    for _ in range(20):
        rows = [
            flatten(family(*[chance.randint(1, 9) for _ in range(chance.randint(1, 5))]))
            for _ in range(chance.randint(1, 4))
        ]
        losses = [[chance.random() for _ in row.tokens] for row in rows]
        expected, units = Fraction(0), 0
        for row, values in zip(rows, losses, strict=True):
            of_call: dict[int, list[Fraction]] = {}
            for node, weight, value in zip(row.nodes, row.weights, values, strict=True):
                if weight:
                    of_call.setdefault(node, []).append(Fraction(value))
            units += len(of_call)
            expected += sum(sum(one) / len(one) for one in of_call.values()) / len(of_call)
        found = [shares(row, "calls") for row in rows]
        made = sum(
            s * v for (each, _), values in zip(found, losses, strict=True) for s, v in zip(each, values, strict=True)
        )
        assert sum(count for _, count in found) == units
        assert made / units == pytest.approx(float(expected / units))


def test_a_mean_of_tokens_counts_each_sampled_token_once():
    entries, units = shares(flatten(family(5, 2)), "tokens")
    assert units == sum(entries) == 8
    assert set(entries) == {0.0, 1.0}


def test_a_lesson_knows_what_the_sampler_said_of_every_sampled_token():
    made = lesson(Outcome(text="", graph=family(2, 3)))
    said = [(value, weight) for value, weight in zip(made.sampler, made.row.weights, strict=True)]
    assert [value for value, weight in said if weight] == [-0.5] * 2 + [-1.0] * 3 + [-0.25]
    assert all(math.isnan(value) for value, weight in said if not weight)


def test_forwards_hold_rows_of_like_length_and_leave_out_what_teaches_nothing():
    lessons = [lesson(Outcome(text="", graph=family(size))) for size in (9, 1, 5, 3, 7, 2)]
    for each in lessons[:4]:
        each.advantage = 1.0
    assert [[len(each.row) for each in part] for part in batches(lessons, 2, skip=True)] == [[9, 11], [13, 17]]
    assert sum(len(part) for part in batches(lessons, 2, skip=False)) == 6
    assert [len(part) for part in batches(lessons[:1], 3, skip=True)].count(0) == 2


def test_what_sees_nothing_of_the_rest_stands_in_a_row_of_its_own_and_counts_as_before():
    whole = lesson(Outcome(text="", graph=family(5, 2, 7)))
    whole.shares, units = shares(whole.row, "calls")
    whole.advantage = 0.5
    parts = split(whole)
    assert units == 4
    assert all(each.row.plain for each in parts)
    assert sorted(len(each.row) for each in parts) == [6, 11, 13]
    assert sum(sum(each.shares) for each in parts) == pytest.approx(1.0)
    told = [token for token, echo in zip(whole.row.tokens, whole.row.echoes, strict=True) if not echo]
    assert sorted(token for each in parts for token in each.row.tokens) == sorted(told)
    assert {each.advantage for each in parts} == {0.5}


def test_branches_of_one_prompt_stay_in_one_row():
    graph = ThreadGraph()
    graph.add(spans=[span("prompt", 3)])
    for index in range(2):
        graph.add([Edge(0, 3)], spans=[span("sampled", 4, -1.0)], path=[index])
    whole = lesson(Outcome(text="", graph=graph))
    assert split(whole) == [whole]
    assert not whole.row.plain


# -- rewards -----------------------------------------------------------------------------------------------------------


def test_correctness():
    assert correctness(outcome(), correct=True) == 1
    assert correctness(outcome(), correct=None, wrong=-1) == -1


def test_the_three_published_acceleration_rewards():
    run = outcome(critical=60, sampled=100)  # eta = 0.4, ratio - 1 = 2/3
    assert acceleration(run, correct=True) == pytest.approx(0.2)
    assert acceleration(run, correct=True, variant="code") == pytest.approx(0.1)
    assert acceleration(run, correct=True, variant="readme") == pytest.approx(0.1)
    assert acceleration(run, correct=False) == 0
    assert accelerated(90, 100) == pytest.approx(0.05)
    assert accelerated(90, 100, "code") == pytest.approx(0.05)
    assert accelerated(90, 100, "readme") == pytest.approx(0.5 / 9)
    assert accelerated(50, 100) == pytest.approx(0.2)  # the paper's is at its cap from eta = 0.4 on
    with pytest.raises(UsageError, match="known: code, paper, readme"):
        accelerated(1, 2, "best")  # type: ignore[arg-type]


def test_concurrency_is_the_mean_number_of_workers_and_cannot_be_farmed():
    assert concurrency(outcome(50, 100), correct=True, workers=4) == pytest.approx(0.5)
    assert concurrency(outcome(50, 100), correct=True, workers=4, threshold=0.25) == 1
    assert concurrency(outcome(50, 100), correct=False, always=False) == 0


def test_format_rewards_ask_the_protocol():
    good = f"\n {apr.CHILDREN} free\n spawn: 7 + 3 = 10 left: 8 10 12\n join:\n none\n answer: none"
    bad = good.replace("7 + 3 = 10 left", "7 + 3")
    assert problems(outcome(text=good), "apr") == 0
    assert problems(outcome(text=bad), "apr") > 0
    assert well_formed(outcome(text=good), protocol="apr") == 0
    assert well_formed(outcome(text=bad), protocol="apr", each=-0.5) == -1 - 0.5 * problems(outcome(text=bad), "apr")
    with pytest.raises(UsageError, match="unknown protocol"):
        problems(outcome(), "latin")


def test_children_are_threads_and_not_turns():
    assert children(family(5)) == 0
    assert children(family(5, 2, 3)) == 2


def test_lengths_of_a_text_as_the_published_parser_counts_them():
    text = "a b<Parallel>c<Thread>d e f</Thread><Thread>g</Thread>h</Parallel>i"
    words = {"<Parallel>": 1, "</Parallel>": 1, "<Thread>": 1, "</Thread>": 1}

    def count(piece: str) -> int:
        tags = sum(piece.count(tag) for tag in words)
        for tag in words:
            piece = piece.replace(tag, " ")
        return tags + len(piece.split())

    # outside: a b i; in the block: two tags, c, h; threads of 5 and 3
    assert thread_lengths(text, count) == (3 + 4 + 5, 3 + 4 + 5 + 3)
    assert thread_lengths("a b", count) == (2, 2)
    assert thread_lengths("a<Parallel><Thread>b c", count) == (2 + 3, 2 + 3)  # closed by the end
    nested = "<Parallel><Thread>a</Parallel>b</Thread></Parallel>"  # inside of a thread a tag is text
    assert thread_lengths(nested, count) == (2 + 5, 2 + 5)


def test_rewards_come_from_yaml_and_own_ones_by_their_path():
    module = ModuleType("rewards_of_a_test")
    module.brevity = lambda outcome, *, item, scale=1.0, **_: -scale * len(outcome.text)  # type: ignore[attr-defined]
    sys.modules[module.__name__] = module
    parts = [part("correctness"), part({"reward": "rewards_of_a_test:brevity", "weight": 0.1, "scale": 2})]
    item = Item("1", "p", {})
    values = [each(outcome(text="four"), correct=True, item=item) for each in parts]
    assert [each.name for each in parts] == ["correctness", "brevity"]
    assert values == [1, -8]
    assert total(parts, values) == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("speed", "unknown reward 'speed'"),
        ("no_such_module:reward", "no_such_module"),
        ("math:nothing", "nothing"),
        ("math:pi", "no function"),
        ({"reward": "acceleration", "variant": "paper", "wait": 3}, None),
        ({"reward": "well_formed"}, "protocol"),
        ({"weight": 1}, "a reward is a name"),
    ],
)
def test_a_wrong_reward_is_one_line(spec, said):
    if said is None:
        assert part(spec)  # the built-in ones take what they do not know
        return
    with pytest.raises(UsageError, match=said):
        part(spec)


# -- who plays what ----------------------------------------------------------------------------------------------------


def test_prompts_are_shared_out_to_strategies_and_what_is_drawn_is_one_for_a_group():
    items = [Item(str(i), "p", {}) for i in range(8)]
    arms = [
        Arm.of({"strategy": "spawn_join", "share": 1, "draw": {"children": [None, 2, 5]}}),
        Arm.of({"strategy": "pdr(widths=[4])", "share": 1}),
    ]
    plays = assign(items, 3, arms, seed=7)
    assert [play.strategy.name for play in plays[::3]] == ["spawn_join"] * 4 + ["pdr"] * 4
    for first in range(0, len(plays), 3):
        assert len({play.strategy.to_spec() for play in plays[first : first + 3]}) == 1
    assert len({play.seed for play in plays}) == len(plays)
    assert len({play.strategy.to_spec() for play in assign(items * 5, 1, arms[:1], seed=7)}) == 3
    assert plays == assign(items, 3, arms, seed=7)
    # Two processes play what one would.
    both = assign(items[:4], 3, arms[:1], 7) + assign(items[4:], 3, arms[:1], 7, first=4)
    assert both == assign(items, 3, arms[:1], 7)


@pytest.mark.parametrize("spec", [{"strategy": "spawn_join", "draw": {"children": [0]}}, {"share": 1, "x": 2}, "spwan"])
def test_a_wrong_arm_is_an_error_before_anything_is_played(spec):
    with pytest.raises(UsageError):
        Arm.of(spec)
