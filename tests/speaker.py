"""A small Llama that speaks the languages of the strategies: trained here, on plays, until it knows them by heart.

A play is first rehearsed: its strategy runs on a scripted engine that has the model's tokenizer, so that the graph of
the rehearsal is, token by token, the one that an engine makes with a model that says the same. `flatten` makes training
rows of these graphs: the model is trained on exactly what it will be served, reuse joins included.

`python tests/speaker.py` trains one and says how it went.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from plays import PLAYS, TAGS, Play
from rehearsal import BOS, CONTEXT, EOS, PAD, VOCABULARY, rehearse, tokenizer
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

from orchestra.runtime.local.prompts import Prompts
from orchestra.training.flatten import Row, dense_mask, flatten

HIDDEN, LAYERS, HEADS, KEY_HEADS = 96, 2, 4, 2
MARGIN = 3.0
"""Least distance between the two largest logits of what it has learned: no engine's rounding makes it say more."""
SEED, RATE, EPOCHS, BATCH_TOKENS = 2, 2.5e-3, 300, 1200
KEPT_SECONDS = 7 * 24 * 3600.0


def rows_of(plays: Sequence[Play]) -> list[Row]:
    """The training rows of plays.

    Raises:
        ValueError: two of them go on differently after what is the same to a model.
    """
    decode = Prompts(tokenizer(), CONTEXT).decode
    rows = []
    known: dict[tuple[tuple[int, int], ...], tuple[int, str]] = {}
    for play in plays:
        rows.append(row := flatten(rehearse(play).graph))
        mask = dense_mask(row)
        for k in _learned(row):
            seen = sorted((row.positions[j], row.tokens[j]) for j in mask[k - 1].nonzero().flatten().tolist())
            token, other = known.setdefault(tuple(seen), (row.tokens[k], play.name))
            if token != row.tokens[k]:
                text = decode([token for _, token in seen])
                ways = " and ".join(repr(decode([way]) or "the end") for way in (token, row.tokens[k]))
                raise ValueError(f"plays {other} and {play.name}: after {text[-80:]!r} come both {ways}")
    return rows


def _learned(row: Row) -> list[int]:
    """Entries that are sampled, and so predicted by the entry before them."""
    return [k for k, weight in enumerate(row.weights) if weight]


@dataclass
class Batch:
    """Padded rows: the model takes `tokens`, `positions` and `mask`; entries `before` (flat) predict `targets`."""

    tokens: Tensor
    positions: Tensor
    mask: Tensor
    before: Tensor
    targets: Tensor


def batches(rows: Sequence[Row]) -> list[Batch]:
    """Rows of like length side by side, about `BATCH_TOKENS` tokens a batch."""
    groups: list[list[Row]] = []
    for row in sorted(rows, key=len, reverse=True):
        if not groups or (len(groups[-1]) + 1) * len(groups[-1][0]) > BATCH_TOKENS:
            groups.append([])
        groups[-1].append(row)
    return [_batch(group) for group in groups]


def _batch(rows: Sequence[Row]) -> Batch:
    width = len(rows[0])
    tokens, positions = (torch.zeros(len(rows), width, dtype=torch.int64) for _ in range(2))
    allowed = torch.eye(width, dtype=torch.bool).repeat(len(rows), 1, 1)  # padding sees itself, and nobody sees it
    before: list[int] = []
    targets: list[int] = []
    for i, row in enumerate(rows):
        size = len(row)
        tokens[i, :size], positions[i, :size] = torch.tensor(row.tokens), torch.tensor(row.positions)
        allowed[i, :size, :size] = dense_mask(row)
        before += [i * width + k - 1 for k in _learned(row)]
        targets += [row.tokens[k] for k in _learned(row)]
    mask = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min).unsqueeze(1)
    return Batch(tokens, positions, mask, torch.tensor(before), torch.tensor(targets))


def scores(model: Any, batch: Batch) -> Tensor:
    """Logits for the targets of a batch, `[targets, vocabulary]`."""
    hidden = model.model(
        input_ids=batch.tokens, position_ids=batch.positions, attention_mask=batch.mask, use_cache=False
    ).last_hidden_state
    logits: Tensor = model.lm_head(hidden.flatten(0, 1)[batch.before])
    return logits


