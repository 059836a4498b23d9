"""New tokens: which, where, and what their rows begin as, against means taken by hand."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

from conftest import byte_tokenizer  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

from orchestra.errors import UsageError  # noqa: E402
from orchestra.protocols import MULTIVERSE  # noqa: E402
from orchestra.training.vocabulary import add_tags, default_tags, tags_of  # noqa: E402


def model_of(rows: int, *, tied: bool) -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=rows,
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            tie_word_embeddings=tied,
        )
    )


def tables(model: Any, tied: bool) -> list[Any]:
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert (embedding is head) == tied
    return [embedding.detach().clone()] + ([] if tied else [head.detach().clone()])


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("spare", [0, 40])
def test_a_new_row_is_the_mean_of_the_rows_of_the_tags_words(tied: bool, spare: int) -> None:
    tokenizer = byte_tokenizer(merges=False)
    known = len(tokenizer)
    model = model_of(known + spare, tied=tied)
    before = tables(model, tied)
    new = add_tags(model, tokenizer, ["<Goal>", "</Goal>"])
    assert new == [known, known + 1] == tokenizer.convert_tokens_to_ids(["<Goal>", "</Goal>"])
    assert tokenizer("<Goal>", add_special_tokens=False).input_ids == new[:1]
    letters = {letter: tokenizer(letter, add_special_tokens=False).input_ids[0] for letter in "/Goal"}
    for old, now in zip(before, tables(model, tied), strict=True):
        assert len(now) == max(known + spare, known + 2)
        by_hand = [sum(old[letters[letter]] for letter in word) / len(word) for word in ("Goal", "/Goal")]
        torch.testing.assert_close(now[new], torch.stack(by_hand))
        torch.testing.assert_close(now[:known], old[:known], rtol=0, atol=0)


def test_the_vocabulary_is_filled_up_with_the_mean_of_all() -> None:
    tokenizer = byte_tokenizer(merges=False)
    model = model_of(len(tokenizer), tied=False)
    (before, _) = tables(model, False)
    add_tags(model, tokenizer, default_tags("multiverse"), 64)
    now, head = tables(model, False)
    assert len(now) == len(head) == model.config.vocab_size == -(-len(tokenizer) // 64) * 64
    torch.testing.assert_close(now[len(tokenizer) :], before.mean(0).expand(len(now) - len(tokenizer), -1))


def test_a_tag_that_the_tokenizer_has_keeps_its_row() -> None:
    tokenizer = byte_tokenizer(merges=False, tags=True)
    known = tokenizer.get_vocab()
    model = model_of(len(tokenizer), tied=False)
    before = tables(model, False)
    new = add_tags(model, tokenizer, MULTIVERSE.tags)
    assert len(new) == len(set(MULTIVERSE.tags) - set(known)) < len(MULTIVERSE.tags)
    for old, now in zip(before, tables(model, False), strict=True):
        torch.testing.assert_close(now[: len(known)], old, rtol=0, atol=0)


def test_a_model_grows_to_its_tokenizer() -> None:
    tokenizer = byte_tokenizer(merges=False)
    model = model_of(len(tokenizer) - 3, tied=True)
    (before,) = tables(model, True)
    assert add_tags(model, tokenizer, []) == list(range(len(tokenizer) - 3, len(tokenizer)))
    torch.testing.assert_close(tables(model, True)[0][-3:], before.mean(0).expand(3, -1))


def test_languages_stand_for_their_tags() -> None:
    assert tags_of(["<Think>", "multiverse"]) == ["<Think>", *MULTIVERSE.tags]
    assert default_tags("plain") == default_tags("apr") == []
    with pytest.raises(UsageError, match="did you mean 'multiverse'"):
        tags_of(["multivers"])


def test_what_fine_tuners_take_is_found_where_the_collator_is() -> None:
    pytest.importorskip("trl")
    from orchestra import training
    from orchestra.training import rejection, trainer

    assert training.add_tags is add_tags
    assert training.from_run is rejection.from_run
    assert training.WeightedSFTTrainer is trainer.WeightedSFTTrainer
