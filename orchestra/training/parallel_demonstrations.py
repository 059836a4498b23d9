"""Symbolic demonstrators of Countdown in the languages of parallel thinking: threads, paths, workers and drafts.

All of them say what `orchestra.training.demonstrations` says, in other tags: first steps, the search lines of the three
numbers that each leaves, and an answer. On both levels they look at a random few of the first steps, in order.

A thread or path begins with its outline and ends with a result that begins with its label, `` 3: answer: STEPS`` or
`` 3: none``. The last line repeats the result that was chosen, label and all: what is joined by reuse stands at the
same positions as its siblings, and the label is what tells them apart.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from orchestra.evaluation.countdown import OPERATORS, Instance, Move, Step, apply, can_reach, moves
from orchestra.protocols import apr
from orchestra.protocols.async_think import MOST_WORKERS
from orchestra.training import demonstrations
from orchestra.training.demonstrations import PRUNED, outline, search, shown_as, steps_text
from orchestra.training.tokenizer import WORKERS

OPENINGS = {
    "multiverse": "\n<Parallel><Goal>",
    "thread_weaver": "\n<Parallel>\n<Outlines>",
    "async_think": "\n<FORK-1>",
}
"""What is forced after a prompt, so that the model speaks this language and not another that it knows."""
DRAFTS = "drafts:\n{answers}"
"""How drafts are shown after a prompt: their answers, one a line, numbered from 1."""
MOST_DRAFTS = 4
"""In a demonstration."""


@dataclass(frozen=True)
class Told:
    """A demonstration in a language of `orchestra.protocols.PROTOCOLS`, or in plain text.

    Attributes:
        behaviour: a key of `BEHAVIOURS`.
        language: what it is written in.
        prompt: what the model is given.
        text: what follows: said by the model, and forced where the language says so.
        opening: the beginning of `text` that is forced too.
        branches: texts of the children or workers.
        solved: whether it ends in a solution.
    """

    behaviour: str
    language: str
    prompt: str
    text: str
    solved: bool
    opening: str = ""
    branches: tuple[str, ...] = ()


class _Try(NamedTuple):
    """A first step, and what comes of it."""

    move: Move
    lines: str
    steps: tuple[Step, ...] | None


def serial(instance: Instance, rng: random.Random) -> Told:
    """One sequence; see `demonstrations.serial`."""
    made = demonstrations.serial(instance, rng)
    given, said = made.segments
    return Told("serial", "plain", given.text, said.text, made.solved)


def spawn_join(instance: Instance, rng: random.Random, children: int | None = None) -> Told:
    """A parent with all its children; see `demonstrations.spawn_join`."""
    parent, offspring = demonstrations.spawn_join(instance, rng, children)
    header = apr.header(children)
    prompt = parent.segments[0].text.removesuffix(header)
    text = header + "".join(segment.text for segment in parent.segments[1:])
    return Told(
        "spawn_join", "apr", prompt, text, parent.solved, header, tuple(one.segments[1].text for one in offspring)
    )


def threads(instance: Instance, rng: random.Random) -> Told:
    """ThreadWeaver: an outline for each first step, a thread for each, and the first result that is a solution."""
    tried = _tries(instance, rng)
    outlines = "".join(f"\n<Outline> {i}: {outline(one.move)}</Outline>" for i, one in enumerate(tried, 1))
    bodies = "".join(f"<Thread>\n{i}:{_body(i, one)}</Thread>" for i, one in enumerate(tried, 1))
    opening = OPENINGS["thread_weaver"]
    text = f"{opening}{outlines}\n</Outlines>\n{bodies}\n</Parallel>\n{_chosen(tried)}"
    return Told("threads", "thread_weaver", shown_as(instance, rng), text, _solved(tried), opening)


def map_reduce(instance: Instance, rng: random.Random) -> Told:
    """Multiverse: a path for each first step; the conclusion repeats the first result that is a solution."""
    tried = _tries(instance, rng)
    outlines = "".join(f"<Outline> {i}: {outline(one.move)}</Outline>" for i, one in enumerate(tried, 1))
    bodies = "".join(f"<Path>\n{i}:{_body(i, one)}</Path>" for i, one in enumerate(tried, 1))
    opening = OPENINGS["multiverse"]
    text = f"{opening}{outlines}</Goal>{bodies}<Conclusion>\n{_chosen(tried)}\n</Conclusion></Parallel>"
    return Told("map_reduce", "multiverse", shown_as(instance, rng), text, _solved(tried), opening)


def async_think(instance: Instance, rng: random.Random) -> Told:
    """AsyncThink: workers get all first steps but the last, which the organiser searches itself in the meantime.

    It then joins worker after worker, until one has found something.
    """
    assert PRUNED[1] <= WORKERS + 1 <= MOST_WORKERS + 1
    tried = _tries(instance, rng)
    *forked, own = tried
    given = shown_as(instance, rng)
    text = ""
    workers = []
    for i, one in enumerate(forked, 1):
        text += f"\n<FORK-{i}> step: {outline(one.move)} target: {instance.target}</FORK-{i}>"
        workers.append(f"\n{one.lines}<RETURN> {_answer(one.steps)}</RETURN>")
    text += f"\n step: {outline(own.move)}\n{own.lines}"
    steps = own.steps
    for i, one in enumerate(forked, 1):
        if steps is not None:
            break
        text += f"<JOIN-{i}><RETURN-{i}>{_answer(one.steps)}</RETURN-{i}>\n"
        steps = one.steps
    text += f" {apr.ANSWER} {_answer(steps)}"
    return Told(
        "async_think",
        "async_think",
        given,
        text,
        steps is not None,
        OPENINGS["async_think"] if forked else "",
        tuple(workers),
    )


def refine(instance: Instance, rng: random.Random) -> Told:
    """From drafts: each is checked by computing its steps anew; a right one is the answer, else the search goes on.

    Drafts are right, wrong in their arithmetic or in where they end, or ``none``; the search looks at first steps that
    no draft has begun with.
    """
    drafts = [_draft(instance, rng) for _ in range(rng.randint(1, MOST_DRAFTS))]
    shown = "\n".join(f"{i}: {_answer(steps)}" for i, steps in enumerate(drafts, 1))
    text, found = "\n", None
    for i, steps in enumerate(drafts, 1):
        line, found = check(instance, steps)
        text += f" {i}:{line}"
        if found is not None:
            break
    if found is None:
        begun = {steps[0] for steps in drafts if steps is not None}
        for one in _tries(instance, rng, begun):
            text += f" {apr_step(one.move)}\n{one.lines}"
            if one.steps is not None:
                found = one.steps
                break
    text += f" {apr.ANSWER} {_answer(found)}"
    prompt = f"{shown_as(instance, rng)}\n\n{DRAFTS.replace('{answers}', shown)}"
    return Told("refine", "plain", prompt, text, found is not None)


def apr_step(move: Move) -> str:
    """The line with which serial search begins a first step."""
    return f"step: {outline(move)}"


def check(instance: Instance, draft: Sequence[Step] | None) -> tuple[str, tuple[Step, ...] | None]:
    """What is written to check a draft, and the solution in it, if there is one.

    Its first two steps are computed anew; then the last step is looked for, as in any search line.
    """
    if draft is None:
        return f" {apr.NONE}\n", None
    first = _again(draft[0], moves(instance.numbers))
    if first is None:
        return " x miss\n", None
    text = f" {outline(first)}\n"
    second = _again(draft[1], moves(first.left))
    if second is None:
        return f"{text} x miss\n", None
    low, high = second.left
    results = tuple(apply(operator, high, low) for operator in OPERATORS)
    hit = instance.target in results
    shown = " ".join("x" if value is None else str(value) for value in results)
    text += f" {second.step} {high} {low} {shown} {instance.target} {'hit' if hit else 'miss'}\n"
    if not hit:
        return text, None
    last = Step(high, OPERATORS[results.index(instance.target)], low, instance.target)
    return text, (first.step, second.step, last)


def _again(step: Step, options: Sequence[Move]) -> Move | None:
    """The move that takes the same numbers by the same operator, whatever the result was said to be."""
    return next((move for move in options if move.step[:3] == step[:3]), None)


def _draft(instance: Instance, rng: random.Random) -> tuple[Step, ...] | None:
    """The steps of an earlier attempt; None: it has found nothing."""
    kind = rng.choices(("right", "wrong", "slip", "none"), (0.2, 0.35, 0.15, 0.3))[0]
    if kind == "none":
        return None
    if kind == "right":
        left, steps = instance.numbers, list[Step]()
        while len(left) > 1:
            options = [move for move in moves(left) if can_reach(move.left, instance.target)]
            if not options:
                return None  # the problem has no solution
            move = rng.choice(options)
            steps.append(move.step)
            left = move.left
        return tuple(steps)
    left, steps = instance.numbers, []
    while len(left) > 1:
        options = list(moves(left))
        if not options:
            return None
        move = rng.choice(options)
        steps.append(move.step)
        left = move.left
    if kind == "slip":  # one result is wrong, and what follows takes it for granted
        at = rng.randrange(len(steps))
        wrong = rng.randint(1, 99)
        said = {steps[at].result: wrong}
        later = [Step(said.get(a, a), sign, said.get(b, b), said.get(c, c)) for a, sign, b, c in steps[at + 1 :]]
        steps = [*steps[:at], steps[at]._replace(result=wrong), *later]
    if rng.random() < 0.5:
        steps[-1] = steps[-1]._replace(result=instance.target)  # it claims to have reached the target
    return tuple(steps)


def _tries(instance: Instance, rng: random.Random, without: Sequence[Step] | set[Step] = ()) -> list[_Try]:
    """A random few of the first steps, in order, with their searches."""
    every = [move for move in moves(instance.numbers) if move.step not in without]
    size = min(len(every), rng.randint(*PRUNED))
    tried = []
    for place in sorted(rng.sample(range(len(every)), size)):
        lines, rest = search(every[place].left, instance.target)
        tried.append(_Try(every[place], lines, None if rest is None else (every[place].step, *rest)))
    return tried


def _body(label: int, one: _Try) -> str:
    result = apr.NONE if one.steps is None else f"{apr.ANSWER} {steps_text(one.steps)}"
    return f" {outline(one.move)}\n{one.lines} {label}: {result}"


def _chosen(tried: Sequence[_Try]) -> str:
    for label, one in enumerate(tried, 1):
        if one.steps is not None:
            return f" {label}: {apr.ANSWER} {_answer(one.steps)}"
    return f" {apr.ANSWER} {apr.NONE}"


def _solved(tried: Sequence[_Try]) -> bool:
    return any(one.steps is not None for one in tried)


def _answer(steps: Sequence[Step] | None) -> str:
    return apr.NONE if steps is None else steps_text(steps)


BEHAVIOURS: Mapping[str, Callable[[Instance, random.Random], Told]] = {
    "serial": serial,
    "spawn_join": spawn_join,
    "threads": threads,
    "map_reduce": map_reduce,
    "async_think": async_think,
    "refine": refine,
}
"""Who tells what, by the strategy that runs it (`serial` is what a single sample says)."""
