"""Rows of thread graphs as batches that standard models of transformers take.

The mask of a row is arithmetic on four small tables (`Mask`): it is written out as a matrix for short rows, and handed
to FlexAttention as a function for long ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from orchestra.errors import UsageError
from orchestra.training.flatten import Row

IGNORED = -100
"""The label of what is not learned, as everywhere in transformers."""
FLEX_FROM = 4096
"""Entries from which `mask="auto"` asks for FlexAttention: a matrix of booleans has 16 million of them there."""


@dataclass(frozen=True)
class Mask:
    """Who sees whom, in a batch of packed rows. Nodes are numbered through; the last one of a sequence is its padding.

    Attributes:
        owners: the node of each entry, `[batch, entries]`.
        indices: its index there, `[batch, entries]`; -1 for echoes, which see as their token does but are not seen.
        limits: index of the last token of an entry's own node that it sees, `[batch, entries]`.
        reach: tokens of the second node that the first one's tokens see, `[batch, nodes, nodes]`.
        positions: `[batch, entries]`; of windows.
    """

    owners: Tensor
    indices: Tensor
    limits: Tensor
    reach: Tensor
    positions: Tensor

    def sees(self, batch: Any, query: Any, key: Any, window: int | None = None) -> Tensor:
        """Whether entries see entries, element by element; all arguments are integers or tensors of them."""
        mine, other, index = self.owners[batch, query], self.owners[batch, key], self.indices[batch, key]
        last = torch.where(mine == other, self.limits[batch, query], self.reach[batch, mine, other] - 1)
        seen = (index >= 0) & (index <= last)
        if window is not None:
            seen = seen & (self.positions[batch, query] - self.positions[batch, key] < window)
        return seen

    def dense(self, window: int | None = None) -> Tensor:
        """The matrices: booleans `[batch, 1, entries, entries]`, True where the first sees the second."""
        size = self.owners.shape[1]
        owners = self.owners.unsqueeze(1)
        # By entry and node first: what is done for each pair of entries is one look-up and one comparison.
        last = (self.reach - 1).int().take_along_dim(self.owners.unsqueeze(2), 1)
        last.scatter_(2, self.owners.unsqueeze(2), self.limits.int().unsqueeze(2))
        # Echoes are seen by nobody.
        indices = self.indices.int().masked_fill(self.indices < 0, torch.iinfo(torch.int32).max).unsqueeze(1)
        seen = indices <= last.gather(2, owners.expand(-1, size, -1))
        if window is not None:
            seen &= self.positions.unsqueeze(2) - self.positions.unsqueeze(1) < window
        return seen.unsqueeze(1)

    def flex(self, window: int | None = None, device: Any = None) -> Any:
        """The `BlockMask` of FlexAttention, made block by block and never written out."""
        from torch.nn.attention.flex_attention import create_block_mask

        moved = self if device is None else Mask(*(table.to(device) for table in vars(self).values()))

        def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return moved.sees(batch, query, key, window)

        size = self.owners.shape[1]
        return create_block_mask(sees, len(self.owners), None, size, size, device=str(moved.owners.device))


def mask_of(packs: Sequence[Sequence[Row]], size: int) -> Mask:
    """The mask of sequences of `size` entries, each of which holds some rows one after the other and then padding."""
    most = 1 + max(sum(len(row.views) for row in rows) for rows in packs)
    shape = (len(packs), size)
    owners, indices = torch.full(shape, most - 1), torch.zeros(shape, dtype=torch.int64)
    limits, positions = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    reach = torch.zeros(len(packs), most, most, dtype=torch.int64)
    for batch, rows in enumerate(packs):
        first, at = 0, 0
        for row in rows:
            ids = {node: first + i for i, node in enumerate(row.views)}
            edges = [
                (ids[node], ids[other], length)
                for node, view in row.views.items()
                for other, length in view.items()
                if other in ids
            ]
            if edges:
                mine, others, lengths = torch.tensor(edges).unbind(1)
                reach[batch, mine, others] = lengths
            here = slice(at, at + len(row))
            owners[batch, here] = torch.tensor([ids[node] for node in row.nodes])
            limits[batch, here] = torch.tensor(row.indices)
            indices[batch, here] = limits[batch, here].masked_fill(torch.tensor(row.echoes), -1)
            positions[batch, here] = torch.tensor(row.positions)
            first, at = first + len(ids), at + len(row)
    return Mask(owners, indices, limits, reach, positions)


def windows(config: Any) -> dict[str, int | None]:
    """The kinds of attention layer of a model with their windows: how far back a token sees, by position.

    A mask that is given takes the place of all that a model would make, so windows must be in it.
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    window, kinds = getattr(text, "sliding_window", None), getattr(text, "layer_types", None)
    if not getattr(text, "use_sliding_window", True):
        window = None
    if kinds is None:
        return {"": window}
    known: dict[str, int | None] = {"full_attention": None, "sliding_attention": window}
    if unknown := sorted(set(kinds) - set(known)):
        raise UsageError(f"rows of thread graphs cannot be trained on layers of kind {', '.join(unknown)}")
    return {kind: known[kind] for kind in dict.fromkeys(kinds)}


