"""The half of a Triton backend that compiles; the interpreter never asks it."""

from triton.backends.compiler import BaseBackend


class InterpretedBackend(BaseBackend):
    @staticmethod
    def supports_target(target):
        return target.backend == "cpu"

    def hash(self):
        return "interpreted"

    def parse_options(self, options):
        raise NotImplementedError("Triton's kernels are interpreted here, never compiled")

    def add_stages(self, stages, options, language):
        raise NotImplementedError("Triton's kernels are interpreted here, never compiled")

    def load_dialects(self, context):
        pass

    def get_module_map(self):
        return {}
