"""A placeholder for sgl_kernel, whose wheel is CUDA only.

On the CPU, with the torch-native backends, SGLang imports names from it and never calls them.
"""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*_: object, **__: object) -> None:
        raise NotImplementedError(f"sgl_kernel.{name} is a CUDA kernel; this is a CPU installation")

    return missing
