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
from typing import Any, Protocol, TypeAlias

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
        found = changed(signatures, names)
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


class Interface(Protocol):
    """Where functions, classes and modules are looked up: what is installed, or a source."""

    def find(self, name: str) -> Any:
        """What has this full name. Raises ImportError or AttributeError if nothing has it."""
        ...

    def parameters(self, found: Any) -> tuple[str, ...]:
        """Names of the parameters of a function, or of a class, without `self`. Raises as `find`
        if it is neither."""
        ...

    def has(self, found: Any, name: str) -> bool:
        """Whether a module or an object has the name; of a class, whether its instances have it."""
        ...


class Imported:
    """What is installed, by importing it."""

    find = staticmethod(pkgutil.resolve_name)

    def parameters(self, found: Any) -> tuple[str, ...]:
        try:
            return tuple(inspect.signature(found).parameters)
        except (TypeError, ValueError) as error:
            raise AttributeError(str(error)) from error

    def has(self, found: Any, name: str) -> bool:
        """An instance also has a name as a field, or since a method of its class assigns it."""
        if hasattr(found, name):
            return True
        if not isinstance(found, type):
            return False
        return any(
            name in vars(each).get("__annotations__", ())
            or name in vars(each).get("__dataclass_fields__", ())
            or name in _assigned(each)
            for each in found.__mro__
        )


def changed(
    signatures: Mapping[str, Signature],
    names: Mapping[str, Sequence[str]],
    interface: Interface | None = None,
) -> list[str]:
    """What an adapter uses and an engine does not have, a line for each; see `incompatibility`.

    interface: where to look; by default what is installed.
    """
    interface = interface or Imported()
    lines = []
    for name, expected in signatures.items():
        try:
            parameters = interface.parameters(interface.find(name))
        except (ImportError, AttributeError) as error:
            lines.append(f"{name} is missing ({error})")
            continue
        forms = [expected] if isinstance(expected, tuple) else expected
        if not any(_fits(parameters, form) for form in forms):
            shown = " or ".join(f"({', '.join(form)})" for form in forms)
            lines.append(f"{name} takes ({', '.join(parameters)}), not {shown}")
    for name, wanted in names.items():
        try:
            owner = interface.find(name)
        except (ImportError, AttributeError) as error:
            lines.append(f"{name} is missing ({error})")
            continue
        lines += [f"{name} has no {each}" for each in wanted if not interface.has(owner, each)]
    return lines


def _fits(parameters: tuple[str, ...], form: tuple[str, ...]) -> bool:
    if form[-1:] == ("...",):
        return parameters[: len(form) - 1] == form[:-1]
    return parameters == form


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
