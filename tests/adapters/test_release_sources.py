"""What is read from a package's source equals what its import shows."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from l2pd_adapters.engines import Imported, changed
from tests.engines.sources import Sources

FILES = {
    "__init__.py": """
        import typing
        LAZY = {"Late": ".inner.deep"}
        if typing.TYPE_CHECKING:
            from made_release.inner.deep import Late
        else:
            def __getattr__(name):
                import importlib
                if name not in LAZY:
                    raise AttributeError(name)
                return getattr(importlib.import_module(LAZY[name], __name__), name)
        """,
    "inner/__init__.py": """
        from .deep import Base as Renamed
        from .starred import *
        from ..other import helper
        """,
    "inner/deep.py": """
        import abc
        import json
        from dataclasses import dataclass
        from collections import OrderedDict as Ordered
        from made_release.other import Far

        class Base(abc.ABC):
            limit: int
            other, another = 1, 2
            def __init__(self, config, *rest, key=None, **more):
                self.made, self.paired = 1, 2
            def method(self, first, /, second, *, third=None): ...
            async def waits(self, one): ...
            @classmethod
            def of(cls, args): ...
            @staticmethod
            def alone(args): ...
            def later(self):
                self.assigned: int = 3

        class Late(Base, Far):
            if True:
                def conditional(self): ...

        class Mapped(Ordered):
            pass

        @dataclass
        class Fields:
            name: str
            count: int = 0

        instance = Late(None)
        """,
    "inner/starred.py": """
        try:
            import no_such_module_at_all
        except ImportError:
            fallback = None
        def shining(a, b=1): ...
        """,
    "other.py": """
        class Far:
            far = 1
        def helper(): ...
        """,
    "plain/module.py": "value = 1\n",
}
SIGNATURES = {
    "made_release.Late": ("config", "..."),
    "made_release.Late.method": ("self", "first", "second", "third"),
    "made_release.Late.of": ("args",),
    "made_release.Late.alone": ("args",),
    "made_release.inner.Renamed.waits": ("self", "one"),
    "made_release.inner.Renamed": ("config", "rest", "key", "more"),
    "made_release.inner.shining": ("a", "b"),
    "made_release.inner.helper": (),
    "json.dumps": ("obj", "..."),
}
WRONG = {
    "made_release.Late": ("other", "..."),
    "made_release.Late.method": ("self", "first"),
    "made_release.Late.of": ("cls", "args"),
    "made_release.Late.gone": ("self",),
    "made_release.gone.Late": (),
    "made_release.inner.deep.instance": (),
}
NAMES = {
    "made_release": ("Late", "inner"),
    "made_release.Late": ("limit", "other", "another", "made", "paired", "assigned", "far"),
    "made_release.Late.conditional": (),
    "made_release.inner": ("Renamed", "shining", "fallback", "helper", "deep"),
    "made_release.inner.deep.Mapped": ("move_to_end", "setdefault"),
    "made_release.inner.deep.Fields": ("name", "count"),
    "made_release.inner.deep.instance": ("method", "far"),
    "made_release.plain.module": ("value",),
    "pathlib.Path": ("is_file",),
}


@pytest.fixture(params=["folder", "wheel"])
def root(request, tmp_path):
    """A package that is not imported: its folder, or its wheel."""
    for name, text in FILES.items():
        file = tmp_path / "site" / "made_release" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        lines = text.strip("\n").splitlines()
        file.write_text("\n".join(line.removeprefix(" " * 8) for line in lines) + "\n")
    if request.param == "folder":
        return tmp_path / "site"
    wheel = tmp_path / "made_release-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for file in (tmp_path / "site").rglob("*"):
            archive.write(file, file.relative_to(tmp_path / "site"))
    return wheel


def test_what_is_there_is_found_without_an_import(root):
    assert changed(SIGNATURES, NAMES, Sources("made_release", root)) == []
    assert "made_release" not in sys.modules


@pytest.mark.parametrize("name", WRONG)
def test_a_changed_function_is_named(root, name):
    (line,) = changed({name: WRONG[name]}, {}, Sources("made_release", root))
    assert line.startswith(name)


@pytest.mark.parametrize("owner", NAMES)
def test_a_missing_name_is_named(root, owner):
    sources = Sources("made_release", root)
    assert changed({}, {owner: ("gone",)}, sources) == [f"{owner} has no gone"]
    assert changed({}, {f"{owner}.gone": ()}, sources)[0].startswith(f"{owner}.gone is missing")


def test_an_import_shows_the_same(root, monkeypatch):
    """The package is importable from a folder and from a wheel."""
    monkeypatch.syspath_prepend(str(root))
    tables = (SIGNATURES, NAMES), (WRONG, dict.fromkeys(NAMES, ("gone",)))
    try:
        for signatures, names in tables:
            read = changed(signatures, names, Sources("made_release", root))
            imported = changed(signatures, names, Imported())
            assert [line.partition(" (")[0] for line in read] == [
                line.partition(" (")[0] for line in imported
            ]
    finally:
        for module in [name for name in sys.modules if name.startswith("made_release")]:
            del sys.modules[module]


def test_what_a_function_makes_is_said_to_be_unknown(tmp_path):
    (tmp_path / "made_release.py").write_text(
        "import json\nclass Args:\n    def own(self): ...\nArgs = json.loads('{}')\n"
    )
    sources = Sources("made_release", tmp_path)
    assert changed({}, {"made_release.Args": ("own", "perhaps")}, sources) == []
    assert sources.untold == ["own", "perhaps"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("transformers",), "invalid choice: 'transformers'"),
        (("vllm", "--wheel", "no-such.whl"), "--wheel no-such.whl: no such file or folder"),
    ],
)
def test_the_command_refuses(arguments, words):
    done = subprocess.run(
        [sys.executable, "-m", "tests.engines.interface", *arguments],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 2
    assert words in done.stderr


def test_the_command_names_what_a_release_lacks(tmp_path):
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text("ModelRegistry = None\n")
    done = subprocess.run(
        [sys.executable, "-m", "tests.engines.interface", "vllm", "--wheel", str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 1, done.stderr
    assert "  vllm.config is missing (" in done.stdout
    assert " names that the adapter uses have changed\n" in done.stdout
