from __future__ import annotations

import asyncio

import pytest
from conftest import byte_tokenizer
from engines import WARM, opened, root

from orchestra.errors import PromptError
from orchestra.graph import Edge, ThreadGraph
from orchestra.runtime.engine import Sampling
from orchestra.runtime.local.detokenize import Detokenizer, Endings, Finder, cut
from orchestra.runtime.local.prompts import Prompts
from orchestra.testing.graphs import generate


@pytest.mark.parametrize("size", [1, 2, 5])
def test_text_in_pieces_is_the_text_of_the_whole(size):
    tokenizer = byte_tokenizer()
    text = "the naïve cat sät on 3 mäts — “日本語” 🙂 end"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    ids = [*ids[:9], 2, *ids[9:]]  # a special token in the middle has no text
    pieces = Detokenizer(lambda i: tokenizer.decode(i, skip_special_tokens=True))
    said = [pieces.push(ids[i : i + size]) for i in range(0, len(ids), size)]
    assert "".join(said) == text
    assert not any("\ufffd" in piece for piece in said)
    assert len(said) > 3


def test_text_that_ends_inside_a_character_is_given_at_the_end():
    tokenizer = byte_tokenizer()
    ids = tokenizer("ok 日", add_special_tokens=False).input_ids[:-1]
    pieces = Detokenizer(lambda i: tokenizer.decode(i, skip_special_tokens=True))
    assert pieces.push(ids) == ""
    assert pieces.push([], last=True) == tokenizer.decode(ids)


def test_leading_spaces_of_sentencepiece_tokens_depend_on_what_stands_before():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "▁Hello", "▁world", "s", "▁and"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    first = Detokenizer(tokenizer.decode)
    assert [first.push([i]) for i in (1, 2, 3, 4)] == ["Hello", " world", "s", " and"]
    later = Detokenizer(tokenizer.decode, before=[1])
    assert [later.push([i]) for i in (2, 3)] == [" world", "s"]


@pytest.mark.parametrize(
    ("pieces", "stops", "found"),
    [
        (["a", "bc", "d"], ["cd"], (2, "cd")),
        (["abcd"], ["cd", "b"], (0, "b")),
        (["ab", "c"], ["abc", "bc"], (1, "abc")),
        (["x", "y"], ["z"], None),
        (["aa", "ab"], ["aaab"], (1, "aaab")),
    ],
)
def test_stop_strings_are_found_across_pieces(pieces, stops, found):
    finder = Finder(stops)
    hits = [(i, hit) for i, piece in enumerate(pieces) if (hit := finder.feed(piece)) is not None]
    assert hits[:1] == ([] if found is None else [found])


def test_endings_lets_through_what_may_complete_a_stop_string():
    tokenizer = byte_tokenizer()
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in ("a", "the", "Ġ", "é", "Ã")}
    endings = Endings(tokenizer.decode, ["some e"])
    assert ids["the"] in endings
    assert ids["a"] not in endings
    assert ids["Ã"] in endings  # half a character may complete anything
    assert ids["a"] in Endings(tokenizer.decode, ["ends in a blank "])


def test_generation_stops_at_strings_ids_and_the_end_of_sequence(tiny):
    async def main():
        async with opened(tiny) as engine:
            graph = ThreadGraph()
            start = await root(engine, graph)
            free = await generate(
                engine, graph, graph.add([Edge(0, len(start))]), Sampling(max_tokens=40, ignore_eos=True)
            )
            decode = engine._open()[1].decode

            async def again(**options):
                node = graph.add([Edge(0, len(start))])
                return await generate(engine, graph, node, Sampling(max_tokens=40, **options), chunk=7)

            # A string over two tokens.
            texts = [decode(free.tokens[:i]) for i in range(41)]
            whole = (i for i in range(8, 40) if len(texts[i]) > len(texts[i - 1]) > len(texts[i - 2]))
            stop = next(texts[i][-2:] for i in whole if texts[i][-2:].isascii())
            first = next(i for i in range(41) if stop in texts[i])
            delta = await again(stop=("never", stop), ignore_eos=True)
            assert (delta.finish_reason, delta.matched, delta.eos) == ("stop", stop, False)
            assert delta.tokens == free.tokens[:first]
            assert delta.text == texts[first]

            token = free.tokens[9]
            delta = await again(stop_ids=(token,), ignore_eos=True)
            assert delta.tokens == free.tokens[: free.tokens.index(token) + 1]
            assert (delta.finish_reason, delta.matched) == ("stop", token)

            model = engine._open()[0]
            model.eos = engine._open()[1].eos = frozenset([token])
            delta = await again()
            assert delta.tokens == free.tokens[: free.tokens.index(token) + 1]
            assert (delta.finish_reason, delta.matched, delta.eos) == ("stop", None, True)
            assert delta.text == decode(delta.tokens[:-1])
            goes_on = await again(ignore_eos=True)
            assert goes_on.tokens == free.tokens
            assert goes_on.text == decode(free.tokens)  # less the ends of sequence
            engine._open()[1].eos = frozenset([2])
            assert free.finish_reason == "length"
            assert free.text == decode(free.tokens)

    asyncio.run(main())


def test_context_length_ends_generations_and_refuses_prompts(make_model):
    async def main():
        async with opened(make_model("llama", max_position_embeddings=20)) as engine:
            assert engine.context_length == 20
            graph = ThreadGraph()
            node = await root(engine, graph, "abcdefghi")
            delta = await generate(engine, graph, node, Sampling(ignore_eos=True))
            assert (delta.finish_reason, len(node)) == ("length", 20)
            with pytest.raises(PromptError, match=r"20 tokens.* room for 20"):
                await generate(engine, graph, graph.add([Edge(0, 20)]), WARM)
            with pytest.raises(PromptError, match=r"31 tokens.* 20"):
                await engine.encode_prompt("x" * 30)

    asyncio.run(main())


def test_text_that_goes_on_keeps_the_space_that_a_beginning_loses():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "</s>", "▁a", "▁world", "s"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens(["</s>"])
    prompts = Prompts(PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>"), 10, eos=[1])
    assert prompts.decode([3, 4]) == "worlds"
    assert prompts.continuation([3, 4, 1]) == " worlds"
    assert prompts.continuation([]) == ""


@pytest.mark.parametrize(
    ("before", "piece", "stop", "left"),
    [
        ("", "abc", "b", "ab"),
        ("xa", "bc", "ab", "b"),
        ("xa", "bc", "abc", "bc"),
        ("ab", "c", "ab", "c"),  # a stop in front of the piece is no stop in it
        ("", "abc", "z", "abc"),
    ],
)
def test_a_text_is_cut_where_its_stop_string_ends(before, piece, stop, left):
    assert cut(before, piece, stop) == left
