"""Tokens that a model learns in training: added to its tokenizer, with rows made of the words that they are made of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from orchestra.errors import UsageError, one_of
from orchestra.protocols import BLOCKS, PROTOCOLS


def tags_of(names: Iterable[str]) -> list[str]:
    """Tags in the order in which they are added; a name of a language stands for all of its tags.

    Raises:
        UsageError: a name is neither a language nor a tag.
    """
    tags: dict[str, None] = {}
    for name in names:
        if name in PROTOCOLS:
            tags |= dict.fromkeys(PROTOCOLS[name].tags)
        elif name[:1] == "<" and name[-1:] == ">":
            tags[name] = None
        else:
            raise UsageError(f"{one_of('language', name, PROTOCOLS)}; a tag has the form <Name>")
    return list(tags)


def default_tags(language: str) -> list[str]:
    """The tags of a language of parallel blocks; of others none: what they write is words."""
    return list(BLOCKS[language].tags) if language in BLOCKS else []


def add_tags(model: Any, tokenizer: Any, tags: Sequence[str], multiple: int = 0) -> list[int]:
    """Make each tag one token, and give the model rows for all tokens.

    A new row of the embedding (and of an untied output head) is the mean of the rows of the tokens of the tag's bare
    word: `<Goal>` begins as "Goal", `</Goal>` as "/Goal" (as Multiverse does, arXiv 2506.09991). Rows that only fill
    the vocabulary up are the mean of all.

    Args:
        model: a causal model of transformers; changed.
        tokenizer: of Hugging Face, whose vocabulary begins with the model's; changed. A tag that is one of its tokens
            already stays what it is.
        tags: what to add, as special tokens.
        multiple: the vocabulary is filled up to a multiple of this; 0: it is not.

    Returns:
        The ids of what is new: the tags that the tokenizer did not have, and tokens that it has and the model has not,
        whose rows begin as the mean of all.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    known = tokenizer.get_vocab()
    added = [tag for tag in dict.fromkeys(tags) if tag not in known]
    # Taken apart before they are added, since then they are found whole.
    pieces = {tag: tokenizer(tag.strip("<>"), add_special_tokens=False).input_ids for tag in added}
    pieces |= {token: [] for token, index in known.items() if index >= rows}
    tokenizer.add_tokens(added, special_tokens=True)
    vocabulary = tokenizer.get_vocab()
    size = max(rows, *(index + 1 for index in vocabulary.values()))
    size = -(-size // multiple) * multiple if multiple else size
    before = [module.weight.detach().clone() for module in token_tables(model)]
    if size > rows:
        model.resize_token_embeddings(size, mean_resizing=False)
    for module, old in zip(token_tables(model), before, strict=True):
        with torch.no_grad():
            module.weight[rows:] = old.mean(0)
            for token, parts in pieces.items():
                parts = [part for part in parts if part < rows and part != tokenizer.unk_token_id]
                module.weight[vocabulary[token]] = old[parts].mean(0) if parts else old.mean(0)
    return sorted(vocabulary[token] for token in pieces)


def token_tables(model: Any) -> list[Any]:
    """The modules with a row for each token: the embedding, and the output head if that has weights of its own."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    return [embedding] if head is None or head.weight is embedding.weight else [embedding, head]
