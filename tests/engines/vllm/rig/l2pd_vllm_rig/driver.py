"""The half of a Triton backend that knows the device: a CPU, by the interpreter."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase


class InterpretedDriver(DriverBase):
    @staticmethod
    def is_active():
        return os.environ["TRITON_INTERPRET"] == "1"

    def map_python_to_cpp_type(self, ty):
        raise NotImplementedError("Triton's kernels are interpreted here, never compiled")

    def get_current_target(self):
        return GPUTarget("cpu", 0, 0)

    def get_active_torch_device(self):
        return torch.device("cpu")

    def get_device_interface(self):
        return torch.cpu

    def get_benchmarker(self):
        from triton.testing import do_bench

        return do_bench
