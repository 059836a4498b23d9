"""Models of a known shape with random weights, built locally: speed does not depend on what a model has learned."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from orchestra.errors import UsageError, one_of
from orchestra.runtime.connect import EMBEDDED

SHAPES: dict[str, dict[str, Any]] = {
    "qwen2.5-0.5b-shape": {
        "vocab_size": 151_936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32_768,
        "rope_theta": 1_000_000.0,
        "tie_word_embeddings": True,
    },
    "tiny-shape": {
        "vocab_size": 384,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32_768,
        "tie_word_embeddings": True,
    },
}
"""Configurations of Qwen2 models."""


@contextmanager
def model_folder(name: str, dtype: str, layers: int | None = None) -> Iterator[str]:
    """The folder of a model; one of random weights is built, and removed afterwards.

    Args:
        name: `demo`, one of `SHAPES`, or a folder.
        dtype: of the weights that are built.
        layers: instead of the shape's own number.

    Raises:
        UsageError: no such model.
    """
    if name == "demo":
        yield str(EMBEDDED)
    elif name in SHAPES:
        with tempfile.TemporaryDirectory(prefix="orchestra-bench-") as folder:
            _build(Path(folder), SHAPES[name] | ({"num_hidden_layers": layers} if layers else {}), dtype)
            yield folder
    elif Path(name).is_dir():
        yield name
    else:
        raise UsageError(f"{one_of('model', name, ['demo', *SHAPES])}; or give a folder")


def token_bytes(folder: str, dtype: str) -> int:
    """Bytes of the keys and values of a token in one layer."""
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    heads: int = config.num_key_value_heads
    dim: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kind: torch.dtype = getattr(torch, dtype)
    return 2 * heads * dim * kind.itemsize


def _build(folder: Path, shape: dict[str, Any], dtype: str) -> None:
    import torch
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # type: ignore[import-untyped]  # it has no stubs

    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    config = transformers.Qwen2Config(**shape, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    module = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    module.save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<end>", *alphabet, *(f"w{i}" for i in range(1 + len(alphabet), config.vocab_size))]
    said = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    said.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    said.decoder = decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=said, eos_token="<end>", pad_token="<end>")
    tokenizer.save_pretrained(folder)
