"""The tag languages that models speak: parse, render, validate. One definition each, used by all parts."""

from __future__ import annotations

from typing import Any

from orchestra.protocols.apr import APR
from orchestra.protocols.async_think import ASYNC_THINK
from orchestra.protocols.base import Branch, Fork, Problem, Protocol, Reader, transcript
from orchestra.protocols.blocks import Blocks
from orchestra.protocols.document import Block, Document, Path
from orchestra.protocols.languages import (
    MULTIVERSE,
    MULTIVERSE_ENGINE,
    NPR,
    PARA_THINKER,
    PARALLEL_R1,
    THREAD_WEAVER,
)

BLOCKS: dict[str, Blocks] = {
    language.name: language
    for language in (MULTIVERSE, MULTIVERSE_ENGINE, THREAD_WEAVER, NPR, PARALLEL_R1, PARA_THINKER)
}
"""The languages of parallel blocks by name."""

PROTOCOLS: dict[str, Protocol[Any]] = {**BLOCKS, APR.name: APR, ASYNC_THINK.name: ASYNC_THINK}
"""All languages by name."""

__all__ = [
    "APR",
    "ASYNC_THINK",
    "BLOCKS",
    "MULTIVERSE",
    "MULTIVERSE_ENGINE",
    "NPR",
    "PARALLEL_R1",
    "PARA_THINKER",
    "PROTOCOLS",
    "THREAD_WEAVER",
    "Block",
    "Blocks",
    "Branch",
    "Document",
    "Fork",
    "Path",
    "Problem",
    "Protocol",
    "Reader",
    "transcript",
]