class GraphCollator:
    """Pads, masks and packs rows. Use it with any trainer: what it returns are arguments of a standard model.

    Args:
        pad: id of the padding token.
        mask: `dense`: a matrix; `flex`: FlexAttention's block mask, for models loaded with
            `attn_implementation="flex_attention"`; `auto`: flex for such a model on a GPU with `FLEX_FROM` entries or
            more, else dense. Ordinary sequences alone get no mask: causal attention is right for them, and faster.
        config: of the model: its windows, and what form of mask its attention takes.
        pack: put rows into sequences of at most so many entries, longest first; None: a sequence each.
        dtype: of the additive matrix that `eager` attention takes.
        weights: give `loss_weights`, too. False for trainers that hand all of a batch to the model (TRL's `SFTTrainer`,
            transformers' `Trainer`): they learn what weighs anything, and all of it alike.
    """

    def __init__(
        self,
        pad: int,
        *,
        mask: Literal["auto", "dense", "flex"] = "auto",
        config: Any = None,
        pack: int | None = None,
        dtype: torch.dtype = torch.float32,
        weights: bool = True,
    ) -> None:
        self.pad, self.mask, self.pack, self.dtype, self.weights = pad, mask, pack, dtype, weights
        self._attention = getattr(config, "_attn_implementation", None) or "sdpa"
        self._windows = {"": None} if config is None else windows(config)
        if mask == "flex" and self._attention != "flex_attention":
            raise UsageError(f"a flex mask is for attn_implementation='flex_attention', not {self._attention!r}")

    def __call__(self, rows: Iterable[Row | Mapping[str, Any]]) -> dict[str, Any]:
        """One batch.

        Returns:
            `input_ids`, `position_ids`, `labels` (`IGNORED` where nothing is learned), all `[sequences, entries]` of
            int64; `loss_weights`, of float32: the weight of predicting an entry from the one before it;
            `attention_mask`: `[sequences, 1, entries, entries]`, or by kind of layer, or a block mask; left out where
            all rows are ordinary sequences.
        """
        packs = self._packs([row if isinstance(row, Row) else Row.from_columns(row) for row in rows])
        size = max(sum(map(len, rows)) for rows in packs)
        ids = torch.full((len(packs), size), self.pad)
        # Padding goes on counting: positions that begin again would tell transformers that sequences are packed.
        positions = torch.arange(size).repeat(len(packs), 1)
        weights = torch.zeros(len(packs), size)
        for i, rows in enumerate(packs):
            here = slice(0, sum(map(len, rows)))
            ids[i, here] = torch.tensor([token for row in rows for token in row.tokens])
            positions[i, here] = torch.tensor([position for row in rows for position in row.positions])
            weights[i, here] = torch.tensor([weight for row in rows for weight in row.weights])
        batch = {
            "input_ids": ids,
            "position_ids": positions,
            "labels": ids.masked_fill(weights == 0, IGNORED),
        }
        if self.weights:
            batch["loss_weights"] = weights
        if any(len(rows) > 1 or not rows[0].plain for rows in packs):
            batch["attention_mask"] = self._masks(mask_of(packs, size))
        return batch

    def _packs(self, rows: Sequence[Row]) -> list[list[Row]]:
        """Which rows share a sequence: each goes where it leaves least room (best fit, longest first)."""
        if not rows:
            raise UsageError("an empty batch")
        if any(not len(row) for row in rows):
            raise UsageError("a row without tokens")
        if self.pack is None:
            return [[row] for row in rows]
        packs: list[list[Row]] = []
        room: list[int] = []
        for row in sorted(rows, key=len, reverse=True):
            if len(row) > self.pack:
                raise UsageError(f"a row of {len(row)} tokens does not fit into sequences of {self.pack}")
            fitting = [i for i, left in enumerate(room) if left >= len(row)]
            if fitting:
                best = min(fitting, key=room.__getitem__)
                packs[best].append(row)
                room[best] -= len(row)
            else:
                packs.append([row])
                room.append(self.pack - len(row))
        return packs

    def _masks(self, mask: Mask) -> Any:
        masks = {kind: self._form(mask, window) for kind, window in self._windows.items()}
        return masks[""] if "" in masks else masks["full_attention"] if set(masks) == {"full_attention"} else masks

    def _form(self, mask: Mask, window: int | None) -> Any:
        if self._attention == "flex_attention":
            long = self.mask == "auto" and torch.cuda.is_available() and mask.owners.shape[1] >= FLEX_FROM
            if self.mask == "flex" or long:
                return mask.flex(window, "cuda" if torch.cuda.is_available() else None)
        seen = mask.dense(window)
        if self._attention in ("eager", "flex_attention"):  # both add a matrix to the scores
            return torch.zeros(seen.shape, dtype=self.dtype).masked_fill(~seen, torch.finfo(self.dtype).min)
        return seen


def weighted_loss(logits: Tensor, labels: Tensor, weights: Tensor, total: Tensor | float | None = None) -> Tensor:
    """Cross-entropy of the ordinary label shift, weighted by token.

    Args:
        logits: `[sequences, entries, vocabulary]`.
        labels: `[sequences, entries]`.
        weights: of predicting an entry from the one before it, `[sequences, entries]`.
        total: what to divide the sum by; default: the sum of the weights.

    Returns:
        The loss in nats, a scalar.
    """
    kept = weights[:, 1:]
    learned = kept != 0
    # Only what is learned goes through the softmax: the rest of a row may be most of it.
    chosen = logits[:, :-1][learned]
    chosen = chosen.float() if chosen.dtype in (torch.bfloat16, torch.float16) else chosen
    losses = torch.nn.functional.cross_entropy(chosen, labels[:, 1:][learned], reduction="none")
    return (losses * kept[learned]).sum() / (kept.sum() if total is None else total)
