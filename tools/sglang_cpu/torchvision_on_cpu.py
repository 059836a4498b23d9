"""Lets torchvision's CUDA wheel be imported beside a CPU torch.

Its compiled operators cannot load there, and importing it fails on two of them that it looks up by name. They are
declared, without an implementation, right before torchvision is first imported. Python runs this file at every start
(the `.pth` file that `make sglang-cpu` writes), so it does nothing but watch for that import.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from types import ModuleType

OPERATORS = ("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
             "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")  # fmt: skip


class _BeforeTorchvision(MetaPathFinder):
    library: object = None

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> None:
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            if not torch.version.cuda:
                library = torch.library.Library("torchvision", "DEF")
                for operator in OPERATORS:
                    library.define(operator)
                _BeforeTorchvision.library = library  # the operators live as long as it does


sys.meta_path.insert(0, _BeforeTorchvision())
