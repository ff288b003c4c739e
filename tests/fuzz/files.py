"""Malformed files: whatever they contain, reading them gives a result or one L2PDError of one line.

`try_one` takes a valid folder of some kind (a checkpoint, a filter, trajectories, ...), malforms
one or two of its files, and calls every function that reads such a folder. A finding is any other
error, a hang, a large allocation, or a read of a file outside the folder.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import resource
import shutil
import signal
import struct
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import typer
from safetensors import SafetensorError

from l2pd_adapters.chat_templates import rendered
from l2pd_adapters.huggingface import load
from l2pd_plugins import L2PDError, create_policy
from l2pd_plugins.trajectories import load_references, read_manifest, read_trajectories
from l2pd_policies.learn2pd.convert import convert
from l2pd_policies.learned.load_filter import load_filter
from l2pd_policies.learned.training import Recipe, train
from l2pd_tools.cli.doctor import doctor, read_filter
from l2pd_tools.evaluation.prompts import parse_prompts, read_prompts
from l2pd_tools.evaluation.run import encode_prompts
from l2pd_tools.tiny_world import TASKS
from tests.fuzz import bases, malformed

SECONDS = 20
"""Seconds that a case may take; all known cases take less than one."""
GROWTH = 600
"""MiB by which the peak memory of the process may grow in one case."""
MESSAGE = 3000
"""Most characters of an error."""

_NOT_DONE = (
    *(ValueError, LookupError, TypeError, AttributeError, OSError, RecursionError),
    *(struct.error, SafetensorError),
)
"""Errors that a mutation may raise on a file that is already malformed."""
JSON_FILES = (malformed.value_of_json,) * 4 + (malformed.bytes_of_json,) * 2
WEIGHTS = (malformed.header, malformed.numbers)

_watched: list[str] = []
"""The watched folders, which are outside of a case's folder, and the files opened in each."""


class Finding(AssertionError):
    """Something that must not happen."""


def try_one(rng: random.Random) -> None:
    """Read one malformed folder. Raises AssertionError that says what was done to it."""
    part = rng.choices(list(PARTS), weights=[weight for weight, _ in PARTS.values()])[0]
    folder, outside = bases.scratch() / "case", bases.scratch() / "outside"
    for each in (folder, outside):
        shutil.rmtree(each, ignore_errors=True)
    outside.mkdir()
    done = [part]
    before = _peak()
    try:
        with _quiet(), _bounded(), _nothing_read(outside):
            PARTS[part][1](rng, folder, outside, done)
        if _peak() - before > GROWTH:
            raise Finding(f"it took {_peak() - before} MiB more")
    except Exception as error:
        raise AssertionError(
            f"{'; '.join(done)}\n{type(error).__name__}: {error}\n{traceback.format_exc(limit=-8)}"
        ) from error


def _checkpoint(rng: random.Random, folder: Path, outside: Path, done: list[str]) -> None:
    kind = rng.choice(list(bases.CHECKPOINT_KINDS))
    done.append(kind)
    _linked(bases.checkpoint(kind), folder)
    _malform(rng, folder, outside, done)
    as_json = rng.random() < 0.5
    told = _answer(_told, folder, as_json)
    if isinstance(told, str):
        if as_json:
            json.loads(told)
        elif not all(line.isprintable() for line in told.splitlines()):
            raise Finding(f"this cannot be printed: {told!r}")
    if rng.random() < 0.6:
        family = bases.FAMILY if kind == "bert" or rng.random() < 0.05 else None
        loaded = _answer(lambda: load(folder, family=family))
        if loaded is not None:
            model, tokenizer = loaded
            prompts = parse_prompts(["Hello"], "here")
            encoded = _answer(encode_prompts, tokenizer, prompts)
            if encoded is not None and not all(p.isfinite().all() for p in model.parameters()):
                raise Finding("a model with weights that are no finite numbers")
            _answer(rendered, tokenizer, [{"role": "user", "content": "Hello"}])


