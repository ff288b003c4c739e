"""Faults of files: each mutation takes a path and changes the file there at random."""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

NAMES = (
    "hidden_size d_model num_hidden_layers n_layers num_attention_heads n_heads vocab_size "
    "head_dim num_key_value_heads n_kv_heads intermediate_size mlp_hidden_size num_labels "
    "num_experts max_position_embeddings block_length block_size mask_token_id pad_token_id "
    "eos_token_id bos_token_id model_type architectures dtype torch_dtype is_causal "
    "tie_word_embeddings "
    "rope_scaling rope_parameters rope_theta rms_norm_eps layer_types quantization_config auto_map "
    "text_config id2label hidden_act attention_dropout n_group canvas_length use_cache "
    "_attn_implementation attn_implementation sliding_window problem_type transformers_version "
    "tokenizer_class added_tokens_decoder chat_template extra_special_tokens model_max_length "
    "additional_special_tokens padding_side vocab_file tokenizer_file weight_map metadata "
    "threshold progress features base_model prompts_per_shard prompt_count policies max_new_tokens "
    "labels temperature do_sample max_length configuration_files fast_tokenizer_files"
).split()
"""Keys that some reader uses."""
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 7, 3.5, -0.0, 1e300, float("nan"), float("inf")),
    *(10**12, 10**18, 2**63, -(10**12), 10**40, 10**5, 2**31),
    *(
        "",
        "64",
        "a",
        "float99",
        "\0",
        "\x1b[2J\n",
        "\ud800",
        "../outside",
        "/etc/passwd",
        "x" * 5000,
    ),
    *([], {}, [1], [[]], ["a"], [None], [{}], {"a": 1}, {"": {}}, [1.5, "a", None, {}], [10**12]),
    *("llama", "qwen3", "auto", "nan", "yarn", "bert", "cuda:7"),
)
TEMPLATES = (
    "{% for m in messages %}",
    "{{ messages[0]['content'",
    "{{ raise_exception('no') }}",
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{{ 'x' * 10000000000 }}",
    "{{ 'x' * 99999 * 99999 }}",
    "{{ 9 ** 9 ** 9 }}",
    "{{ messages.__class__.__mro__ }}",
    "{{ missing.attribute }}",
    "{{ 1 / 0 }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ messages | nofilter }}",
    "{{ " + "(" * 400 + "1" + ")" * 400 + " }}",
    "\ufeff{{ messages[0].content }}",
    "",
    "{# " + "x" * 2_000_000 + " #}",
)
PROMPTS = (
    b"\xef\xbb\xbfHello\n",
    b"\xff\xfeH\0e\0l\0l\0o\0",
    b"\xff\xfe\xfd",
    b"a\0b\nc\n",
    b"\n\n \n",
    b"x" * 300_000 + b"\n",
    b'{"prompt": "a"}\n{"prompt"\n',
    b'{"prompt": 5}\n',
    b'["prompt"]\n',
    b'{"prompt": "a", "data": {}, "task": "sort"}\n',
    b'{"prompt": "a", "data": {"text": 5}, "task": "reverse"}\n',
    b'{"prompt": "a", "task": ["sort"], "data": {}}\n',
    b'{"prompt": "\\ud800"}\n',
    b'{"prompt": "a", "id": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n",
    b'{"prompt": "a", "id": ' + b"9" * 5000 + b"}\n",
    b'{"prompt": "a", "id": NaN, "kind": "\\u001b[2J"}\n',
    b'\xef\xbb\xbf{"prompt": "a"}\n',
    b"null\n",
)
Mutation = Callable[[random.Random, Path, Path], str]


