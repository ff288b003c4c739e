"""The engines: which versions of each are known to work, and which families each decodes.

Read without importing any of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from l2pd_adapters.families import DIFFUSION_GEMMA, FAMILIES, ModelFamily
from l2pd_adapters.sglang.compatibility import OPT_OUT as SGLANG_OPT_OUT
from l2pd_adapters.sglang.compatibility import SUPPORTED_SGLANG
from l2pd_adapters.versions import outside_range
from l2pd_adapters.vllm.compatibility import OPT_OUT as VLLM_OPT_OUT
from l2pd_adapters.vllm.compatibility import SUPPORTED_VLLM


@dataclass(frozen=True)
class Engine:
    """An engine that an adapter of this package runs on."""

    name: str
    """Of its distribution, too."""
    supported: tuple[str, str]
    """Versions: at least the first, below the second."""
    opt_out: str
    """The environment variable that lets every version pass."""
    families: tuple[str, ...]
    """Names of the families that it decodes."""

    @property
    def installed(self) -> str | None:
        """The version that is installed; None if none is."""
        try:
            return version(self.name)
        except PackageNotFoundError:
            return None

    def obstacle(self, family: ModelFamily) -> str:
        """Why this engine cannot decode the family here, in one line; empty if it can."""
        if family.name not in self.families:
            return f"{self.name} decodes {', '.join(self.families)}, not {family.name}"
        if self.installed is None:
            return f"{self.name} is not installed"
        return outside_range(self.name, self.supported, self.opt_out)


_ALL = tuple(family.name for family in (*FAMILIES, DIFFUSION_GEMMA))

TRANSFORMERS = Engine("transformers", ("5.11", "6"), "L2PD_ANY_TRANSFORMERS", _ALL)
"""Before 5.0 `is_causal = False` had no effect; 5.11 brought the streamer for diffusion models."""
VLLM = Engine("vllm", SUPPORTED_VLLM, VLLM_OPT_OUT, _ALL)
SGLANG = Engine(
    "sglang",
    SUPPORTED_SGLANG,
    SGLANG_OPT_OUT,
    tuple(family.name for family in FAMILIES if family.attention == "block_causal"),
)
ENGINES = (TRANSFORMERS, VLLM, SGLANG)