def _told(folder: Path, as_json: bool) -> str:
    """The output of `l2pd doctor`."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(typer.Exit):
        doctor(str(folder), None, as_json)
    out.getvalue().encode()
    return out.getvalue()


def _filter(rng: random.Random, folder: Path, outside: Path, done: list[str]) -> None:
    kind = rng.choice(list(bases.FILTERS))
    done.append(kind)
    _linked(bases.learned(kind), folder)
    _malform(rng, folder, outside, done)
    _answer(load_filter, bases.FILTERS[kind], folder)

    class Model:
        block_length = bases.LENGTH

    _answer(read_filter, folder, Model)


def _converter(rng: random.Random, folder: Path, outside: Path, done: list[str]) -> None:
    _linked(bases.released(), folder)
    path = folder / "model.pth"
    kind = rng.choice(("file", "weights", "bytes"))
    if kind == "file":
        done.append(malformed.kind_of_file(rng, path, outside))
        if path.is_symlink():  # may lead anywhere, since a user names it
            path.unlink()
    elif kind == "bytes":
        content = bytearray(path.read_bytes())
        for _ in range(rng.randrange(1, 9)):
            content[rng.randrange(len(content))] = rng.randrange(256)
        malformed.replaced(path, bytes(content))
    else:
        value = rng.choice(
            (
                5,
                [],
                {},
                {"a": 1},
                {"fc1.weight": torch.zeros(0, 0)},
                {"a.weight": torch.zeros(2, 2), "a.bias": torch.full((2,), torch.nan)},
                {i: torch.zeros(2) for i in range(4)},
                {"": torch.zeros(()), ".": torch.zeros(1)},
                {f"\x1b{i}.weight": torch.zeros(3, 3).to_sparse() for i in range(2)},
                {
                    f"{n}.{k}": torch.zeros(
                        (2, 2) if k == "weight" else (2,), dtype=torch.complex64
                    )
                    for n in "ab"
                    for k in ("weight", "bias")
                },
            )
        )
        done.append(f"{value!r:.80}")
        malformed.take_out(path)
        torch.save(value, path)
    _answer(lambda: convert(path, threshold=0.9, progress="always_top1", base_model="m"))


def _trajectories(rng: random.Random, folder: Path, outside: Path, done: list[str]) -> None:
    _linked(bases.trajectories(), folder)
    _malform(rng, folder, outside, done)
    said = _answer(read_manifest, folder)
    for shard, path in enumerate(sorted(folder.glob("reference-*"))):
        references = _answer(load_references, path, said, shard)
        if references is not None and said is not None:
            shape = (len(said.members(shard)), said.max_new_tokens)
            if references[0].shape != shape:
                raise Finding(f"references {tuple(references[0].shape)}; expected {shape}")
    found = _answer(read_trajectories, folder)
    if found is not None:
        manifest, data = found
        if data.x0.shape[1] != manifest.block_length:
            raise Finding("steps of another length")
        kind = bases.FILTERS[rng.choice(("learn2pd", "settled"))]
        length = None if kind.ANY_BLOCK_LENGTH else manifest.block_length
        recipe = Recipe(epochs=1)
        _answer(lambda: train(kind, data, recipe, block_length=length, base_model="m"))


def _prompts(rng: random.Random, folder: Path, outside: Path, done: list[str]) -> None:
    folder.mkdir()
    path = folder / rng.choice(("prompts.txt", "prompts.jsonl", "prompts.ndjson"))
    content = rng.choice(malformed.PROMPTS)
    done.append(f"{path.name} {content[:60]!r}")
    path.write_bytes(content)
    if rng.random() < 0.2:
        done.append(malformed.kind_of_file(rng, path, outside))
        if path.is_fifo() or path.is_symlink():  # reading may block, since a user names it
            path.unlink()
    found = _answer(lambda: read_prompts(path, tasks=TASKS))
    if found is not None and any("\ufeff" in prompt.text for prompt in found):
        raise Finding("a byte order mark in a prompt")


def _table(rng: random.Random, folder: Path, outside: Path, done: list[str]) -> None:
    _linked(bases.table(), folder)
    path = folder / "table.safetensors"
    mutation = rng.choice((*WEIGHTS, malformed.kind_of_file))
    done.append(f"{mutation.__name__}: {mutation(rng, path, outside)}")
    if path.is_symlink():
        path.unlink()
    _answer(lambda: create_policy("pc_sampler", frequencies=str(path)))


PARTS: dict[str, tuple[float, Callable[[random.Random, Path, Path, list[str]], None]]] = {
    "checkpoint": (14, _checkpoint),
    "filter": (2, _filter),
    "trajectories": (2, _trajectories),
    "converter": (0.5, _converter),
    "prompts": (0.7, _prompts),
    "table": (0.3, _table),
}


def _malform(rng: random.Random, folder: Path, outside: Path, done: list[str]) -> None:
    """Malform one or two files of the folder."""
    for _ in range(rng.choice((1, 1, 1, 2))):
        files = sorted(
            path
            for path in folder.rglob("*")
            if path.suffix in (".json", ".jinja", ".txt", ".safetensors") and path.is_file()
        )
        if not files:
            return
        config = [path for path in files if path.name == "config.json"]
        path = rng.choice(config if config and rng.random() < 0.35 else files)
        if path.name.endswith("index.json") and rng.random() < 0.6:
            mutations: Any = (malformed.index,)
        elif path.suffix == ".json":
            mutations = JSON_FILES
        elif path.suffix == ".jinja":
            mutations = (malformed.template,)
        elif path.suffix == ".safetensors":
            mutations = WEIGHTS
        else:
            mutations = (malformed.bytes_of_json,)
        if rng.random() < 0.2:
            mutations = (malformed.kind_of_file,)
        mutation = rng.choice(mutations)
        try:
            did = mutation(rng, path, outside)
        except _NOT_DONE as error:
            did = f"not done, it was malformed already: {error!r:.60}"
        done.append(f"{path.relative_to(folder)}: {mutation.__name__}: {did}")


def _answer(call: Callable[..., Any], *arguments: Any) -> Any:
    """The result of the call; None if it raised an L2PDError, which must be one line."""
    try:
        return call(*arguments)
    except L2PDError as error:
        text = str(error)
        if not text or not text.isprintable() or len(text) > MESSAGE:
            raise Finding(f"this error is no line: {text!r:.500}") from error
        return None


def _linked(source: Path, folder: Path) -> None:
    shutil.copytree(source, folder, copy_function=os.link)


def _peak() -> int:
    """The peak memory of this process in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 2**10


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Switch off the logs and progress bars of libraries."""
    from transformers.utils import logging

    level, shown = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL + 1)
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()


@contextlib.contextmanager
def _bounded() -> Iterator[None]:
    """Raise Finding if the body hangs."""

    def end(number: int, frame: FrameType | None) -> None:
        raise Finding(f"it took more than {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def _nothing_read(outside: Path) -> Iterator[None]:
    """Raise Finding if Python opened a file of this folder during the body."""
    if not _watched:
        _watched.append("")
        sys.addaudithook(_note_opened)
    opened: list[str] = []
    _OPENED[str(outside)] = opened
    try:
        yield
    finally:
        del _OPENED[str(outside)]
    if opened:
        raise Finding(f"{opened[0]} was opened, which is outside the folder")


_OPENED: dict[str, list[str]] = {}


def _note_opened(event: str, arguments: tuple[Any, ...]) -> None:
    if event != "open" or not _OPENED or not isinstance(arguments[0], str | bytes):
        return
    mode = arguments[1] if len(arguments) > 1 else None
    path = os.fsdecode(arguments[0])
    for outside, opened in _OPENED.items():
        real = os.path.realpath(path)
        if real.startswith(outside) and (mode is None or str(mode).startswith("r")):
            caller = sys._getframe(1)
            names = set()
            frame: FrameType | None = caller
            while frame is not None:
                names.add(frame.f_code.co_filename)
                frame = frame.f_back
            if not any(name.endswith("malformed.py") for name in names):
                opened.append(path)
