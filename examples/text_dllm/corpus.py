"""Gather the text of a Debian machine: Python code, documentation, licences, manuals.

    apt-get install python3-doc
    python examples/text_dllm/corpus.py --out runs/text

A unit is a prompt and its answer: the header of a function and its body, or the first words of a
piece of prose and the rest. `--out` gets `tokenizer.json` (byte-level BPE), `units.npz` and
`heldout.npz` (token ids of the units), and the prompts `train.jsonl` and `heldout.jsonl`. One file
in twenty is held out, by the hash of its path; units whose answer is also a training answer are not
held out.
"""

from __future__ import annotations

import argparse
import ast
import gzip
import hashlib
import json
import re
import sysconfig
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import NamedTuple

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

SPECIALS = ("<|endoftext|>", "<|mask|>", "<|user|>", "<|assistant|>", "<|unknown|>")
END_OF_TEXT_ID, MASK_ID, USER_ID, ASSISTANT_ID, UNKNOWN_ID = range(len(SPECIALS))
LENGTH = 128
"""The most tokens of a unit, including its role tokens and its end-of-text token."""
ANSWER = 63
"""The most tokens of an answer; with its end-of-text token it fits a canvas of 64."""
PIECE = 48
"""The most words of a unit of prose."""
CODE = (sysconfig.get_path("stdlib"), "/usr/lib/python3/dist-packages")
PACKAGES = sysconfig.get_path("purelib")
OF_A_PACKAGE = 4000
"""The most functions of one installed package; large packages would dominate the code."""
NOT_CODE = {"encodings", "idlelib", "lib2to3", "pydoc_data", "site-packages", "test", "tests"}
"""Folders that are skipped: tables, and folders that would dominate the code."""
PROSE = (
    "/usr/share/doc/python3/html/_sources",
    "/usr/share/common-licenses",
    "/usr/share/doc",
    "/usr/share/man/man1",
    "/usr/share/man/man5",
    "/usr/share/man/man7",
    "/usr/share/man/man8",
)
PROSE_NAMES = re.compile(r"(copyright|README.*|.*\.rst|.*\.txt|.*\.md|.*\.[1578](ssl|p|x)?)(\.gz)?")
MANUALS = 8  # one manual page in eight is taken
MOST_BYTES = 200_000
WORDS = r" ?[A-Za-z]+|\d| ?[^\sA-Za-z\d]+|\n *| +"
"""No token spans more than one of these: a word, a digit, marks, a line end with indentation."""


class Unit(NamedTuple):
    """A prompt and the text that follows it in the corpus."""

    kind: str  # "code" or "prose"
    prompt: str
    answer: str


def files(folders: tuple[str, ...], wanted: re.Pattern[str]) -> Iterator[tuple[str, str]]:
    """The path and text of every file whose name matches `wanted`, in order."""
    seen = set()
    for folder in folders:
        for path in sorted(Path(folder).rglob("*")):
            inside = path.relative_to(folder).parts
            if not wanted.fullmatch(path.name) or NOT_CODE & set(inside):
                continue
            if "/share/man/" in folder and hashed(str(path), MANUALS):
                continue
            real = path.resolve()
            if real in seen or not path.is_file():
                continue
            seen.add(real)
            data = path.read_bytes()
            if path.suffix == ".gz":
                data = gzip.decompress(data)
            if len(data) > MOST_BYTES:
                continue
            try:
                yield str(path), data.decode("utf-8")
            except UnicodeDecodeError:
                continue


def package_files() -> Iterator[tuple[str, str]]:
    """The path and text of Python files of installed packages, up to `OF_A_PACKAGE` functions of
    each.
    """
    for package in sorted(Path(PACKAGES).iterdir()):
        found = 0
        texts = files((str(package),), re.compile(r".*\.py")) if package.is_dir() else ()
        for path, text in sorted(texts, key=lambda file: hashed(file[0], 1 << 32)):
            if found >= OF_A_PACKAGE:
                break
            found += len(re.findall(r"^ *def ", text, re.MULTILINE))
            yield path, text


