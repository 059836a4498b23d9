"""Demonstrations in the languages of parallel thinking: true, well formed, and token by token what strategies make."""

from __future__ import annotations

import random
import re
from collections import Counter

import pytest
from rehearsal import Rehearsal

import orchestra
from orchestra.evaluation.countdown import Instance, Step, generate, solve
from orchestra.evaluation.countdown_check import check as checks
from orchestra.evaluation.countdown_check import extract_answer
from orchestra.graph import ThreadGraph
from orchestra.protocols import PROTOCOLS
from orchestra.protocols.async_think import UNJOINED
from orchestra.runtime.local.detokenize import Detokenizer
from orchestra.runtime.local.prompts import Prompts
from orchestra.training import tokenizer
from orchestra.training.flatten import Row, dense_mask, flatten
from orchestra.training.mixture import Weights
from orchestra.training.multilingual import NEW, row_of
from orchestra.training.parallel_demonstrations import BEHAVIOURS, DRAFTS, OPENINGS, Told, check

STRATEGIES = {"threads": "threads", "map_reduce": "map_reduce", "async_think": "async_think(workers=16)"}


def some(behaviour: str, count: int, level: str = "hard") -> list[tuple[Instance, Told]]:
    rng = random.Random(behaviour)
    return [(one, BEHAVIOURS[behaviour](one, rng)) for one in generate(level, "train", count)]


@pytest.mark.parametrize("level", ["small", "hard"])
@pytest.mark.parametrize("behaviour", BEHAVIOURS)
def test_answers_are_right_and_texts_are_well_formed(behaviour: str, level: str) -> None:
    solved = 0
    for one, told in some(behaviour, 60, level):
        answer = extract_answer(told.text)
        assert (answer is not None) == told.solved
        assert answer is None or checks(one.numbers, one.target, answer)
        assert told.text.startswith(told.opening)
        solved += told.solved
        if told.language != "plain":
            problems = PROTOCOLS[told.language].validate(told.text)
            assert not [one for one in problems if not one.message.endswith(UNJOINED)]
    assert solved >= 20


@pytest.mark.parametrize("behaviour", BEHAVIOURS)
def test_the_built_tokenizer_gives_the_same_ids_and_loses_nothing(behaviour: str) -> None:
    built = tokenizer.multilingual()
    for _, told in some(behaviour, 10):
        for text in (told.prompt, told.text, *told.branches):
            ids = tokenizer.encode(text)
            assert built(text, add_special_tokens=False).input_ids == ids
            assert tokenizer.UNK not in ids
            shown = built.decode(ids)
            assert tokenizer.encode(shown) == ids
            assert "".join(shown.split()) == "".join(text.split())
            reader = Detokenizer(built.decode)
            assert "".join(reader.push([token]) for token in ids) + reader.push([], True) == shown


def test_old_words_keep_their_ids() -> None:
    old = tokenizer.vocabulary()
    assert old == {token: i for token, i in tokenizer.multilingual().get_vocab().items() if i < len(old)}
    assert len(tokenizer.multilingual()) == len(tokenizer.IDS) == len(set(tokenizer.IDS.values()))


def reciter(told: Told) -> Rehearsal:
    """An engine that says what a demonstration says, in the multilingual model's tokens."""
    whole = re.sub(r"\s", "", told.text)
    workers = dict(zip(re.findall(r"<FORK-\d+>(.*?)</FORK-\d+>", told.text), told.branches, strict=False))

    def script(context: str, path: tuple[int, ...]) -> str:
        for query, text in workers.items():
            if context.rstrip().endswith(query.strip()) and "<FORK" not in context:
                return text
        said = re.sub(r"\s", "", context.replace("<bos>", "")).removeprefix(re.sub(r"\s", "", told.prompt))
        header = re.search(r"<(Path|Thread)>\s*(\d+):$", context)
        if header is not None:
            at = re.search(rf"<{header[1]}>\s*{header[2]}:", told.text)
            assert at is not None
            return told.text[at.end() :]
        assert whole.startswith(said), (said, whole)
        at = 0
        for _ in said:  # the place in the text after as many characters that are no white space
            while told.text[at].isspace():
                at += 1
            at += 1
        return told.text[at:].removeprefix("\n" if context.endswith("\n") else "")

    engine = Rehearsal(script)
    engine._prompts = Prompts(tokenizer.multilingual(), 4096)
    engine.openings = OPENINGS
    return engine