@torch.no_grad()
def margin(model: Any, data: Sequence[Batch]) -> float:
    """Least distance from a target's logit to the largest other one; negative where another is likelier."""
    least = float("inf")
    for batch in data:
        logits, targets = scores(model, batch), batch.targets.unsqueeze(1)
        others = logits.scatter(1, targets, -torch.inf).amax(1)
        least = min(least, float((logits.gather(1, targets).squeeze(1) - others).min()))
    return least


def untrained() -> Any:
    """A Llama of our size."""
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=3 * HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_HEADS,
        max_position_embeddings=CONTEXT,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
        initializer_range=0.05,
        tie_word_embeddings=False,
    )
    config._attn_implementation = "sdpa"
    return transformers.LlamaForCausalLM(config)


@dataclass(frozen=True)
class Training:
    """How it went: `targets` are the sampled tokens that were learned, `loss` the last, with the handicap."""

    seconds: float
    epochs: int
    loss: float
    margin: float
    targets: int
    parameters: int


def train(rows: Sequence[Row]) -> tuple[Any, Training]:
    """A model that knows the rows by heart.

    Each target's logit carries a handicap of `MARGIN` in the loss, so that a right answer is not enough; the rate
    falls with the loss, or the last few tokens would be learned and forgotten in turns.

    Raises:
        RuntimeError: it does not learn them.
    """
    began = time.monotonic()
    data = batches(rows)
    targets = sum(len(batch.targets) for batch in data)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = untrained()
        optimizer = torch.optim.AdamW(model.parameters(), RATE, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
        loss, least = float("inf"), -float("inf")
        for epoch in range(1, EPOCHS + 1):
            optimizer.param_groups[0]["lr"] = RATE * min(epoch / 5, 1.0, max(0.1, (loss / 0.3) ** 0.5))
            total, right = 0.0, 0
            for k in torch.randperm(len(data)).tolist():
                logits = scores(model, data[k])
                handicap = MARGIN * one_hot(data[k].targets, VOCABULARY)
                step = cross_entropy(logits - handicap, data[k].targets)
                optimizer.zero_grad()
                step.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                total += step.item() * len(data[k].targets)
                right += int((logits.argmax(-1) == data[k].targets).sum())
            loss = total / targets
            if right == targets and (least := margin(model, data)) > MARGIN:
                size = sum(parameter.numel() for parameter in model.parameters())
                return model.eval(), Training(time.monotonic() - began, epoch, loss, least, targets, size)
    raise RuntimeError(f"after {EPOCHS} epochs {right} of {targets} tokens are right, the least margin is {least:.2f}")


# -- on disk -----------------------------------------------------------------------------------------------------------


def build(cache: Path, plays: Sequence[Play] = PLAYS, *, special: bool = False) -> Path:
    """The folder of a model that speaks `plays`: made if `cache` has none, safe if two sessions make it at once.

    Args:
        cache: where models are kept, each under a hash of all that goes into it.
        plays: what it speaks.
        special: whether its tags are special tokens; the weights are the same.
    """
    rows = rows_of(plays)
    folder = cache / _key(rows)
    if not folder.is_dir():
        model, _ = train(rows)
        ours = Path(tempfile.mkdtemp(prefix="making-", dir=cache))
        for name, tags in (("plain", False), ("special", True)):
            model.save_pretrained(ours / name)
            tokenizer(special=tags).save_pretrained(ours / name)
        try:
            ours.rename(folder)
        except OSError:  # another session was faster
            shutil.rmtree(ours)
        for other in cache.iterdir():  # of earlier plays, or left by a session that was killed
            with suppress(FileNotFoundError):
                if other.stat().st_mtime < time.time() - KEPT_SECONDS:
                    shutil.rmtree(other, ignore_errors=True)
    return folder / ("special" if special else "plain")


def _key(rows: Sequence[Row]) -> str:
    digest = hashlib.sha256(Path(__file__).read_bytes())
    digest.update(f"{torch.__version__} {transformers.__version__} {tokenizers.__version__} {TAGS}".encode())
    for row in rows:
        digest.update(f"{row.tokens} {row.positions} {row.weights}".encode() + dense_mask(row).numpy().tobytes())
    return digest.hexdigest()[:16]


if __name__ == "__main__":
    torch.set_num_threads(1)
    learned = rows_of(PLAYS)
    print({play.name: len(row) for play, row in zip(PLAYS, learned, strict=True)})
    print(train(learned)[1])