def code_units(source: str) -> Iterator[Unit]:
    """One unit for every function: header and docstring are the prompt, the body is the answer."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    lines = source.splitlines()
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        body = node.body
        if ast.get_docstring(node) is not None:
            body = body[1:]
        if not body or body[0].lineno <= node.lineno:
            continue
        # Decorators of a nested class or function begin before the line of its name.
        first = min([body[0].lineno, *(d.lineno for d in getattr(body[0], "decorator_list", []))])
        whole = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno])).split("\n")
        cut = first - node.lineno
        yield Unit("code", "\n".join(whole[:cut]), "\n".join(whole[cut:]))


def prose_units(text: str, manual: bool) -> Iterator[Unit]:
    """Units of prose: the first words of a paragraph are the prompt, the rest is the answer.

    A paragraph of more than `PIECE` words is cut into pieces.
    """
    if manual:
        text = plain(text)
    for paragraph in re.split(r"\n\s*\n", text):
        paragraph = paragraph.strip("\n")
        words = [m.end() for m in re.finditer(r"\S+", paragraph)]
        for start in range(0, len(words), PIECE):
            piece = words[start : start + PIECE]
            if len(piece) < 12:
                break
            begin = words[start - 1] if start else 0
            cut = piece[max(4, len(piece) // 4)]
            yield Unit("prose", paragraph[begin:cut].strip(), paragraph[cut : piece[-1]])


def plain(manual: str) -> str:
    """A manual page without its macros."""
    kept = []
    for line in manual.split("\n"):
        if line.startswith(('.\\"', "'\\\"", ".TH", ".if", ".ie", ".el", ".de", ".ds", ".nr")):
            continue
        if re.match(r"[.'](PP|P|LP|TP|IP|SH|SS|sp|Pp|Sh|It)\b", line):
            kept.append("")
        line = re.sub(r"^[.'][A-Za-z]+ ?", "", line)
        line = re.sub(r"\\f.|\\s-?\d|\\&|\\[,/|]", "", line)
        kept.append(line.replace("\\-", "-").replace("\\e", "\\").replace('"', ""))
    return "\n".join(kept)


def hashed(path: str, into: int) -> int:
    """A number below `into` that depends only on the path."""
    return int(hashlib.sha256(path.encode()).hexdigest()[:8], 16) % into


def gather() -> tuple[list[Unit], list[Unit]]:
    """The units for training and the held-out units, without duplicates."""
    parts: tuple[dict[Unit, None], dict[Unit, None]] = ({}, {})
    for path, text in (*files(CODE, re.compile(r".*\.py")), *package_files()):
        parts[hashed(path, 20) == 0].update(dict.fromkeys(code_units(text)))
    for path, text in files(PROSE, PROSE_NAMES):
        units = prose_units(text, manual="/share/man/" in path)
        parts[hashed(path, 20) == 0].update(dict.fromkeys(units))
    train = list(parts[0])
    answers = {unit.answer for unit in train}
    return train, [unit for unit in parts[1] if unit.answer not in answers]


def make_tokenizer(units: list[Unit], size: int) -> Tokenizer:
    """Byte-level BPE in which a run of spaces before a word is a separate token, for code."""
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pattern=Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((f"{u.prompt}{u.answer}" for u in units), trainer)
    return tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--vocabulary", type=int, default=4096)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    train, held = gather()
    print(f"{len(train)} units found", flush=True)
    rng = Random(0)
    rng.shuffle(train)
    rng.shuffle(held)
    tokenizer = make_tokenizer(train[:20_000], args.vocabulary)
    tokenizer.save(str(args.out / "tokenizer.json"))

    def encoded(units: list[Unit]) -> Iterator[tuple[Unit, list[int], list[int]]]:
        for start in range(0, len(units), 4096):
            part = units[start : start + 4096]
            asked = tokenizer.encode_batch([unit.prompt for unit in part])
            said = tokenizer.encode_batch([unit.answer for unit in part])
            for unit, a, b in zip(part, asked, said, strict=True):
                if a.ids and 8 <= len(b.ids) <= ANSWER and len(a.ids) + len(b.ids) + 3 <= LENGTH:
                    yield unit, a.ids, b.ids

    def written(name: str, units: list[Unit]) -> list[Unit]:
        """Write token ids as an .npz file; returns the units that are not too long."""
        ids: list[int] = []
        starts, answers, kept = [0], [], []
        for unit, prompt, answer in encoded(units):
            ids += [USER_ID, *prompt, ASSISTANT_ID, *answer, END_OF_TEXT_ID]
            answers.append(len(prompt) + 2)
            starts.append(len(ids))
            kept.append(unit)
        np.savez(
            args.out / f"{name}.npz",
            ids=np.array(ids, dtype=np.uint16),
            starts=np.array(starts),
            answers=np.array(answers),
            code=np.array([unit.kind == "code" for unit in kept]),
        )
        code = sum(unit.kind == "code" for unit in kept)
        print(f"{name}: {len(kept)} units, {code} of code, {len(ids)} tokens", flush=True)
        return kept

    for name, units in (("train", written("units", train)), ("heldout", written("heldout", held))):
        # Code and prose alternate, so that any prefix of the file contains both equally.
        of_kind = [[u for u in units if u.kind == kind][:1500] for kind in ("code", "prose")]
        mixed = [unit for pair in zip(*of_kind, strict=False) for unit in pair]
        with (args.out / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            for number, unit in enumerate(mixed):
                row = {"id": f"{name}-{number:04}", "kind": unit.kind, "prompt": unit.prompt}
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
