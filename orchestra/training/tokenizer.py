"""The word-level tokenizer of the embedded model, and of others with words of their own.

Every word is a token, newline too; so is every tag of the languages of parallel thinking. A word start is marked with
``▁`` by the normalizer and turned back into a space by the decoder, so decoding is a homomorphism (decode(a + b) ==
decode(a) + decode(b)) and text that the model wrote encodes to the ids it came from. Words outside the vocabulary
become ``<unk>``. Tags are added tokens without that mark: they need no space around them.
"""

from __future__ import annotations

import re
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
LABELS = 16
"""Outlines, drafts and paths have labels up to this."""
WORKERS = 8
"""Asynchronous thinking has tags for so many workers."""
LANGUAGE_WORDS = ("drafts:", *(f"{label}:" for label in range(1, LABELS + 1)))
"""What the multilingual model has besides `WORDS`."""
TAGS = (
    *(f"<{end}{name}>" for name in ("Parallel", "Goal", "Outlines", "Outline") for end in ("", "/")),
    *(f"<{end}{name}>" for name in ("Path", "Thread", "Conclusion", "RETURN") for end in ("", "/")),
    *(
        tag
        for i in range(1, WORKERS + 1)
        for tag in (f"<FORK-{i}>", f"</FORK-{i}>", f"<JOIN-{i}>", f"<RETURN-{i}>", f"</RETURN-{i}>")
    ),
)
"""Tags of Multiverse, ThreadWeaver and AsyncThink; the multilingual model has a token for each."""
MARK = "\u2581"
_PIECE = re.compile("|".join(map(re.escape, TAGS)) + r"|\n|[^\s<]+|<")


def vocabulary(words: Sequence[str] = WORDS, tags: Sequence[str] = ()) -> dict[str, int]:
    """Token strings (words carry the word-start mark) to ids."""
    tokens = (*SPECIAL, "\n", *(MARK + word for word in words), *tags)
    return {token: index for index, token in enumerate(tokens)}


IDS = {token.removeprefix(MARK): index for token, index in vocabulary((*WORDS, *LANGUAGE_WORDS), TAGS).items()}
"""Words, newline, special tokens and tags to ids: those of the multilingual model, which go on after `WORDS`."""


def encode(text: str) -> list[int]:
    """Ids of `text` without the begin token, as the built tokenizer gives them (and without loading it)."""
    return [IDS.get(piece, UNK) for piece in _PIECE.findall(text)]


def build(context: int = 4096, words: Sequence[str] = WORDS, tags: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """The tokenizer as a Hugging Face object; `context` is the longest sequence of its model."""
    from tokenizers import (  # type: ignore[import-untyped]
        AddedToken,
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
    # Not special: what is decoded holds them. Not normalized: they are cut out before the text around them is marked.
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in tags])
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


def multilingual(context: int = 4096) -> PreTrainedTokenizerFast:
    """The tokenizer of the multilingual model: old words keep their ids."""
    return build(context, (*WORDS, *LANGUAGE_WORDS), TAGS)


def save(folder: Path, context: int = 4096) -> None:
    """Write the tokenizer's files to `folder`."""
    build(context).save_pretrained(str(folder))
