"""A package's functions, classes and modules, read from its source without importing it.

Implements `l2pd_adapters.engines.Interface` for a package that is not installed: a wheel, or a
folder. Names of other packages are imported, where they are installed.
"""

from __future__ import annotations

import ast
import functools
import pkgutil
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from l2pd_adapters.engines import Imported


@dataclass(frozen=True)
class Module:
    """A module of the package; `tree` is its parsed source."""

    name: str
    is_package: bool
    tree: ast.Module


@dataclass(frozen=True)
class Definition:
    """A statement that defines a name, in its module."""

    module: Module
    node: ast.stmt


UNTOLD = object()
"""What an object has of which the source does not tell what it is, such as a function's result."""


class Sources:
    """The modules of one package.

    root: a wheel, or the folder that contains the package's folder.
    """

    def __init__(self, package: str, root: Path) -> None:
        self.package = package
        self.root: Any = zipfile.Path(root) if root.is_file() else root
        self._module = functools.cache(self._read)
        self._open: set[tuple[str, str]] = set()
        """Modules and names that are being looked up, since modules may import each other."""
        self.untold: list[str] = []
        """Names that were asked of objects of which the source does not tell what they have."""

    def find(self, name: str) -> Any:
        """A Module, a Definition, or an object of another package. Raises AttributeError or
        ImportError if the name is missing."""
        first, *rest = name.split(".")
        if first != self.package:
            return pkgutil.resolve_name(name)
        found: Any = self._module(first)
        if found is None:
            raise ImportError(f"no package {first!r}")
        for part in rest:
            inner = self._module(f"{found.name}.{part}") if isinstance(found, Module) else None
            owner, found = found, inner or self._member(found, part)
            if found is None:
                shown = owner.name if isinstance(owner, Module) else "it"
                raise AttributeError(f"{shown} has no {part!r}")
        return found

    def parameters(self, found: Any) -> tuple[str, ...]:
        """As `inspect.signature` names them; of a class, those of its `__init__`."""
        if not isinstance(found, Definition):
            return Imported().parameters(found)
        if isinstance(found.node, ast.ClassDef):
            made = self._member(found, "__init__")
            if not isinstance(made, Definition):
                raise AttributeError("it has no __init__")
            return self.parameters(made)[1:]
        if not isinstance(found.node, ast.FunctionDef | ast.AsyncFunctionDef):
            raise AttributeError("it is no function")
        names = _parameters(found.node.args)
        is_bound = any(ast.unparse(each) == "classmethod" for each in found.node.decorator_list)
        return names[1:] if is_bound else names

    def has(self, found: Any, name: str) -> bool:
        """Whether a module, a class or its instances have the name, as far as the source tells;
        see `untold`."""
        if not isinstance(found, Module | Definition):
            return Imported().has(found, name)
        member = self._member(found, name)
        if member is UNTOLD:
            self.untold.append(name)
        return member is not None

    def _read(self, name: str) -> Module | None:
        path = self.root.joinpath(*name.split("."))
        package = path / "__init__.py"
        file = package if package.is_file() else path.parent / f"{path.name}.py"
        if not file.is_file():
            # A folder without __init__.py is a package, too.
            return Module(name, True, ast.parse("")) if path.is_dir() else None
        return Module(name, file is package, ast.parse(file.read_text(encoding="utf-8")))

    def _member(self, owner: Any, name: str) -> Any:
        """What a module or a class has under a name; None if nothing."""
        if isinstance(owner, Module):
            return self._global(owner, name) or self._module(f"{owner.name}.{name}")
        if not isinstance(owner, Definition):
            return getattr(owner, name, None)
        if isinstance(owner.node, ast.ClassDef):
            return self._of_class(owner.module, owner.node, name)
        if isinstance(owner.node, ast.FunctionDef | ast.AsyncFunctionDef):
            return None
        value = getattr(owner.node, "value", None)
        if isinstance(value, ast.Call):  # an instance, if a class is called
            made = self._expression(owner.module, value.func)
            if isinstance(made, Definition) and isinstance(made.node, ast.ClassDef):
                return self._member(made, name)
        return UNTOLD

    def _global(self, module: Module, name: str) -> Any:
        """What a module defines or imports under a name; None if nothing."""
        if (module.name, name) in self._open:
            return None
        self._open.add((module.name, name))
        try:
            return self._defined(module, name)
        finally:
            self._open.remove((module.name, name))

    def _defined(self, module: Module, name: str) -> Any:
        for node in _statements(module.tree.body):
            if isinstance(node, ast.Import | ast.ImportFrom):
                found = self._imported(module, node, name)
                if found is not None:
                    return found
            elif name in _names(node):
                later = [each for each in module.tree.body if name in map(_name, _targets(each))]
                made_anew = isinstance(node, ast.ClassDef) and later
                return Definition(module, later[-1] if made_anew else node)
        return None

    def _imported(self, module: Module, node: ast.Import | ast.ImportFrom, name: str) -> Any:
        for alias in node.names:
            if alias.name != "*" and (alias.asname or alias.name).partition(".")[0] != name:
                continue
            if isinstance(node, ast.ImportFrom):
                wanted = f"{_absolute(module, node)}.{name if alias.name == '*' else alias.name}"
            else:
                wanted = alias.name if alias.asname else name
            try:
                return self.find(wanted)
            except (ImportError, AttributeError):
                continue
        return None

    def _of_class(self, module: Module, node: ast.ClassDef, name: str) -> Any:
        for each in _statements(node.body):
            if name in _names(each):
                return Definition(module, each)
        for each in ast.walk(node):
            if isinstance(each, ast.stmt) and f"self.{name}" in map(ast.unparse, _targets(each)):
                return Definition(module, each)
        for base in node.bases:
            of = base.value if isinstance(base, ast.Subscript) else base  # Generic[T]
            owner = self._expression(module, of)
            found = None if owner is None else self._member(owner, name)
            if found is not None:
                return found
        return None

    def _expression(self, module: Module, node: ast.expr) -> Any:
        """What `a.b.C` means in a module; None if that cannot be told."""
        first, *rest = ast.unparse(node).split(".")
        found = self._global(module, first)
        for part in rest:
            found = None if found is None else self._member(found, part)
        return found


