"""Random plugin distributions, most of them broken, beside one that works.

With any others installed, the working policy is listed and can be created, nothing is raised, and
every text that is shown can be printed.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import random
import shutil
import sys
import warnings
from pathlib import Path

from l2pd_plugins import create_policy, list_policies, plugins
from tests.fuzz.making import scratch

_counter = itertools.count()

GOOD = """
from l2pd_plugins import PolicySpec, UnmaskPolicy, hookimpl

class Sound(UnmaskPolicy):
    def select(self, step, state):
        return step.masked

@hookimpl
def l2pd_policies():
    return [PolicySpec(name="{name}", factory="{module}:Sound", api_version=1)]
"""

TEXTS = (
    '""',
    '" "',
    '"a b"',
    '"\\ud800"',
    '"\\x1b[31mred\\x1b[0m"',
    '"\\x00"',
    '"line\\nline"',
    '"x" * 100_000',
    '"confidence_threshold"',
    "None",
    "7",
    "b'bytes'",
    "['list']",
    "Odd()",
    "Raising()",
)
"""Expressions for names, summaries and factories."""

RAISES = (
    "ValueError('x')",
    "SystemExit(3)",
    "KeyError()",
    "Unprintable()",
    "GeneratorExit()",
    "BaseException('base')",
    "RecursionError()",
    "ImportError('no such thing')",
)

VERSIONS = ("1", "1", "1", "0", "99", "None", "-1", "True", "Raising()", "1.0")
VALUES = ("None", "7", "Lazy()", "Raising()", "Sequence()", "()", "object", "PolicySpec", "{}")

PRELUDE = """
from l2pd_plugins import PolicySpec, UnmaskPolicy, hookimpl

class Unprintable(Exception):
    def __str__(self):
        raise RuntimeError("no text")

class Odd(str):
    def __str__(self):
        return "odd"
    def lower(self):
        raise ValueError("no lower case")

class Raising:
    def __getattribute__(self, name):
        raise RuntimeError(name)

class Lazy:
    key = property(lambda self: 1 / 0)
    name = property(lambda self: 1 / 0)
    api_version = 1

class Sequence(list):
    def __iter__(self):
        raise RuntimeError("cannot be read")
"""


def try_one(rng: random.Random) -> None:
    """Try one set of distributions."""
    number = next(_counter)
    site = scratch() / f"site{number}"
    site.mkdir()
    good = f"fuzz_sound_{number}"
    names = [good]
    _install(site, good, {"main": good}, {good: GOOD.format(name=good, module=good)})
    for i in range(rng.randint(1, 4)):
        module = f"fuzz_broken_{number}_{i}"
        names.append(module)
        entries, source = _broken(rng, module)
        _install(site, module, entries, {module: source}, rng)
    sys.path.insert(0, str(site))
    output = io.StringIO()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(output):
            warnings.simplefilter("ignore")
            plugins.reload()
            listed = list_policies()
            assert good in [spec.name for spec in listed], "the working policy is not listed"
            assert "confidence_threshold" in [spec.name for spec in listed]
            create_policy(good)
            for spec in listed:
                f"{spec.name} {spec.summary} {spec.origin} {spec.factory}".encode()
                assert str(spec.name).isprintable(), f"the name {spec.name!r} cannot be printed"
            for plugin in plugins.list_plugins():
                f"{plugin.origin} {plugin.status} {plugin.reason}".encode()
            with contextlib.suppress(plugins.L2PDError):
                create_policy(rng.choice([spec.name for spec in listed]))
            with contextlib.suppress(plugins.L2PDError):
                create_policy("no_such_policy")
    finally:
        sys.path.remove(str(site))
        for name in names:
            sys.modules.pop(name, None)
        shutil.rmtree(site)
        plugins.reload()


def _install(
    site: Path,
    name: str,
    entries: dict[str, str],
    modules: dict[str, str],
    rng: random.Random | None = None,
) -> None:
    """Write a distribution; with rng, its metadata may be malformed too."""
    info = site / f"{name}-1.0.dist-info"
    info.mkdir()
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
    lines = "".join(f"{key} = {value}\n" for key, value in entries.items())
    points = f"[l2pd_plugins]\n{lines}"
    if rng is not None:
        metadata = rng.choice(
            [metadata] * 4 + ["", "Name: \n", metadata.replace("1.0", "one.oh"), "\x00\x01", name]
        )
        points = rng.choice([points] * 6 + [points.replace(" = ", " "), points + "[", "\x00"])
    (info / "METADATA").write_text(metadata)
    (info / "entry_points.txt").write_text(points)
    for module, source in modules.items():
        (site / f"{module}.py").write_text(source)


def _broken(rng: random.Random, module: str) -> tuple[dict[str, str], str]:
    """The entry points and the source of a plugin with a fault."""
    entries = {
        rng.choice(["main", "a b", "x.y", "ü", "main"]): rng.choice(
            [
                module,
                module,
                module,
                module,
                f"{module}:nothing",
                f"{module}:",
                "no_such_module",
                ":",
            ]
        )
    }
    if rng.random() < 0.15:
        return entries, rng.choice(
            [f"raise {rng.choice(RAISES[:3])}", "def (", "\x00", "import no_such_module_at_all", ""]
        )
    spec = (
        "PolicySpec("
        f"name={rng.choice([repr(module), rng.choice(TEXTS)])}, "
        f"factory={rng.choice([repr(f'{module}:Made')] * 3 + [rng.choice(TEXTS)])}, "
        f"summary={rng.choice(TEXTS)}, "
        f"api_version={rng.choice(VERSIONS)})"
    )
    answer = rng.choice(
        [
            f"return [{spec}]",
            f"return [{spec}, {spec}]",
            f"return {spec}",
            f"return [{rng.choice(VALUES)}]",
            f"return {rng.choice(VALUES)}",
            f"yield {spec}\n    raise {rng.choice(RAISES)}",
            f"raise {rng.choice(RAISES)}",
        ]
    )
    hook = rng.choice(["l2pd_policies()"] * 6 + ["l2pd_policies(extra)", "l2pd_polices()"])
    made = rng.choice(
        [
            "class Made(UnmaskPolicy):\n    def select(self, step, state): return step.masked",
            f"def Made():\n    raise {rng.choice(RAISES[:4])}",
            "def Made():\n    return 7",
            "class Made(UnmaskPolicy):\n    requires = 7\n    def select(self, step, state): pass",
            "class Made(UnmaskPolicy):\n    progress = []\n    def select(self, step, state): pass",
        ]
    )
    return entries, f"{PRELUDE}\n\n{made}\n\n@hookimpl\ndef {hook}:\n    {answer}\n"
