"""What changes the logits of one generation before they are drawn from: penalties, bias and grammar."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from orchestra.runtime.local.grammar import Matching
from orchestra.runtime.sampling import Sampling

Floats = npt.NDArray[np.float32]


class Steering:
    """The state of one generation. It belongs to its job, so it knows nothing of the batch.

    Args:
        sampling: with the penalties and the bias.
        matching: where the generation is in its grammar, if it has one.
    """

    def __init__(self, sampling: Sampling, matching: Matching | None = None) -> None:
        self.matching = matching
        self._frequency, self._presence = np.float32(sampling.frequency_penalty), np.float32(sampling.presence_penalty)
        self._repetition = np.float32(sampling.repetition_penalty)
        self._penalised = bool(self._frequency or self._presence or self._repetition != 1)
        self._counts: dict[int, int] = {}
        self._bias_ids = np.array([token for token, _ in sampling.logit_bias], np.int64)
        self._bias = np.array([bias for _, bias in sampling.logit_bias], np.float32)

    def apply(self, logits: Floats) -> Floats:
        """The logits to draw from, `[vocabulary]`; a new array. Minus infinity is what must not be drawn.

        The order is SGLang's: additive penalties, then the repetition penalty, then the bias.
        """
        logits = logits.copy()
        if self._counts:
            ids = np.fromiter(self._counts, np.int64, len(self._counts))
            times = np.fromiter(self._counts.values(), np.float32, len(self._counts))
            seen = logits[ids] - self._frequency * times - self._presence
            logits[ids] = np.where(seen < 0, seen * self._repetition, seen / self._repetition)
        if len(self._bias_ids):
            logits[self._bias_ids] += self._bias
        if self.matching is not None:
            logits[~self.matching.allowed] = -np.inf
        return logits

    def accept(self, token: int) -> bool:
        """Take a drawn token; returns whether the grammar is satisfied and allows nothing more."""
        if self._penalised:
            self._counts[token] = self._counts.get(token, 0) + 1
        if self.matching is None:
            return False
        self.matching.accept(token)
        return self.matching.finished

    def stuck(self) -> str:
        """Why no token is left to be drawn, for the error message."""
        if self.matching is None:
            return "logit_bias bans every token"
        return self.matching.trouble or "the grammar allows no token that the model has and logit_bias leaves"