def _parameters(args: ast.arguments) -> tuple[str, ...]:
    several = [args.vararg] if args.vararg else []
    named = [args.kwarg] if args.kwarg else []
    every = [*args.posonlyargs, *args.args, *several, *args.kwonlyargs, *named]
    return tuple(each.arg for each in every)


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements of a module or class, with those inside `if`, `try` and `with`."""
    for node in body:
        yield node
        if isinstance(node, ast.If | ast.Try | ast.With):
            for inner in ("body", "orelse", "finalbody"):
                yield from _statements(getattr(node, inner, []))
            for handler in getattr(node, "handlers", []):
                yield from _statements(handler.body)


def _names(node: ast.stmt) -> set[str]:
    """The names that a statement defines, imports left out."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {node.name}
    return {_name(each) for each in _targets(node)}


def _name(target: ast.expr) -> str:
    return target.id if isinstance(target, ast.Name) else ""


def _targets(node: ast.stmt) -> list[ast.expr]:
    """What an assignment assigns to."""
    if isinstance(node, ast.Assign):
        tuples = (ast.Tuple, ast.List)
        return [one for t in node.targets for one in (t.elts if isinstance(t, tuples) else [t])]
    return [node.target] if isinstance(node, ast.AnnAssign | ast.AugAssign) else []


def _absolute(module: Module, node: ast.ImportFrom) -> str:
    """The full name of the module that a `from` import names."""
    if not node.level:
        return node.module or ""
    up = node.level - module.is_package
    base = module.name.rsplit(".", up)[0] if up else module.name
    return f"{base}.{node.module}" if node.module else base
