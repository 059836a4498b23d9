"""A tokenizer for generated texts: the words of a list, and single characters for all else.

Any printable ASCII text and line break encodes without loss, and decoding is a homomorphism. Digits are tokens of their
own, as in Llama 2's tokenizer, so lengths are close to those that were published for APR.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from orchestra.protocols import MULTIVERSE, THREAD_WEAVER
from orchestra.training.tokenizer import SPECIAL

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

APR_WORDS = (
    *("Moving", "to", "Node", "Current", "State", "Operations", "Exploring", "Operation", "Resulting", "Numbers"),
    *("Generated", "unequal", "equal", "No", "Solution", "solution", "found", "Goal", "Reached", "Calling", "Sub"),
    *("Searches", "Search", "Start", "End", "Exit", "at", "in", "level", "Call", "Budget"),
)
SUM_WORDS = ("Compute", "The", "answer", "is", "boxed")
TAGS = tuple(dict.fromkeys((*MULTIVERSE.tags, *THREAD_WEAVER.tags)))


def build(
    context: int = 4096, words: Sequence[str] = (*APR_WORDS, *SUM_WORDS), tags: Sequence[str] = TAGS
) -> PreTrainedTokenizerFast:
    """The tokenizer as a Hugging Face object.

    Args:
        context: longest sequence of its model.
        words: tokens of their own, with and without a space before them.
        tags: added tokens.
    """
    from tokenizers import (  # type: ignore[import-untyped]
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        pre_tokenizers,
        processors,
    )
    from transformers import PreTrainedTokenizerFast

    characters = ["\n", *map(chr, range(32, 127))]
    pieces = dict.fromkeys([*SPECIAL, *characters, *words, *(f" {word}" for word in words)])
    tokenizer = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token="<unk>"))
    known = "|".join(sorted(map(re.escape, words), key=len, reverse=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(
        Regex(rf" ?\b(?:{known})\b|\n|." if words else r"\n|."), behavior="isolated"
    )
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", SPECIAL.index("<bos>"))]
    )
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
