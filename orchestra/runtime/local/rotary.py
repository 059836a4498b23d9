"""How a loaded model rotates queries and keys, so that a query can be read at another position than its own.

Rotary positions are relative: a query rotated for position p becomes the one for p + d when it is rotated by d more.
Nothing is known here of architectures: what a model does is found out by giving it the same tokens at two positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from orchestra.runtime.local.listen import SAME, Heard, difference

ANGLE_ERROR = 2.0**-22
"""How much further off a turned vector may be per position: angles are float32 products."""


@dataclass(frozen=True, slots=True, eq=False)
class Rotation:
    """How one layer rotates.

    Attributes:
        frequencies: radians per position of each pair of dimensions, float32 `[width / 2]`.
        interleaved: pairs are neighbours (2i, 2i + 1), as in Cohere and GLM; else they are (i, i + width / 2).
    """

    frequencies: Tensor
    interleaved: bool

    @property
    def width(self) -> int:
        """Leading dimensions of a head that rotate; those behind them carry no position."""
        return 2 * len(self.frequencies)

    def turn(self, x: Tensor, by: Tensor) -> Tensor:
        """See `Rotary.turn`."""
        angle = (by.unsqueeze(-1).float() * self.frequencies).unsqueeze(-2)
        cos, sin = angle.cos(), angle.sin()
        moving, still = x[..., : self.width].float(), x[..., self.width :]
        if self.interleaved:
            a, b = moving[..., ::2], moving[..., 1::2]
            turned = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
        else:
            a, b = moving.chunk(2, -1)
            turned = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
        return torch.cat((turned.to(x.dtype), still), -1)


@dataclass(frozen=True, slots=True, eq=False)
class Rotary:
    """The rotations of a model.

    Attributes:
        layers: one for each layer; None for layers without positions (NoPE).
    """

    layers: tuple[Rotation | None, ...]

    def turn(self, x: Tensor, by: Tensor, layer: int) -> Tensor:
        """Move rotated queries or keys by a number of positions.

        A pure rotation: a factor on rotated vectors (YaRN's attention scaling) is in `x` already, and stays.

        Args:
            x: `[..., heads, dim]`, rotated for some position.
            by: how much further on, may be negative; int64 `[...]`.
            layer: index of the layer.

        Returns:
            `x` as the model would have rotated it for that position plus `by`; computed in float32, in the type of `x`.
        """
        rotation = self.layers[layer]
        return x if rotation is None else rotation.turn(x, by)


def find_rotary(module: Any, heard: Heard) -> Rotary | None:
    """Learn, and so verify, how a model rotates.

    Args:
        module: the model.
        heard: what it asked of attention.

    Returns:
        None if some layer does anything else with positions than to rotate by a difference.
    """
    candidates: list[Rotation | None] = [None]
    for frequencies in _frequencies(module):
        for turns in (frequencies, -frequencies):  # a few models turn the other way round
            candidates += [Rotation(turns, False), Rotation(turns, True)]
    found: list[Rotation | None] = []
    for asked in heard.layers:
        errors = [max(_error(candidate, x, heard.by) for x in (asked.query, asked.key)) for candidate in candidates]
        least = min(errors)
        if not least <= 1:
            return None
        found.append(candidates[errors.index(least)])
    return Rotary(tuple(found))


def _frequencies(module: Any) -> list[Tensor]:
    """The different sets of inverse frequencies that a model holds."""
    found: list[Tensor] = []
    for name, buffer in module.named_buffers():
        if name.endswith("inv_freq") and not name.endswith("original_inv_freq"):
            frequencies = buffer.detach().float().clone()
            if not any(torch.equal(frequencies, known) for known in found):
                found.append(frequencies)
    return found


def _error(rotation: Rotation | None, x: Tensor, by: Tensor) -> float:
    """Of the worst token and head, in tolerances; `x` `[2, tokens, heads, dim]`: as it is, and further on."""
    before, after = x
    if rotation is not None and rotation.width > x.shape[-1]:
        return float("inf")
    turned = before if rotation is None else rotation.turn(before, by)
    return float((difference(turned, after) / (SAME[x.dtype] + ANGLE_ERROR * by.unsqueeze(-1))).max())
