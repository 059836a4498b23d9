"""Tags in text: what is one, what is only talked about, and that it does not matter how the text arrives."""

from __future__ import annotations

import codecs

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestra.protocols.lexer import Lexer, Token

MARKS = ["<Path>", "</Path>", "<Goal>", "</Goal>", "<Pa", "th>", "<", ">"]
MARKS += ["`", "```", "````py", '"', " '", "\n", " ", "é𝄞"]
PIECES = st.lists(st.sampled_from(MARKS), max_size=40).map("".join)


def tokens(*pieces: str) -> list[Token]:
    """All tokens of a text that arrives in these pieces, with texts that were given out in parts put together."""
    lexer = Lexer(["Path", "Goal"])
    found: list[Token] = []
    for token in [token for piece in pieces for token in lexer.feed(piece)] + lexer.close():
        if token.kind == "text" and found and found[-1].kind == "text":
            found[-1] = Token("text", found[-1].text + token.text, "", found[-1].at)
        else:
            found.append(token)
    return found


def tags(text: str) -> list[str]:
    return [token.text for token in tokens(text) if token.kind != "text"]


@given(PIECES, st.data())
def test_how_a_text_is_cut_does_not_matter(text: str, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    whole = tokens(text)
    assert tokens(*pieces) == whole
    assert tokens(*text) == whole
    assert "".join(token.text for token in whole) == text


@pytest.mark.parametrize(
    "text", ["a <Goal>é</Goal>\n<Path> y </Path>", "``` \n<Path>\n```\n</Path>", "`<Path>` </Path>"]
)
def test_a_cut_at_every_byte(text: str) -> None:
    """As text arrives from an engine: a character that is not complete is held back."""
    raw = text.encode()
    for cut in range(len(raw) + 1):
        decoder = codecs.getincrementaldecoder("utf-8")()
        assert tokens(decoder.decode(raw[:cut]), decoder.decode(raw[cut:], final=True)) == tokens(text)


def test_a_tag_is_told_at_once_and_the_rest_is_held_back() -> None:
    lexer = Lexer(["Path"])
    assert [token.text for token in lexer.feed("a <Pa")] == ["a "]
    assert [token.kind for token in lexer.feed("th>")] == ["open"]
    assert lexer.feed("</Path") == []
    assert [token.text for token in lexer.close()] == ["</Path"]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("<Path>", ["<Path>"]),
        ("<path> <Path > < Path> <Paths> </ Path>", []),
        ("the tag `<Path>` opens", []),
        ("the ` alone\n<Path>", ["<Path>"]),
        ("```\n<Path>\n```\n<Goal>", ["<Goal>"]),
        ("````\n```\n<Path>\n````\n<Goal>", ["<Goal>"]),
        ("  ```py\n<Path>", []),
        ("not a fence: ``` <Path>", []),
        ('write "<Path>" or (“</Path>”)', []),
        ("he said \"yes\"</Path> and 'no'</Goal>", ["</Path>", "</Goal>"]),
        ('"<Path>', []),
        ("it's <Path>", ["<Path>"]),
        ("<<Path>", ["<Path>"]),
        ("<Path></Path><Goal>", ["<Path>", "</Path>", "<Goal>"]),
    ],
)
def test_what_is_a_tag(text: str, found: list[str]) -> None:
    assert tags(text) == found


def test_places_count_from_one() -> None:
    places = {token.text: str(token.at) for token in tokens("<Path>\n  é <Goal>\n\n</Path>") if token.kind != "text"}
    assert places == {"<Path>": "1:1", "<Goal>": "2:5", "</Path>": "4:1"}
    assert str(tokens("a\n", "b\n", "", "<Path>")[-1].at) == "3:1"


def test_open_code_can_be_ended() -> None:
    for text, end in [("```py\nx", "\n```\n"), ("a ` b", "`"), ("`a`", ""), ("````\n```\n", "\n````\n")]:
        lexer = Lexer(["Path"])
        lexer.feed(text)
        lexer.close()
        assert lexer.end_of_code == end, text
        assert [token.kind for token in lexer.feed(end + "</Path>")][-1] == "close", text
