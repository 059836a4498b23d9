"""The languages of parallel blocks: what is rendered parses back, what is wrong is told with its place."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestra.protocols import (
    BLOCKS,
    MULTIVERSE,
    MULTIVERSE_ENGINE,
    NPR,
    PARA_THINKER,
    PARALLEL_R1,
    THREAD_WEAVER,
    Block,
    Blocks,
    Branch,
    Document,
    Fork,
    Path,
)

GOLDEN = {
    "multiverse": "Hm. <Parallel><Goal>both<Outline>1: add</Outline><Outline>2: times</Outline></Goal>"
    "<Path>\n1: 5</Path><Path>\n2: 6</Path><Conclusion> 5, 6</Conclusion></Parallel> So 11.",
    "multiverse_engine": "<Parallel><Goal><Outline>1: add</Outline><Outline>2: times</Outline></Goal>\n"
    "<Path>\n1: 5</Path>\n<Path>\n2: 6</Path>\n<Conclusion>\n 5, 6</Conclusion></Parallel> So 11.",
    "thread_weaver": "<think>Hm. <Parallel>\n<Outlines>\n<Outline>1: add</Outline>\n<Outline>2: times</Outline>\n"
    "</Outlines>\n<Thread>\n1: 5</Thread><Thread>\n2: 6</Thread>\n</Parallel> So</think> 11.",
    "npr": "<guideline><plan>1: add</plan><plan>2: times</plan></guideline><step>1: 5</step><step>2: 6</step>"
    "<takeaway> 5, 6</takeaway> So 11.",
    "parallel_r1": "Hm. <Parallel><Path>5</Path><Path>6</Path></Parallel><Summary> 5, 6</Summary> So 11.",
    "para_thinker": "<think1>5</think1><think2>6</think2><summary> 5, 6</summary> So 11.",
}


@pytest.mark.parametrize("name", BLOCKS)
def test_the_text_of_each_language(name: str) -> None:
    language, text = BLOCKS[name], GOLDEN[name]
    document = language.parse(text)
    assert language.validate(text) == []
    assert language.render(document) == text
    (block,) = document.blocks
    assert [path.parts for path in block.paths] == ([["5"], ["6"]] if not language.outline else [[" 5"], [" 6"]])
    assert [path.label for path in block.paths] == (["", ""] if name == "parallel_r1" else ["1", "2"])
    if language.outline:
        assert block.outlines == [Branch("1", "add"), Branch("2", "times")]
    assert (block.conclusion or "").strip() == ("" if name == "thread_weaver" else "5, 6")
    assert str(document.parts[-1]).strip().endswith("11.")


@pytest.mark.parametrize("name", BLOCKS)
def test_a_fork_is_asked_for_as_soon_as_the_tag_is_there(name: str) -> None:
    language, text = BLOCKS[name], GOLDEN[name]
    if not language.trigger:
        return
    reader = language.reader()
    before, _, _ = text.partition(language.trigger)
    for character in before:
        assert reader.feed(character) is None
    *most, last = language.trigger
    assert [reader.feed(character) for character in most] == [None] * len(most)
    asked = reader.feed(last)
    assert asked == (Fork((Branch("1", "add"), Branch("2", "times"))) if language.plan else Fork())
    reader.joined([Branch("1"), Branch("2")])
    assert reader.feed(text.partition(language.join)[2] if language.conclusion else "</Parallel> So") is None
    reader.close()
    assert reader.problems == []


def words() -> st.SearchStrategy[str]:
    return st.text(st.sampled_from("ab <>/`\n\"'1:."), max_size=12)


def harmless(language: Blocks) -> st.SearchStrategy[str]:
    """Text that holds no tag, opens no code and begins with no label."""
    plain = st.text(st.sampled_from("ab <>/\n1:."), max_size=12)
    return plain.map(lambda text: f" {text.strip()} ").filter(lambda t: not any(tag in t for tag in language.tags))


@st.composite
def documents(draw: st.DrawFn, language: Blocks, depth: int = 0) -> Document:
    parts: list[str | Block] = []
    for _ in range(draw(st.integers(0, 2))):
        parts += [draw(harmless(language)), draw(blocks(language, depth))]
    return Document([*parts, draw(harmless(language))])


@st.composite
def blocks(draw: st.DrawFn, language: Blocks, depth: int) -> Block:
    count = draw(st.integers(1, 3))
    labels = [str(i + 1) for i in range(count)]
    title = harmless(language).map(str.strip)
    block = Block(paths=[Path(label if language.outline or language.numbered else "") for label in labels])
    for path in block.paths:
        inside = draw(documents(language, depth + 1)) if depth + 1 < min(language.nested, 3) else None
        path.parts = inside.parts if inside else [draw(harmless(language))]
    if language.plan:
        block.goal = "" if language.strict else draw(title)
        block.outlines = [Branch(label, draw(title)) for label in labels]
    if language.conclusion:
        block.conclusion = draw(harmless(language))
    return block


@pytest.mark.parametrize("name", BLOCKS)
@given(data=st.data())
def test_what_is_rendered_parses_back(name: str, data: st.DataObject) -> None:
    language = BLOCKS[name]
    document = data.draw(documents(language))
    text = language.render(document)
    assert language.validate(text) == []
    parsed = language.parse(text)
    assert language.render(parsed) == text
    assert parsed.blocks == document.blocks


@pytest.mark.parametrize("name", BLOCKS)
@given(data=st.data())
def test_anything_can_be_read_in_any_pieces(name: str, data: st.DataObject) -> None:
    language = BLOCKS[name]
    mess = st.lists(st.one_of(st.sampled_from(language.tags[:16]), words(), st.sampled_from(["1:", "2: x", "1.1:"])))
    text = "".join(data.draw(mess))
    whole, bit = language.reader(), language.reader()
    whole.feed(text)
    for character in text:
        bit.feed(character)
    assert bit.close() == whole.close()
    assert bit.problems == whole.problems


@pytest.mark.parametrize(
    ("language", "text", "problems"),
    [
        (MULTIVERSE, "a\n<Parallel><Goal></Goal>", ["2:1: <Parallel> is not closed", "2:11: <Goal> has no outlines"]),
        (MULTIVERSE, "</Path>", ["1:1: </Path> closes nothing"]),
        (MULTIVERSE, "<Path>1: x</Path>", ["1:1: <Path> outside a block", "1:11: </Path> closes nothing"]),
        (MULTIVERSE, "<Parallel><Path>1: x</Path></Parallel>",
         ["1:11: <Path> before <Goal>", "1:17: text in <Parallel> outside its parts", "1:21: </Path> closes nothing"]),
        (
            MULTIVERSE,
            "<Parallel><Goal><Outline>1: a<Outline>1: b</Outline><Outline>c</Outline></Goal>"
            "<Path>1: x</Path><Path>3: y</Path><Conclusion>z</Conclusion></Parallel>",
            [
                "1:1: no outline for path 3",
                "1:17: <Outline> is not closed",
                "1:30: label 1 is there already",
                "1:53: <Outline> has no label",
            ],
        ),
        (
            MULTIVERSE,
            "<Parallel><Goal><Outline>1: a</Outline><Outline>2: b</Outline></Goal>"
            "<Path>1: x\n<Path>2: y</Path></Parallel>",
            ["1:1: no <Conclusion> in the block", "1:70: <Path> is not closed"],
        ),
        (
            MULTIVERSE,
            "<Parallel><Goal><Outline>1: a</Outline></Goal> hm <Path>1: x</Path><Conclusion></Conclusion></Parallel>",
            ["1:48: text in <Parallel> outside its parts"],
        ),
        (
            THREAD_WEAVER,
            "<Parallel><Outlines><Outline>2: a</Outline></Outlines><Thread>2: x</Thread> \n</Parallel>",
            ["1:11: outlines are numbered 1 to 1, not 2"],
        ),
        (
            THREAD_WEAVER,
            "<Parallel><Outlines><Outline>1: a</Outline><Outline>2: b</Outline></Outlines><Thread>2: x</Thread>\n"
            "<Thread>1: y <Parallel></Thread></Parallel>",
            [
                "1:1: paths are not in the order of their outlines, each once",
                "2:1: there is something between the paths",
                "2:14: <Parallel> inside a block",
            ],
        ),
        (NPR, "<guideline><plan>1: a</plan></guideline><step>1: x</step> so", []),
        (PARALLEL_R1, "<Parallel><Path>x</Path></Parallel> hm <Summary>y</Summary>",
         ["1:40: <Summary> does not come after paths", "1:50: </Summary> closes nothing"]),
        (PARA_THINKER, "<think1>a</think2></think1>", ["1:10: </think2> closes nothing"]),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_with_its_place(language: Blocks, text: str, problems: list[str]) -> None:
    assert [str(problem) for problem in language.validate(text)] == problems


def test_a_block_may_not_be_nested_too_deep() -> None:
    inner = "x"
    for label in ("1", "2", "3", "4", "5", "6"):
        inner = (
            f"<Parallel><Goal><Outline>{label}: a</Outline></Goal><Path>{label}: {inner}</Path>"
            "<Conclusion></Conclusion></Parallel>"
        )
    assert "<Parallel> nested more than 5 deep" in [problem.message for problem in MULTIVERSE.validate(inner)]


def test_outlines_are_read_as_the_original_reads_them() -> None:
    """Dotted labels, white space before and after, missing end tags; the first of equal labels counts."""
    reader = MULTIVERSE.reader()
    fork = reader.feed("<Parallel><Goal>g<Outline>\n 1.1 : a</Outline>\n<Outline>1.2:b<Outline>1.1: c</Outline></Goal>")
    assert fork == Fork((Branch("1.1", "a"), Branch("1.2", "b")))


def test_a_path_is_read_from_its_forced_header_to_its_own_end() -> None:
    reader = MULTIVERSE.reader(Branch("1"))
    inner = "<Parallel><Goal><Outline>1.1: a</Outline></Goal>"
    assert reader.feed(" try " + inner) == Fork((Branch("1.1", "a"),))
    assert not reader.ended
    reader.feed("<Path>\n1.1: written by the model itself</Path>")
    assert not reader.ended
    reader.feed("<Conclusion>c</Conclusion></Parallel> done</Path>")
    assert reader.ended
    assert reader.problems == []


def test_what_was_cut_off_is_closed_and_so_is_code_in_it() -> None:
    branch = Branch("2")
    for language, end in [(MULTIVERSE, "</Path>"), (THREAD_WEAVER, "\n</Thread>"), (PARA_THINKER, "</think2>")]:
        reader = language.reader(branch)
        reader.feed(" so far")
        assert reader.closing(branch) == end
        reader.feed("\n```\ncode")
        reader.feed(reader.closing(branch))
        assert reader.ended, language.name


def test_tags_come_in_the_order_of_the_published_tokenizer() -> None:
    """Multiverse adds twelve tokens; the first two are those of thinking, which its template writes."""
    assert MULTIVERSE.tags == MULTIVERSE_ENGINE.tags
    assert MULTIVERSE.tags == tuple(
        tag for name in ("Parallel", "Goal", "Outline", "Path", "Conclusion") for tag in (f"<{name}>", f"</{name}>")
    )
