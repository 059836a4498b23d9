"""What a benchmark ran on, what that machine can do at most, and how a time is taken on it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from orchestra.benchmarks.report import processor

_ENOUGH = 30.0


class Limits(NamedTuple):
    """The best that was measured.

    Attributes:
        read: bytes a second of one long streaming read.
        multiply: floating-point operations a second of one large matrix product.
    """

    read: float
    multiply: float

    def seconds(self, read: float, operations: float) -> float:
        """The least time in which so many bytes can be read and so many operations be done."""
        return max(read / self.read, operations / self.multiply)


def machine(device: torch.device | None = None) -> dict[str, Any]:
    """The processor (and graphics card), threads, load and versions."""
    found = processor() | {"threads": torch.get_num_threads(), "torch": torch.__version__}
    if device is not None and device.type == "cuda":
        found["device"] = torch.cuda.get_device_name(device)
    return found


def times(calls: Sequence[Callable[[], object]], device: torch.device, *, seconds: float, least: int) -> list[float]:
    """The shortest time of each call: what disturbs a measurement makes it longer, never shorter.

    The calls take turns, after one round that nobody counts, so that what else the machine does meets all of them.

    Args:
        calls: what to time.
        device: where they compute; CUDA is timed by events on the card.
        seconds: how long to go on for each call.
        least: rounds at least; fewer, but one, when they take more than `_ENOUGH` seconds.
    """
    best = [float("inf")] * len(calls)
    for call in calls:
        call()
    _wait(device)
    rounds, start = 0, time.perf_counter()
    while rounds < least or time.perf_counter() - start < seconds * len(calls):
        if rounds and time.perf_counter() - start > _ENOUGH:
            break
        for i, call in enumerate(calls):
            best[i] = min(best[i], _seconds(call, device))
        rounds += 1
    return best


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        before: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        after: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        before.record()
        call()
        after.record()
        after.synchronize()
        return float(before.elapsed_time(after)) / 1000
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def limits(dtype: torch.dtype, device: torch.device, *, seconds: float = 1.0) -> Limits:
    """Measure the machine: the sum of a long vector, and the product of two large matrices.

    The matrices are of this type or of float32, whichever is faster: processors without instructions for a half type
    multiply it in float32.
    """
    on_card = device.type == "cuda"
    numbers = torch.ones(1 << (29 if on_card else 26), device=device)  # float32; far more than any cache holds
    size = 8192 if on_card else 1024
    square = torch.randn(size, size, device=device)
    half = square.to(dtype)
    calls: list[Callable[[], Tensor]] = [numbers.sum, lambda: square @ square, lambda: half @ half]
    read, *multiply = times(calls, device, seconds=seconds, least=3)
    return Limits(numbers.nbytes / read, 2 * size**3 / min(multiply))
