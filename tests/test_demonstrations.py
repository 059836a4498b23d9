"""Demonstrations: every written line is true, answers check, and the tokenizer loses nothing."""

from __future__ import annotations

import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestra.evaluation.countdown import can_reach, generate, moves, stream
from orchestra.evaluation.countdown_check import check, extract_answer
from orchestra.training import tokenizer
from orchestra.training.demonstrations import PRUNED, balanced_children, search, serial, spawn_join, three
from orchestra.training.mixture import ANSWER, CYCLE, HIT, MISS, Mixture, Weights, row

LINE = re.compile(r" (\d+) (.) (\d+) = (\d+) (\d+) (\d+) (\S+) (\S+) (\S+) (\S+) (\d+) (hit|miss)")


@given(st.lists(st.integers(1, 99), min_size=3, max_size=3), st.integers(1, 99))
def test_search_lines_are_true(numbers: list[int], target: int) -> None:
    text, steps = search(numbers, target)
    hits = 0
    for line in text.splitlines():
        match = LINE.fullmatch(line)
        assert match is not None
        a, operator, b, c, high, low, *rest = match.groups()
        *shown, stated, mark = rest
        assert int(stated) == target
        assert _operate(operator, int(a), int(b)) == int(c)
        left = sorted(numbers)
        left.remove(int(a))
        left.remove(int(b))
        assert sorted([*left, int(c)]) == [int(low), int(high)]
        for sign, value in zip("+-*/", shown, strict=True):
            assert value == str(_operate(sign, int(high), int(low)) or "x")
        assert (mark == "hit") == (str(target) in shown)
        hits += mark == "hit"
    assert hits == (steps is not None) == can_reach(tuple(sorted(numbers)), target)


def _operate(sign: str, a: int, b: int) -> int | None:
    value = {"+": a + b, "-": a - b, "*": a * b, "/": a / b}[sign]
    return int(value) if value == int(value) and 1 <= value <= 99 else None


@pytest.mark.parametrize("level", ["small", "hard"])
def test_demonstrated_answers_check(level: str) -> None:
    rng = random.Random(0)
    solved = {"serial": 0, "spawn_join": 0}
    instances = generate(level, "train", 150)
    for one in instances:
        parent, children = spawn_join(one, rng, rng.choice([None, 1, 4]) if level == "small" else None)
        for name, demonstration in (("serial", serial(one, rng)), ("spawn_join", parent)):
            answer = extract_answer(demonstration.text)
            assert (answer is not None) == demonstration.solved
            if answer is not None:
                assert check(one.numbers, one.target, answer)
                solved[name] += 1
        assert any(child.solved for child in children) == parent.solved
    if level == "small":
        assert set(solved.values()) == {150}
    else:  # pruned searches give up on some: there must be something left for voting and RL
        assert all(0.4 < count / 150 < 0.8 for count in solved.values())


def test_rounds_follow_the_header() -> None:
    rng = random.Random(1)
    for one in generate("small", "dev", 40):
        parent, children = spawn_join(one, rng, 3)
        turns = [segment.text for segment in parent.segments[1:] if segment.learn]
        assert " children: 3\n" in parent.text
        assert all(turn.count("spawn:") <= 3 for turn in turns)
        assert [child.solved for child in children][:-3].count(True) == 0
    for one in generate("hard", "dev", 40):
        assert len(spawn_join(one, rng, 5)[1]) == min(5, len(moves(one.numbers)))
        assert len(spawn_join(one, rng)[1]) <= PRUNED[1]


def test_unsolvable_problems_end_in_none() -> None:
    rng = random.Random(2)
    one = next(stream("small", "train", rng, solvable=False))
    assert extract_answer(serial(one, rng).text) is None
    assert extract_answer(spawn_join(one, rng)[0].text) is None


def test_children_are_balanced() -> None:
    pairs = [balanced_children(one, random.Random(0)) for one in generate("small", "train", 50)]
    assert all([child.solved for child in pair] in ([True, False], [True]) for pair in pairs)


