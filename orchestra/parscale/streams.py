"""What ParScale adds to a backbone: learned keys and values for each stream, and what mixes the streams' hidden states.

All streams read the same tokens at the same positions with the same weights. They differ in a prefix of learned keys
and values per layer, which every token sees and which has no position. After the final norm a small network weighs the
streams token by token, and the weighted sum goes into the language-model head, once (arXiv:2505.10475, section 2).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True, slots=True, eq=False)
class StreamSet:
    """The parameters of P streams on one backbone.

    Attributes:
        keys, values: of the prefixes, not rotated, `[layers, streams, key heads, prefix tokens, dim]`.
        inner, outer: weight and bias of the network's two layers, `[hidden, hidden * streams]` and `[hidden]`,
            `[streams, hidden]` and `[streams]`.
        smoothing: part of the weight that is shared out evenly: `parscale_attn_smooth` of the configuration.
    """

    keys: Tensor
    values: Tensor
    inner: tuple[Tensor, Tensor]
    outer: tuple[Tensor, Tensor]
    smoothing: float

    @property
    def streams(self) -> int:
        """How many."""
        return self.keys.shape[1]

    @property
    def prefix(self) -> int:
        """Tokens of a prefix."""
        return self.keys.shape[3]

    def aggregate(self, hidden: Tensor) -> Tensor:
        """Mix the streams.

        Args:
            hidden: after the final norm, `[streams, ..., hidden]`.

        Returns:
            `[..., hidden]`.
        """
        return aggregate(hidden, self.inner, self.outer, self.smoothing)


def aggregate(hidden: Tensor, inner: tuple[Tensor, Tensor], outer: tuple[Tensor, Tensor], smoothing: float) -> Tensor:
    """See `StreamSet.aggregate`. The network's input has, for each hidden feature, its value in all streams."""
    streams = hidden.shape[0]
    side_by_side = hidden.movedim(0, -1)  # [..., hidden, streams]
    scores = functional.linear(functional.silu(functional.linear(side_by_side.flatten(-2), *inner)), *outer)
    weights = scores.float().softmax(-1) * (1 - smoothing) + smoothing / streams
    return (side_by_side * weights.unsqueeze(-2)).sum(-1).to(hidden.dtype)