def learned(row: Row) -> Counter[tuple[int, ...]]:
    """Each token that is learned, with all that it is predicted from: positions and ids."""
    mask = dense_mask(row)
    found: Counter[tuple[int, ...]] = Counter()
    for k, weight in enumerate(row.weights):
        if weight:
            seen = sorted((row.positions[j], row.tokens[j]) for j in mask[k - 1].nonzero().flatten().tolist())
            found[(row.tokens[k], *(number for pair in seen for number in pair))] += 1
    return found


@pytest.mark.parametrize("behaviour", STRATEGIES)
def test_rows_hold_what_the_strategy_asks_of_the_model(behaviour: str) -> None:
    told = next(told for _, told in some(behaviour, 20) if len(told.text) < 2500)
    outcome = orchestra.run(STRATEGIES[behaviour], told.prompt, engine=reciter(told), temperature=0)
    graph: ThreadGraph = outcome.graph
    assert sum(node.count("sampled") for node in graph.nodes) > 100
    ours, theirs = learned(row_of(told, Weights())), learned(flatten(graph))
    assert theirs  # a worker that is not joined is cancelled: then the strategy has asked less
    if behaviour == "async_think":
        assert not theirs - ours
    else:
        assert ours == theirs


def test_openings_weigh_nothing_and_results_weigh_as_answers() -> None:
    weights = Weights()
    for behaviour in NEW:
        for _, told in some(behaviour, 5):
            row = row_of(told, weights)
            opened = len(tokenizer.encode(told.opening))
            given = 1 + len(tokenizer.encode(told.prompt))
            assert row.tokens[given : given + opened] == tokenizer.encode(told.opening)
            assert not any(row.weights[: given + opened])
            marks = {row.weights[i] for i, token in enumerate(row.tokens) if token == tokenizer.IDS["hit"]} - {0.0}
            assert marks <= {weights.hit}
            results = [i + 1 for i, token in enumerate(row.tokens) if token == tokenizer.IDS["answer:"]]
            assert {row.weights[i] for i in results} - {0.0} == {weights.answer}


def test_drafts_are_checked_by_computing_them_anew() -> None:
    one = Instance((3, 7, 8, 12), 68, "small")
    line, found = check(one, (Step(8, "-", 7, 1), Step(12, "+", 1, 13), Step(13, "*", 3, 39)))
    assert found is None
    assert line == " 8 - 7 = 1 left: 1 3 12\n 12 + 1 = 13 13 3 16 10 39 x 68 miss\n"
    steps = solve(one.numbers, one.target)
    assert steps is not None
    line, found = check(one, steps)
    assert found is not None
    assert line.endswith("68 hit\n")
    assert checks(one.numbers, one.target, " , ".join(map(str, found)))
    slipped = (found[0]._replace(result=found[0].result + 1), *found[1:])
    assert check(one, slipped)[1] in (None, found)
    assert check(one, None) == (" none\n", None)
    assert check(one, (Step(50, "+", 3, 53), *found[1:])) == (" x miss\n", None)


def test_a_refinement_searches_where_no_draft_has_begun() -> None:
    for _, told in some("refine", 80):
        drafts = told.prompt.partition(DRAFTS.partition("{")[0])[2]
        begun = {found[1] for found in re.finditer(r"\d: (\d+ . \d+ = \d+)", drafts)}
        searched = re.findall(r" step: (\d+ . \d+ = \d+)", told.text)
        assert not begun & set(searched)
