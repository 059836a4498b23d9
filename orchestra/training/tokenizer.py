"""The word-level tokenizer of the embedded model, and of others with words of their own.

Every word is a token, newline too. A word start is marked with ``▁`` by the normalizer and turned back into a space by
the decoder, so decoding is a homomorphism (decode(a + b) == decode(a) + decode(b)) and text that the model wrote
encodes to the ids it came from. Words outside the vocabulary become ``<unk>``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")
PAD, BOS, EOS, UNK = range(4)
WORDS = (
    *("+", "-", "*", "/", "=", ",", "x", "hit", "miss", "none", "free"),
    *("numbers:", "target:", "step:", "left:", "children:", "spawn:", "join:", "answer:"),
    *map(str, range(100)),
)
MARK = "\u2581"


def vocabulary(words: Sequence[str] = WORDS) -> dict[str, int]:
    """Token strings (words carry the word-start mark) to ids."""
    tokens = (*SPECIAL, "\n", *(MARK + word for word in words))
    return {token: index for index, token in enumerate(tokens)}


IDS = {token.removeprefix(MARK): index for token, index in vocabulary().items()}
"""Words, newline and special tokens to ids."""


def encode(text: str) -> list[int]:
    """Ids of `text` without the begin token, as the built tokenizer gives them (and without loading it)."""
    return [IDS.get(word, UNK) for word in text.replace("\n", " \n ").split(" ") if word]


def build(context: int = 4096, words: Sequence[str] = WORDS) -> PreTrainedTokenizerFast:
    """The tokenizer as a Hugging Face object; `context` is the longest sequence of its model."""
    from tokenizers import (  # type: ignore[import-untyped]
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
    )
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel(vocabulary(words), unk_token="<unk>"))
    replace = normalizers.Replace
    tokenizer.normalizer = normalizers.Sequence(
        [
            # "3, 7, 8, 12 target:" is a list; "= 10 , 10 * 8" separates steps and keeps its comma.
            replace(Regex(r",(?=\s*\d+\s*(?:,\s*\d|target:))"), " "),
            replace(",", " , "),
            replace(Regex(r"[^\S\n]+"), " "),  # runs of blanks, tabs, carriage returns
            replace(Regex(r" ?\n ?"), "\n"),
            replace(Regex(r" \z"), ""),
            replace(Regex(r"(?:^ ?| )(?=\S)"), MARK),  # ^ matches after each newline too
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(rf"\n|{MARK}[^\n{MARK}]*"), behavior="isolated")
    tokenizer.decoder = decoders.Sequence([decoders.Replace(MARK, " "), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", BOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        model_max_length=context,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def save(folder: Path, context: int = 4096) -> None:
    """Write the tokenizer's files to `folder`."""
    build(context).save_pretrained(str(folder))
