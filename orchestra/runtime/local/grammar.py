"""Constrained decoding: which tokens may come next so that a JSON schema or a regular expression is satisfied.

llguidance decides. A token is allowed when the text with it can still be completed, whatever its tokenisation: the
library's own preference for one tokenisation of forced text is off (`no_forcing`), because it would change the
distribution.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from orchestra.errors import UsageError
from orchestra.extras import require
from orchestra.runtime.local.prompts import Prompts
from orchestra.runtime.sampling import Sampling

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

Bools = npt.NDArray[np.bool_]

_HEAD = '%llguidance {"no_forcing": true}\n'
_WHITE_SPACE = {"whitespace_pattern": r"[ \n\t]+"}  # not carriage returns
_COMPILED = 128  # grammars kept


class Matching:
    """How far one generation has come in its grammar.

    Attributes:
        allowed: the tokens that may come next, `[vocabulary]`.
        finished: nothing more may follow, and the grammar is satisfied.
    """

    def __init__(self, matcher: LLMatcher, ends: Sequence[int], vocabulary: int, *, may_end: bool = True) -> None:
        self._matcher, self._ends, self._may_end = matcher, list(ends), may_end
        self.allowed: Bools = np.zeros(vocabulary, np.bool_)
        self.finished = False
        self._look()

    def accept(self, token: int) -> None:
        """Take an allowed token."""
        self._matcher.consume_token(token)
        self._look()

    @property
    def trouble(self) -> str:
        """Why the library gave up; empty if it has not."""
        return _line(self._matcher.get_error()) if self._matcher.is_error() else ""

    def fresh(self, *, may_end: bool) -> Matching:
        """A copy of one at its beginning, for a generation of its own."""
        return Matching(self._matcher.deep_copy(), self._ends, len(self.allowed), may_end=may_end)

    def _look(self) -> None:
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        found = np.unpackbits(bits, bitorder="little")[: len(self.allowed)].astype(np.bool_)
        if self._matcher.is_error():
            found[:] = False
        self.allowed = np.zeros_like(self.allowed)  # not in place: the last one may be in use
        self.allowed[: len(found)] = found
        ending = self.allowed[self._ends].copy()
        self.allowed[self._ends] = False
        self.finished = self._matcher.is_accepting() and not self.allowed.any()
        if self._may_end:
            self.allowed[self._ends] = ending


class Grammars:
    """The grammars of one model: each is compiled once, and copied for every generation that follows it.

    Args:
        tokenizer: a Hugging Face tokenizer.
        prompts: decodes its ids.
        vocabulary: number of the model's logits.
        eos: ids that end a sequence.

    Raises:
        MissingExtraError: the library is not installed.
    """

    def __init__(self, tokenizer: Any, prompts: Prompts, vocabulary: int, eos: Iterable[int]) -> None:
        require("llguidance", what="a grammar (json_schema, regex)", extra="local")
        self._vocabulary = vocabulary
        self._tokens = _library_tokenizer(tokenizer, prompts, vocabulary, sorted(eos))
        self._compiled = lru_cache(_COMPILED)(self._compile)

    def start(self, sampling: Sampling) -> Matching | None:
        """The grammar of a generation that begins now; None without one.

        Raises:
            UsageError: the library refuses it, or the model has no token that could begin it.
        """
        if sampling.json_schema is not None:
            begun = self._compiled("json_schema", sampling.json_schema)
        elif sampling.regex is not None:
            begun = self._compiled("regex", sampling.regex)
        else:
            return None
        return begun.fresh(may_end=not sampling.ignore_eos)

    def _compile(self, kind: str, text: str) -> Matching:
        from llguidance import LLMatcher, regex_to_lark

        lark = f"start: /{regex_to_lark(text)}/" if kind == "regex" else f"start: %json {_with_options(text)}"
        matcher = LLMatcher(self._tokens, LLMatcher.grammar_from_lark(_HEAD + lark), log_level=0)
        begun = Matching(matcher, self._tokens.eos_tokens, self._vocabulary)
        shown = text if len(text) <= 60 else text[:57] + "..."
        if begun.finished:
            raise UsageError(f"only the empty text satisfies the {kind} {shown}")
        if not begun.allowed.any():
            trouble = begun.trouble
            if trouble and not trouble.startswith("NoExtension"):
                raise UsageError(f"{kind} {shown} is refused: {trouble}")
            raise UsageError(f"no token of this model can begin what satisfies the {kind} {shown}")
        return begun


def _library_tokenizer(tokenizer: Any, prompts: Prompts, vocabulary: int, eos: list[int]) -> LLTokenizer:
    """The tokenizer in the library's form."""
    from llguidance import LLTokenizer, TokenizerWrapper
    from llguidance.hf import from_tokenizer

    size = max(vocabulary, len(tokenizer))
    try:
        return from_tokenizer(tokenizer, n_vocab=size, eos_token=eos or None)
    except ValueError:
        # Not byte-level, nor with bytes to fall back on: what each token says is all there is to know.
        return LLTokenizer(TokenizerWrapper(_Texts(tokenizer, prompts, eos)), n_vocab=size, eos_token=eos or None)


class _Texts:
    """What `TokenizerWrapper` wants to know of a tokenizer: the text of each token, as it reads after other text."""

    def __init__(self, tokenizer: Any, prompts: Prompts, eos: list[int]) -> None:
        texts = [prompts.continuation([token], skip_special=False) for token in range(len(tokenizer))]
        part = {token for token, text in enumerate(texts) if not text or "\ufffd" in text}  # of a character
        self.tokens = [text.encode() or b"\xff" for text in texts]
        self.special_token_ids = sorted({*part, *tokenizer.all_special_ids, *eos})
        self.eos_token_id = eos[0] if eos else tokenizer.eos_token_id
        self.bos_token_id = None

    def __call__(self, text: str | bytes) -> list[int]:
        return []  # for forced text only, and nothing is forced


def _with_options(schema: str) -> str:
    """A schema with white space as SGLang's default library has it, unless it says otherwise itself."""
    found = json.loads(schema)
    return json.dumps({"x-guidance": _WHITE_SPACE} | found) if isinstance(found, dict) else schema


def _line(error: str) -> str:
    """The telling line of an error."""
    lines = [line.strip() for line in error.splitlines() if line.strip()]
    told = next(
        (line.removeprefix("error: ") for line in lines if line.startswith("error: ")), lines[0] if lines else ""
    )
    return told[:200]