def test_weights_apply_to_the_right_tokens() -> None:
    rng = random.Random(3)
    weights = Weights(hit=6, miss=2, answer=4, other=1)
    for one in generate("small", "train", 20):
        for demonstration in (spawn_join(one, rng)[0], serial(one, rng), *balanced_children(one, rng)):
            made = row(demonstration, weights)
            assert made.tokens[0] == tokenizer.BOS
            assert made.tokens[-1] == tokenizer.EOS
            assert len(made.tokens) == len(made.weights)
            tag = made.tokens.index(ANSWER)
            given_tokens = len(tokenizer.encode(demonstration.segments[0].text)) + 1
            for place, (token, weight) in enumerate(zip(made.tokens, made.weights, strict=True)):
                if place < given_tokens:
                    assert weight == 0
                elif place > tag:
                    assert weight == 4
                elif demonstration.kind != "parent":
                    assert weight == {HIT: 6, MISS: 2}.get(token, 1)
            if demonstration.kind == "parent":  # what the runtime forces is not learned, what the model writes is
                joined = len(tokenizer.encode("".join(segment.text for segment in demonstration.segments[:2]))) + 1
                forced = len(tokenizer.encode(demonstration.segments[2].text))
                assert set(made.weights[given_tokens:joined]) == {1}
                assert set(made.weights[joined : joined + forced]) == {0}


def test_batches_depend_on_seed_and_step_only() -> None:
    def mixture(seed: int) -> Mixture:
        return Mixture(seed, 600, {"small": 1.0, "hard": 1.0})

    forward, other = mixture(1), mixture(2)
    batches = [forward.batch(step) for step in range(12)]
    assert mixture(1).batch(11) == batches[11]
    assert batches[0] != other.batch(0)


def test_both_behaviours_get_equal_tokens_on_four_numbers() -> None:
    mixture = Mixture(1, 3000, {"small": 0.5, "hard": 0.5})
    tokens = dict.fromkeys(CYCLE, 0)
    for step in range(240):
        tokens[CYCLE[step % len(CYCLE)]] += sum(len(made.tokens) for made in mixture.batch(step))
    assert abs(tokens["spawn_join"] / tokens["serial"] - 1) < 0.05


def test_nothing_is_learned_from_held_out_problems() -> None:
    mixture = Mixture(1, 3000, {"small": 0.5, "hard": 0.5})
    held_out = {one.prompt for level in ("small", "hard") for one in generate(level, "test", 300)}
    for demonstration, _ in zip(mixture._demonstrations("serial", random.Random(0)), range(300), strict=False):
        assert demonstration.segments[0].text not in held_out


# --- the tokenizer ---


@pytest.fixture(scope="module")
def fast(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(folder)
    return transformers.AutoTokenizer.from_pretrained(folder)


def test_tokenizer_special_tokens(fast) -> None:  # type: ignore[no-untyped-def]
    assert (fast.pad_token_id, fast.bos_token_id, fast.eos_token_id, fast.unk_token_id) == (0, 1, 2, 3)
    assert fast("numbers: 3").input_ids == [1, *tokenizer.encode("numbers: 3")]


def test_tokenizer_round_trip_and_homomorphism(fast) -> None:  # type: ignore[no-untyped-def]
    rng = random.Random(4)
    for one in generate("hard", "train", 20):
        for demonstration in (spawn_join(one, rng, 4)[0], serial(one, rng), three(one.numbers[:3], one.target)):
            ids = fast(demonstration.text, add_special_tokens=False).input_ids
            assert ids == tokenizer.encode(demonstration.text)
            assert tokenizer.UNK not in ids
            assert fast.decode(ids) == demonstration.text
            place = rng.randrange(len(ids))
            assert fast.decode(ids[:place]) + fast.decode(ids[place:]) == demonstration.text
            assert fast(fast.decode(ids[:place]), add_special_tokens=False).input_ids == ids[:place]


@given(ids=st.lists(st.integers(4, len(tokenizer.vocabulary()) - 1), max_size=30).filter(lambda ids: 10 not in ids))
def test_any_ids_survive_decoding(fast, ids: list[int]) -> None:  # type: ignore[no-untyped-def]
    assert tokenizer.IDS[","] == 10  # a comma between bare numbers is read as a list (below), so it is left out here
    assert fast(fast.decode(ids), add_special_tokens=False).input_ids == ids


@pytest.mark.parametrize(
    "text",
    [
        "numbers: 3 7 8 12 target: 54",
        "  numbers:\t3  7 8 12   target: 54 ",
        "numbers: 3, 7, 8, 12 target: 54",
        "numbers: 3,7,8,12 target: 54",
    ],
)
def test_prompts_as_people_write_them(fast, text: str) -> None:  # type: ignore[no-untyped-def]
    assert fast(text).input_ids == fast(" numbers: 3 7 8 12 target: 54").input_ids


def test_unknown_words(fast) -> None:  # type: ignore[no-untyped-def]
    assert tokenizer.UNK in fast("Why is the sky blue?").input_ids
    assert tokenizer.UNK in fast("numbers: 100").input_ids
