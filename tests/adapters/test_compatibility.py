"""The adapters' tables of engine names, compared with the adapters' source: every name that an
adapter takes from its engine is in the table, so that an engine that renames it is refused at start
with that name."""

from __future__ import annotations

import argparse
import ast
import asyncio
import functools
import importlib
import inspect
import io
import json
import logging
import pkgutil
import secrets
import sys
import time
import traceback
import types
import weakref
from http import HTTPStatus
from pathlib import Path

import numpy as np
import pytest
import torch

from l2pd_adapters import engines
from l2pd_adapters.engines import Engine
from tests.engines.interface import ADAPTERS, TABLES, imported_in, modules_of

ROOT = Path(__file__).parents[2]
OTHERS = {
    "hf_config": "of transformers",
    "is_causal": "of a checkpoint's config",
    "eos_token_id": "of a checkpoint's generation config",
    "Module": "of torch.nn",
    "msgpack": "of msgspec",
    "l2pd": "ours, put into the engines' objects",
    "meta_info": "ours, added to vLLM's choices under SGLang's name",
    "wait_stream": "of torch.cuda.Stream",
    "ZstdDecompressor": "of zstandard",
    "ZstdError": "of zstandard",
    "stream_reader": "of zstandard",
    "_l2pd": "ours, which marks what is wrapped",
}
"""Names that neither our modules nor the engine defines, with their libraries."""


READERS = ("getattr", "setattr", "hasattr")


def library_names() -> set[str]:
    """Attributes of the other libraries that the adapters use."""
    found = set()
    for thing in (
        torch,
        torch.Tensor,
        np,
        np.ndarray,
        *(dict, list, str, set, tuple, int, Exception, types.FunctionType),
        *(argparse, argparse.ArgumentParser, functools, importlib, inspect, io, json),
        *(asyncio, asyncio.AbstractEventLoop, secrets),
        *(logging, logging.getLogger("l2pd"), logging.Handler),
        *(pkgutil, sys, time, traceback, types, weakref, Path, HTTPStatus),
    ):
        found |= set(dir(thing))
    return found | {"levelno"}  # of a logging.LogRecord


def defined_in(tree: ast.AST) -> set[str]:
    """Names that a module defines: functions, classes, variables, and fields of `self`."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found |= {node.attr} if ast.unparse(node.value) == "self" else set()
    return found


def attributes_in(tree: ast.AST) -> set[str]:
    """Names that a module reads or writes in objects, by getattr and similar functions, too."""
    found = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in READERS:
            name = node.args[1]
            found |= {name.value} if isinstance(name, ast.Constant) else set()
    return {name for name in found if not name.startswith("__")}


def listed(engine: str) -> set[str]:
    """Full names in the engine's table."""
    signatures, names = TABLES[engine]
    return set(signatures) | {f"{owner}.{name}" for owner, each in names.items() for name in each}


@pytest.mark.parametrize("engine", TABLES)
def test_every_import_of_an_engine_is_in_its_table(engine: str) -> None:
    missing = {
        name
        for module, tree in modules_of(engine).items()
        for name in imported_in(tree, engine)
        if name not in listed(engine)
        # Only vLLM's workers import its model classes.
        and not (module == "models.py" and name.startswith("vllm.model_executor.models."))
    }
    assert missing == set()


@pytest.mark.parametrize("engine", TABLES)
def test_every_attribute_of_an_engine_is_in_its_table(engine: str) -> None:
    """This is tested for attributes that neither our modules nor other libraries define."""
    core = [*(ROOT / "l2pd_plugins").rglob("*.py"), *ADAPTERS.glob("*.py")]
    ours = set().union(*(defined_in(ast.parse(file.read_text())) for file in core))
    trees = modules_of(engine)
    ours |= set().union(*map(defined_in, trees.values()))
    known = {name.rpartition(".")[2] for name in listed(engine)}
    known |= ours | library_names() | OTHERS.keys()
    missing = {module: attributes_in(tree) - known for module, tree in trees.items()}
    assert {module: names for module, names in missing.items() if names} == {}


@pytest.mark.parametrize("engine", TABLES)
def test_every_name_in_the_table_is_used(engine: str) -> None:
    """A name may also be part of the path to a used name, or be checked as a parameter."""
    source = "\n".join(
        file.read_text()
        for file in [*(ADAPTERS / engine).glob("*.py"), ADAPTERS / "request_sampling.py"]
        if file.name != "compatibility.py"
    )
    names = {name for each in TABLES[engine][1].values() for name in each}
    assert {name for name in names if name not in source} <= {"batch_size"}


def test_the_check_detects_names() -> None:
    tree = ast.parse(
        "from sglang.srt import a\nimport sglang.b\nimport sglang_other\n"
        "def f(self):\n    self.mine = getattr(x, 'y')\n    x.z = x.__dict__\n"
    )
    assert set(imported_in(tree, "sglang")) == {"sglang.srt.a", "sglang.b"}
    assert attributes_in(tree) == {"y", "z", "mine"}
    assert defined_in(tree) == {"f", "mine"}


class Theirs:
    """Stands for an engine's class."""

    declared: int

    def __init__(self) -> None:
        self.assigned: int = 1

    def method(self, first, second=2, *, third=3):
        self.later, other = first, second
        return other


class Derived(Theirs):
    @property
    def computed(self) -> int:
        return 1


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Engine:
    monkeypatch.setattr(engines, "version", lambda name: "1.0")
    monkeypatch.setattr(engines, "requires", lambda name: [])
    module = types.ModuleType("a_made_up_engine")
    module.Derived, module.limit = Derived, 5  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "a_made_up_engine", module)
    return Engine("a_made_up_engine", "extra", "NO_SUCH", ())


def test_names_are_found_in_class_instance_and_bases(engine: Engine) -> None:
    names = ("declared", "assigned", "later", "computed", "method")
    table = {"a_made_up_engine": ("limit", "Derived"), "a_made_up_engine.Derived": names}
    assert engine.incompatibility({}, table) == ""
    said = engine.incompatibility({}, {"a_made_up_engine.Derived": ("other", "computed")})
    assert "a_made_up_engine.Derived has no other" in said
    assert "computed" not in said
    assert "a_made_up_engine has no gone" in engine.incompatibility(
        {}, {"a_made_up_engine": ("gone",)}
    )
    assert "a_made_up_engine.Gone is missing" in engine.incompatibility(
        {}, {"a_made_up_engine.Gone": ()}
    )
    said = engine.incompatibility({"a_made_up_engine.limit": ("first",)}, {})
    assert "a_made_up_engine.limit is missing (5 is not a callable object)" in said


@pytest.mark.parametrize(
    ("form", "fits"),
    [
        (("self", "first", "second", "third"), True),
        (("self", "first"), False),
        (("self", "first", "..."), True),
        (("self", "second", "..."), False),
        ([("self",), ("self", "first", "second", "third")], True),
        ([("self",), ("first",)], False),
    ],
)
def test_parameters_may_have_one_of_several_forms(
    engine: Engine, form: engines.Signature, fits: bool
) -> None:
    said = engine.incompatibility({"a_made_up_engine.Derived.method": form}, {})
    assert ("takes (self, first, second, third), not (" in said) is not fits
