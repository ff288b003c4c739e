"""What SGLang imports without needing it on a CPU: CUDA kernels.

A .pth file calls `install` when the interpreter starts, in SGLang's subprocesses too, so nothing
heavy is imported before SGLang asks for it.
"""

import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_loader
from types import ModuleType


def install():
    sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    def find_spec(self, name, path=None, target=None) -> ModuleSpec | None:
        if name.partition(".")[0] == "sgl_kernel":
            return spec_from_loader(name, _KernelLoader(), is_package=True)
        return None


class _KernelLoader(Loader):
    def create_module(self, spec):
        return _Kernels(spec.name)

    def exec_module(self, module):
        pass


class _Kernels(ModuleType):
    """Has every name."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return _Missing(f"{self.__name__}.{name}")


class _Missing:
    """A kernel, or a namespace of them; raises when called."""

    def __init__(self, name):
        self._name = name

    def __getattr__(self, name):
        return _Missing(f"{self._name}.{name}")

    def __call__(self, *args, **kwargs):
        raise RuntimeError(f"{self._name} is a CUDA kernel; this machine has none")
