"""From text and messages to token ids, and what is refused on the way."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import Any

from orchestra.errors import PromptError
from orchestra.graph import Span
from orchestra.runtime.engine import Prompt

OTHERS = "other engines: local:PATH_OR_ID, sglang://HOST:PORT, openai://HOST:PORT/v1?model=NAME"


ANCHOR = "a"
"""A text for others to stand after."""


class Prompts:
    """Encodes for one model.

    Args:
        tokenizer: a Hugging Face tokenizer.
        context: most tokens that the model takes.
        hint: appended to the error for words outside the vocabulary.
        eos: ids that end a sequence; they have no text.
    """

    def __init__(self, tokenizer: Any, context: int, hint: str = "", eos: Iterable[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._context = context
        self._hint = f" ({hint})" if hint else ""
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        self._backend = backend if hasattr(backend, "decode") else None
        self.eos = frozenset(eos)

    def decode(self, ids: list[int], *, skip_special: bool = True) -> str:
        """Text of ids, nothing cleaned up; ends of sequence have none, special tokens if they are not skipped."""
        if not self.eos.isdisjoint(ids):
            ids = [token for token in ids if token not in self.eos]
        return self.decode_all(ids, skip_special=skip_special)

    def decode_all(self, ids: list[int], *, skip_special: bool = False) -> str:
        """Text of ids, ends of sequence included."""
        if self._backend is not None:  # the Python layer above it costs ten times as much
            text: str = self._backend.decode(ids, skip_special_tokens=skip_special)
        else:
            text = self._tokenizer.decode(ids, skip_special_tokens=skip_special, clean_up_tokenization_spaces=False)
        return text

    def continuation(self, ids: list[int], *, skip_special: bool = True) -> str:
        """Text of ids as it reads after other text: some tokenizers drop a space where a text begins."""
        anchor = self._anchor
        whole = self.decode([*anchor, *ids], skip_special=skip_special)
        return whole[len(self.decode(anchor, skip_special=skip_special)) :]

    @cached_property
    def _anchor(self) -> list[int]:
        return self._ids(ANCHOR, False)

    def prompt(self, prompt: Prompt, **template: Any) -> Span:
        """A prompt; see `Engine.encode_prompt`."""
        if isinstance(prompt, str):
            text, ids = prompt, self._ids(prompt, True)
            self._refuse_empty(text)
        else:
            messages = [dict(message) for message in prompt]
            if not any(str(message.get("content") or "").strip() for message in messages):
                raise PromptError("the prompt is empty: no message has any text")
            if getattr(self._tokenizer, "chat_template", None):
                try:
                    options = {"add_generation_prompt": True, **template}
                    text = self._tokenizer.apply_chat_template(messages, tokenize=False, **options)
                except Exception as error:
                    raise PromptError(f"the model's chat template refuses these messages: {error}") from error
                ids = self._ids(text, False)  # the template writes its own special tokens
            elif len(messages) == 1 and messages[0].get("role") == "user":
                text = str(messages[0]["content"])
                ids = self._ids(text, True)
            else:
                raise PromptError(
                    "this model has no chat template: give it text or a single user message, "
                    f"not {len(messages)} message(s) with roles {', '.join(str(m.get('role')) for m in messages)}"
                )
        self._refuse_unknown(text, ids)
        if len(ids) > self._context:
            raise PromptError(f"the prompt has {len(ids)} tokens; the model's context is {self._context}")
        return Span("prompt", ids, len(ids), text)

    def forced(self, text: str) -> Span:
        """Text that the orchestrator writes; see `Engine.encode`."""
        ids = self._ids(text, False) if text else []
        self._refuse_unknown(text, ids)
        return Span("forced", ids, len(ids), text)

    def _ids(self, text: str, special: bool) -> list[int]:
        # Too long a text is an error of ours, in one line; the library's warning would be another.
        ids: list[int] = self._tokenizer(text, add_special_tokens=special, verbose=False).input_ids
        return ids

    def _refuse_empty(self, text: str) -> None:
        if not text.strip():
            raise PromptError("the prompt is empty")

    def _refuse_unknown(self, text: str, ids: list[int]) -> None:
        unknown = self._tokenizer.unk_token_id
        if unknown is None or unknown not in ids:
            return
        words = [word for word in dict.fromkeys(text.split()) if unknown in self._ids(word, False)]
        shown = ", ".join(repr(word) for word in words[:5]) or "some characters"
        more = f" and {len(words) - 5} more" if len(words) > 5 else ""
        raise PromptError(f"outside this model's vocabulary: {shown}{more}{self._hint}; {OTHERS}")
