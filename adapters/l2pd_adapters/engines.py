"""The engines: the supported versions of each, and the families that each decodes.

Does not import any engine.
"""

from __future__ import annotations

import ast
import functools
import inspect
import os
import pkgutil
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Any, TypeAlias

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from l2pd_adapters.families import DIFFUSION_GEMMA, FAMILIES, ModelFamily
from l2pd_plugins.errors import L2PDError

_DISTRIBUTION = "l2pd-plugins"

Signature: TypeAlias = tuple[str, ...] | list[tuple[str, ...]]
"""The parameters of a function, by their names; "..." at the end stands for any more. A list has
the forms that an adapter supports."""


@dataclass(frozen=True)
class Engine:
    """An engine that an adapter of this package runs on."""

    name: str
    """Name of the engine and of its distribution."""
    extra: str
    """The extra of this distribution that installs the engine in a supported version."""
    opt_out: str
    """The environment variable that disables the version check."""
    families: tuple[str, ...]
    """Names of the families that it decodes."""

    @property
    def installed(self) -> str | None:
        """The version that is installed; None if none is."""
        try:
            return version(self.name)
        except PackageNotFoundError:
            return None

    @property
    def supported(self) -> SpecifierSet:
        """The versions that the extra requires, from the metadata of this distribution.

        Without metadata (a source tree that is not installed) every version is supported.
        """
        try:
            lines = requires(_DISTRIBUTION) or []
        except PackageNotFoundError:
            lines = []
        found = SpecifierSet()
        for requirement in map(Requirement, lines):
            marker = requirement.marker
            if requirement.name == self.name and (
                marker is None or marker.evaluate({"extra": self.extra})
            ):
                found &= requirement.specifier
        return found

    @property
    def supported_range(self) -> str:
        """`supported` as text, the lower bound first: ``>=0.32,<0.34``."""
        return ",".join(sorted(map(str, self.supported), reverse=True))

    def obstacle(self, family: ModelFamily) -> str:
        """Why this engine cannot decode the family here, in one line; empty if it can."""
        if family.name not in self.families:
            return f"{self.name} decodes {', '.join(self.families)}, not {family.name}"
        if self.installed is None:
            return f"{self.name} is not installed"
        return self.version_problem()

    def version_problem(self) -> str:
        """Why the installed version is not supported, in one line; empty if it is."""
        installed = version(self.name)
        if _contains(self.supported, installed) or os.environ.get(self.opt_out) == "1":
            return ""
        return (
            f"{self.name} {installed} is outside the supported range {self.supported_range}; "
            f"{self.opt_out}=1 skips this check"
        )

    def require(self) -> None:
        """Raise L2PDError if the engine is not installed, or in a version that is not supported."""
        if self.installed is None:
            raise L2PDError(
                f'{self.name} is not installed: pip install "{_DISTRIBUTION}[{self.extra}]"'
            )
        problem = self.version_problem()
        if problem:
            raise L2PDError(problem)

    def incompatibility(
        self, signatures: Mapping[str, Signature], names: Mapping[str, Sequence[str]]
    ) -> str:
        """Why an adapter cannot run on the installed engine, in one line; empty if it can.

        In addition to the version, it looks for what the adapter uses: functions and classes with
        these parameters, and modules and classes with these names in them, each by its full name.
        """
        problem = self.version_problem()
        if problem:
            return problem
        found = _changed(signatures, names)
        if not found:
            return ""
        return (
            f"{self.name} {version(self.name)} does not have the interface of "
            f"{self.supported_range} that l2pd-plugins uses: {'; '.join(found)}"
        )


def _contains(supported: SpecifierSet, installed: str) -> bool:
    """Whether the version is supported. Pre-releases between the bounds are supported, those of a
    bound are not.
    """
    try:
        return supported.contains(Version(installed), prereleases=True)
    except InvalidVersion:
        return not list(supported)


def _changed(signatures: Mapping[str, Signature], names: Mapping[str, Sequence[str]]) -> list[str]:
    found = []
    for name, expected in signatures.items():
        try:
            parameters = tuple(inspect.signature(pkgutil.resolve_name(name)).parameters)
        except (ImportError, AttributeError) as error:
            found.append(f"{name} is missing ({error})")
            continue
        forms = [expected] if isinstance(expected, tuple) else expected
        if not any(_fits(parameters, form) for form in forms):
            shown = " or ".join(f"({', '.join(form)})" for form in forms)
            found.append(f"{name} takes ({', '.join(parameters)}), not {shown}")
    for name, wanted in names.items():
        try:
            owner = pkgutil.resolve_name(name)
        except (ImportError, AttributeError) as error:
            found.append(f"{name} is missing ({error})")
            continue
        found += [f"{name} has no {each}" for each in wanted if not _has(owner, each)]
    return found


def _fits(parameters: tuple[str, ...], form: tuple[str, ...]) -> bool:
    if form[-1:] == ("...",):
        return parameters[: len(form) - 1] == form[:-1]
    return parameters == form


def _has(owner: Any, name: str) -> bool:
    """Whether a module or an object has the name; of a class, whether its instances have it: as a
    field, or since one of its methods assigns it."""
    if hasattr(owner, name):
        return True
    if not isinstance(owner, type):
        return False
    return any(
        name in vars(each).get("__annotations__", ())
        or name in vars(each).get("__dataclass_fields__", ())
        or name in _assigned(each)
        for each in owner.__mro__
    )


@functools.cache
def _assigned(cls: type) -> frozenset[str]:
    """The fields of itself that a class assigns, by its source; none if there is no source."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    except (OSError, TypeError, SyntaxError):
        return frozenset()
    return frozenset(
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    )


_ALL = tuple(family.name for family in (*FAMILIES, DIFFUSION_GEMMA))

TRANSFORMERS = Engine("transformers", "hf", "L2PD_ANY_TRANSFORMERS", _ALL)
"""Before 5.0 `is_causal = False` had no effect; 5.11 added the streamer for diffusion models."""
VLLM = Engine("vllm", "vllm", "L2PD_ANY_VLLM", _ALL)
"""The interface for diffusion models is the same in all supported versions."""
SGLANG = Engine(
    "sglang",
    "sglang",
    "L2PD_ANY_SGLANG",
    tuple(family.name for family in FAMILIES if family.attention == "block_causal"),
)
"""0.5.22 added `get_algorithm_cls` and `validate_request`."""
ENGINES = (TRANSFORMERS, VLLM, SGLANG)
