"""torchvision's wheel from PyPI on a torch for the CPU; never part of a release.

The wheel is built for CUDA and fails to register its operators there, but refers to them when it is
imported. A .pth file calls `install` when the interpreter starts, in an engine's subprocesses too,
so nothing heavy is imported before torchvision is asked for.
"""

import sys
from importlib.abc import MetaPathFinder

_libraries = []  # a schema lives as long as its library


def install():
    sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        """Of no module; torchvision is found by the next."""
        if name == "torchvision" and not _libraries:
            _declare_operators()


def _declare_operators():
    import torch

    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _libraries.append(library)
