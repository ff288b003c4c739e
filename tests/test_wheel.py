"""The built wheel, in new environments: what it requires, and what type checkers report."""

from __future__ import annotations

import re
import sys
import textwrap
from email.parser import Parser
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from zipfile import ZipFile

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from l2pd_tools.cli.new_policy import write_distribution
from tests.fresh_environment import (
    INSTALLED,
    PIP,
    QUIET,
    ROOT,
    build_wheel,
    environment,
    link_packages,
    run,
)

PYRIGHT = Path(sys.executable).with_name("pyright")

USER = """
    from typing import Any

    from torch import Tensor

    from l2pd_adapters.huggingface import DiffusionGenerateOutput, disable, enable, generate, load

    model, tokenizer = load("tiny-llada", dtype="float32", device="cpu")
    chat = [{"role": "user", "content": "Plan: Eva, Leo; 1 3"}]
    inputs = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    out = model.generate(
        **inputs,
        max_new_tokens=128,
        block_length=32,
        unmask_policy="learn2pd",
        unmask_options={"threshold": 0.96},
        cache="dual",
        end_of_text="block",
        return_dict_in_generate=True,
    )
    checked: DiffusionGenerateOutput = out
    print(tokenizer.decode(out.sequences[0]), int(out.nfe[0]), float(out.tokens_per_forward[0]))
    if out.trace is not None:
        print(out.trace.nfe, out.configuration.split())
    tokens: Tensor = model.generate(inputs["input_ids"], max_new_tokens=8)
    print(tokens.shape)


    def decode(theirs: Any, whole: bool) -> Tensor:
        enable(theirs, name="theirs")
        answer = generate(theirs, input_ids=tokens, return_dict_in_generate=whole)
        disable(theirs)
        return answer if isinstance(answer, Tensor) else answer.sequences
"""
POLICY = """
    from typing import Annotated

    from pydantic import Field
    from torch import Tensor

    from l2pd_plugins import DenoisingStep, UnmaskPolicy, create_policy, policy_options


    @policy_options
    class LowEntropy(UnmaskPolicy):
        requires = frozenset({"entropy"})
        limit: Annotated[float, Field(gt=0)] = 0.1

        def select(self, step: DenoisingStep, state: dict[str, Tensor]) -> Tensor:
            return step.masked & (step.entropy <= self.limit)


    policy: UnmaskPolicy = LowEntropy(limit=0.2)
    other: UnmaskPolicy = create_policy("confidence_threshold", threshold=0.9)
"""
PLUGIN = """
    from l2pd_plugins import PolicySpec, hookimpl


    @hookimpl
    def l2pd_policies() -> list[PolicySpec]:
        factory = "policy:LowEntropy"
        return [PolicySpec("low_entropy", factory=factory, summary="low entropy", api_version=1)]
"""
WRONG = """
    from l2pd_adapters.huggingface import load
    from l2pd_plugins import PolicySpec, create_policy

    model, tokenizer = load("tiny-llada", family="llada")  # wrong
    tokens = model.generate(block_length="32")  # wrong
    tokens = model.generate(cache="duel")  # wrong
    tokens = model.generate(unmask_polcy="learn2pd")  # wrong
    print(model.generate(max_new_tokens=8).nfe)  # wrong
    PolicySpec("low_entropy", summary="low entropy", api_version="1")  # wrong
    create_policy(3)  # wrong
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout."""
    return build_wheel(tmp_path_factory.mktemp("wheel"))


def required(wheel: Path) -> set[str]:
    """Names of the distributions that pip installs with the wheel without extras."""
    with ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(archive.read(name).decode())
    waiting: list[tuple[str, set[str]]]
    waiting = [(line, set()) for line in metadata.get_all("Requires-Dist", [])]
    found: dict[str, set[str]] = {}
    while waiting:
        line, extras = waiting.pop()
        requirement = Requirement(line)
        marker = requirement.marker
        if marker and not any(marker.evaluate({"extra": extra}) for extra in extras or {""}):
            continue
        name = canonicalize_name(requirement.name)
        if name in found and requirement.extras <= found[name]:
            continue
        found[name] = found.get(name, set()) | requirement.extras
        try:
            lines = distribution(name).requires or []
        except PackageNotFoundError:  # PyTorch's build for the CPU comes without it
            continue
        waiting += [(each, requirement.extras) for each in lines]
    return set(found)