def take_out(path: Path) -> None:
    """Remove the file, folder or link of that name."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def replaced(path: Path, content: bytes | str) -> None:
    """Write a new file in its place, since the present one may be a hard link to the original."""
    take_out(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")
    path.write_bytes(raw)


def kind_of_file(rng: random.Random, path: Path, outside: Path) -> str:
    """Remove the file, or replace it by something that is not a regular file."""
    content = path.read_bytes() if path.is_file() else b"{}"
    kind = rng.choice(
        "missing empty folder pipe loop nowhere device out text random cut longer nul".split()
    )
    take_out(path)
    if kind == "empty":
        path.touch()
    elif kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind == "nowhere":
        path.symlink_to("gone")
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "out":
        target = outside / path.name
        target.write_bytes(content)
        path.symlink_to(target if rng.random() < 0.5 else Path("..", outside.name, path.name))
    elif kind == "text":
        path.write_text("nonsense\n")
    elif kind == "random":
        path.write_bytes(rng.randbytes(rng.choice((1, 8, 100, 3000))))
    elif kind == "cut":
        path.write_bytes(content[: rng.randrange(len(content) + 1)])
    elif kind == "longer":
        path.write_bytes(content + rng.randbytes(rng.choice((1, 1000))))
    elif kind == "nul":
        path.write_bytes(b"\0" * len(content))
    return kind


def bytes_of_json(rng: random.Random, path: Path, outside: Path) -> str:
    """Make the text invalid UTF-8 or invalid JSON."""
    text = path.read_text(encoding="utf-8") if path.is_file() else "{}"
    key = rng.choice(NAMES)
    kinds: dict[str, bytes | str] = {
        "BOM": b"\xef\xbb\xbf" + text.encode(),
        "UTF-16": text.encode("utf-16"),
        "latin": text.encode() + b"\xff\xe4",
        "deep list": "[" * 100_000 + "]" * 100_000,
        "deep object": '{"a":' * 100_000 + "1" + "}" * 100_000,
        "rather deep": '{"' + key + '": ' + "[" * 900 + "]" * 900 + "}",
        "deep value": text.rstrip().removesuffix("}")
        + f', "{key}": '
        + "[" * 300
        + "]" * 300
        + "}",
        "a list": f"[{text}]",
        "a number": "7",
        "a text": '"text"',
        "null": "null",
        "NaN": "NaN",
        "twice": text.rstrip().removesuffix("}") + f', "{key}": 1, "{key}": 2}}',
        "many digits": f'{{"{key}": {"9" * 5000}}}',
        "comment": "// mine\n" + text,
        "two": text + text,
        "quotes": text.replace('"', "'"),
        "empty object": "{}",
        "no end": text.rstrip()[:-1],
    }
    kind = rng.choice(list(kinds))
    replaced(path, kinds[kind])
    return f"{kind} ({key})"


def value_of_json(rng: random.Random, path: Path, outside: Path) -> str:
    """Change or remove a value somewhere in the file."""
    try:
        root = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        root = {}
    at = root
    where = []
    while True:
        if isinstance(at, dict):
            keys: list[Any] = list(at)
            if rng.random() < 0.15 or not keys:
                keys = [rng.choice(NAMES)]
            key = rng.choice(keys)
        elif isinstance(at, list) and at:
            key = rng.randrange(len(at))
        else:
            return "nothing"
        where.append(key)
        inner = at.get(key) if isinstance(at, dict) else at[key]
        if isinstance(inner, dict | list) and inner and rng.random() < 0.6:
            at = inner
            continue
        break
    if rng.random() < 0.1 and (isinstance(at, list) or key in at):
        del at[key]
        value: Any = "(gone)"
    else:
        value = rng.choice((*VALUES, *(TEMPLATES if key == "chat_template" else ())))
        at[key] = value
    text = json.dumps(root, ensure_ascii=rng.random() < 0.9)
    replaced(path, text)
    return f"{where} = {value!r:.80}"


def template(rng: random.Random, path: Path, outside: Path) -> str:
    """Replace the chat template."""
    text = rng.choice(TEMPLATES)
    replaced(path, text)
    return f"{text:.60}"


def index(rng: random.Random, path: Path, outside: Path) -> str:
    """Make the index of shards name another file."""
    values = json.loads(path.read_text(encoding="utf-8"))
    files = values["weight_map"]
    file = rng.choice(sorted(set(files.values())))
    target = outside / file
    shutil.copyfile(path.parent / file, target)
    names: tuple[Any, ...] = (
        *(
            str(target),
            f"../{outside.name}/{file}",
            f"a/../../{outside.name}/{file}",
            "/etc/passwd",
        ),
        *("", ".", "..", "\0", "config.json", "a" * 300, 5, None, [file], {}, True, 1e300, "~"),
        *("custom_generate", "gone.safetensors", f"./{file}"),
    )
    name = rng.choice(names)
    whole = rng.random() < 0.7
    for weight in files:
        if files[weight] == file and (whole or rng.random() < 0.3):
            files[weight] = name
    replaced(path, json.dumps(values))
    return f"{file} is {name!r:.80}"


def header(rng: random.Random, path: Path, outside: Path) -> str:
    """Change the header of a file of weights."""
    content = path.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    values = json.loads(content[8 : 8 + size])
    names = [name for name in values if name != "__metadata__"]
    name = rng.choice(names)
    entry = values[name]
    kinds: dict[str, Callable[[], object]] = {
        "dtype": lambda: entry.update(
            dtype=rng.choice(
                ("F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL", "F64", "F16", "C64", "X", 5)
            )
        ),
        "shape": lambda: entry.update(
            shape=rng.choice(([10**12], [-1], [], [0], [2**63], ["a"], None, [1] * 40, [1e9]))
        ),
        "offsets": lambda: entry.update(
            data_offsets=rng.choice(([0, 10**12], [5, 1], [-1, 4], [0], None, [0, 0], ["a", "b"]))
        ),
        "turned": lambda: entry.update(shape=entry["shape"][::-1]),
        "renamed": lambda: values.update(
            {rng.choice(("x", "\x1b[2J", "é" * 99)): values.pop(name)}
        ),
        "gone": lambda: values.pop(name),
        "metadata": lambda: values.update(__metadata__=rng.choice(VALUES[:20])),
        "size": lambda: None,
    }
    kind = rng.choice(list(kinds))
    kinds[kind]()
    made = json.dumps(values).encode()
    length = len(made) if kind != "size" else rng.choice((0, 1, 2**40, 2**63, len(made) - 3))
    replaced(path, struct.pack("<Q", length) + made + content[8 + size :])
    return f"{kind} of {name}: {values.get(name)!r:.80}"


def numbers(rng: random.Random, path: Path, outside: Path) -> str:
    """Give a weight another dtype, or values that are not finite."""
    import torch
    from safetensors.torch import load_file, save_file

    weights = load_file(path)
    if not weights:
        return "nothing"
    name = rng.choice(sorted(weights))
    weight = weights[name].clone()
    if not weight.is_floating_point() or not weight.numel():
        return "nothing"
    kind = rng.choice(
        "float8 int8 bool 1e300 nan inf double half gone more flat scalar empty".split()
    )
    types = {
        "float8": torch.float8_e4m3fn,
        "int8": torch.int8,
        "bool": torch.bool,
        "double": torch.float64,
        "half": torch.float16,
        "1e300": torch.float64,
    }
    weight = weight.to(types.get(kind, weight.dtype))
    if kind in ("1e300", "nan", "inf"):
        weight.view(-1)[rng.randrange(weight.numel())] = float(kind)
    elif kind == "flat":
        weight = weight.flatten()
    elif kind == "scalar":
        weight = weight.flatten()[0].clone()
    elif kind == "empty":
        weight = weight.flatten()[:0].clone()
    weights[name] = weight
    if kind == "gone":
        del weights[name]
    elif kind == "more":
        weights[rng.choice(("extra.weight", "model.layers.9999999999.x", "a"))] = torch.zeros(2)
    take_out(path)
    save_file(weights, path, {"format": "pt"})
    return f"{kind} in {name}"