@pytest.fixture(scope="module")
def base(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment with the wheel and its requirements, without extras."""
    folder = tmp_path_factory.mktemp("base")
    tops: set[str] = set()
    for name in required(wheel):
        try:
            files = distribution(name).files or []
        except PackageNotFoundError:
            continue
        tops |= {file.parts[0] for file in files} - {"..", "__pycache__"}
    link_packages(tops, folder / "packages")
    return environment(folder / "venv", wheel, folder / "packages")


@pytest.fixture(scope="module")
def full(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment with the wheel and every package that is installed here."""
    return environment(tmp_path_factory.mktemp("full") / "venv", wheel, INSTALLED)


def test_every_package_has_types(wheel: Path) -> None:
    with ZipFile(wheel) as archive:
        names = archive.namelist()
    for package in ("l2pd_plugins", "l2pd_policies", "l2pd_adapters", "l2pd_tools"):
        assert f"{package}/py.typed" in names


def test_the_readme_of_the_wheel_has_no_link_that_needs_the_repository(wheel: Path) -> None:
    with ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        readme = Parser().parsestr(archive.read(name).decode()).get_payload()
    targets = re.findall(r"\]\(([^)]+)\)", readme)
    assert [target for target in targets if not target.startswith("https://")] == []
    for path in re.findall(r"\(`([^`]+)` in the source distribution\)", readme):
        assert (ROOT / path).exists(), path
    assert "`docs/index.md` in the source distribution" in readme


def test_the_readme_leads_to_the_repository_if_its_address_is_known() -> None:
    spec = spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    assert spec is not None and spec.loader is not None
    hook = module_from_spec(spec)
    spec.loader.exec_module(hook)
    text = "[a](docs/a.md#b), [c](https://c.org), [d](#d)"
    address = "https://example.org/x"
    linked = f"[a]({address}/blob/main/docs/a.md#b), [c](https://c.org), [d](#d)"
    assert hook.for_pypi(text, address) == linked


def test_the_wheel_alone_is_enough_for_policies(base: Path, tmp_path: Path) -> None:
    write_distribution("demo_rule", tmp_path / "demo")
    pip = [*PIP, "install", *QUIET, "--target", tmp_path / "site"]
    package = run(*pip, tmp_path / "demo")
    assert package.returncode == 0, package.stderr
    code = f"""
        import sys
        from importlib.util import find_spec
        sys.path.append({str(tmp_path / "site")!r})
        extras = ("transformers", "tokenizers", "typer", "rich", "numba", "matplotlib", "pytest")
        assert [name for name in extras if find_spec(name)] == []
        import l2pd_plugins, l2pd_policies
        assert {str(base.parents[1])!r} in l2pd_plugins.__file__
        from l2pd_plugins import create_policy, list_policies
        from l2pd_plugins.plugins import list_plugins, load_factory
        from l2pd_plugins.testing import check_policy
        assert [p.reason for p in list_plugins() if p.status != "active"] == []
        for spec in list_policies():
            load_factory(spec)
        for name in ("demo_rule", "confidence_threshold"):
            check_policy(lambda: create_policy(name), block_lengths=(8,), verbose=False)
        print("passed")
    """
    done = run(base, "-c", textwrap.dedent(code))
    assert done.stdout == "passed\n", done.stderr


def test_the_wheel_alone_names_the_extra_of_the_command_line(base: Path) -> None:
    done = run(base.with_name("l2pd"), "policies")
    said = 'the command l2pd needs typer, rich, transformers; pip install "l2pd-plugins[cli]"'
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"error: {said}\n")


def test_the_wheel_alone_names_the_extra_of_transformers(base: Path) -> None:
    done = run(base, "-c", "import l2pd_adapters.huggingface")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "l2pd_plugins.errors.L2PDError: transformers is not installed: "
        'pip install "l2pd-plugins[hf]"'
    )


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a user's script, a policy, a plugin, and a script with type errors."""
    folder = tmp_path_factory.mktemp("user")
    for name, text in (("user", USER), ("policy", POLICY), ("plugin", PLUGIN), ("wrong", WRONG)):
        (folder / f"{name}.py").write_text(textwrap.dedent(text).lstrip())
    return folder


def expected_errors(sources: Path) -> set[tuple[str, int]]:
    lines = (sources / "wrong.py").read_text().splitlines()
    return {("wrong.py", number) for number, line in enumerate(lines, 1) if "# wrong" in line}


def reported(output: str) -> set[tuple[str, int]]:
    """File and line of every error that a type checker printed."""
    return {
        (Path(name).name, int(line))
        for name, line in re.findall(r"^\s*(\S+\.py):(\d+)(?::\d+)?:? .*\berror\b", output, re.M)
    }


def test_mypy_reads_the_types(full: Path, sources: Path) -> None:
    # Following imports into transformers takes minutes.
    (sources / "mypy.ini").write_text(
        "[mypy]\nstrict = true\n[mypy-transformers.*]\nfollow_imports = skip\n"
    )
    done = run(
        sys.executable, "-m", "mypy", "--config-file", sources / "mypy.ini",
        "--python-executable", full, "--cache-dir", sources / "cache",
        *sorted(sources.glob("*.py")),
    )  # fmt: skip
    assert reported(done.stdout) == expected_errors(sources), done.stdout + done.stderr


@pytest.mark.skipif(not PYRIGHT.exists(), reason="pyright is not installed")
def test_pyright_reads_the_types(full: Path, sources: Path) -> None:
    done = run(PYRIGHT, "--pythonpath", full, *sorted(sources.glob("*.py")))
    assert reported(done.stdout) == expected_errors(sources), done.stdout + done.stderr
