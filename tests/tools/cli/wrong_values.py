"""Values that the options and arguments of the commands must not take.

FILE and FOLDER are there, LONG stands for a name of 5000 characters.
"""

from __future__ import annotations

NOT_WHOLE = (
    "nan",
    "inf",
    "-inf",
    "-1",
    "0",
    "1.5",
    "1e3",
    "10**9",
    str(10**20),
    "",
    " 1",
    "1_0",
    "x",
)
"""For whole numbers from 1."""
NOT_SEEDS = (*(value for value in NOT_WHOLE if value != "0"), str(2**70), str(2**63))
NOT_NUMBERS = ("nan", "inf", "-inf", "-1", "-1e-9", str(10**20), "1e999", "", "0x1", "1_0", "x")
NOT_WORDS = ("", "None", "BLOCK", "unknown", "0")
NOT_LINES = ("", " ", "two\nlines", "\x1b[31m", "\udc80")
NOT_MODELS = (
    *NOT_LINES,
    "nonsense",
    "a/b/c",
    "a b/c",
    "nowhere/",
    "FILE",
    "~nobody-here/x",
    "LONG",
)
NOT_POLICIES = (
    *("", ",threshold=0.5", "learn3pd", "cora,", "cora,threshold", "cora,threshold=", "cora,x=1"),
    *("cora,threshold=nan", "cora,threshold=inf", "cora,threshold=2", "cora,threshold=[1]"),
    *("cora,threshold=0.5,threshold=0.6", "cora,threshold=2001-99-99"),
    "fixed_schedule,tokens_per_step=0",
)
NOT_DEVICES = ("", "gpu", "cuda:x", "cuda:-1", "cuda:99999", "CPU", "cpu cuda", "cuda:999")
NOT_READ = ("", "nowhere.txt", "FOLDER", "FILE/below", "LONG")
NOT_PROMPTS = (*NOT_READ, "hf://", "hf://one", "hf://a/b/c/d", "hf://a/b:", "hf:/a/b")
NOT_FOLDERS = ("", "nowhere", "FILE", "FILE/below", "LONG")
NOT_WRITTEN = ("", "nowhere/there.json", "FOLDER", "FILE/below", "/proc/there", "LONG")
NOT_FILLED = ("", "FILE", "FILE/below", "/proc/there", "LONG")

MODEL = {
    "--model": NOT_MODELS,
    "--adapter": (*NOT_MODELS, "FOLDER"),
    "--device": NOT_DEVICES,
    "--device-map": (*NOT_LINES, "two words", "everywhere", "cuda:x"),
    "--dtype": ("", "float", "fp16", "int8", "torch.float32", "AUTO"),
}
FORM = {
    "--prompt-field": NOT_LINES,
    "--prompt-format": ("", "yaml", "JSONL", ".csv", "line"),
    "--system": ("", " ", "\udc80"),
}
SAMPLING = {
    "--temperature": (*(v for v in NOT_NUMBERS if v != str(10**20)), "1e-31", "1e31"),
    "--top-p": (*NOT_NUMBERS, "0", "0.0", "1.01"),
    "--top-k": (*(value for value in NOT_WHOLE if value != "0"), str(2**31)),
    "--seed": NOT_SEEDS,
}
CANVAS = {
    "--max-new-tokens": (*NOT_WHOLE, str(10**9)),
    "--block-length": (*NOT_WHOLE, str(10**9)),
    "--end-of-text": NOT_WORDS,
    "--cache": NOT_WORDS,
}
SETTINGS = {**MODEL, **CANVAS, "--batch-size": (*NOT_WHOLE, str(10**9))}
COLLECTING = {name: values for name, values in SETTINGS.items() if name != "--end-of-text"}
FLAGS = {
    "--json",
    "--jsonl",
    "--force",
    "--quiet",
    "--verbose",
    "--raw",
    "--trace",
    "--watch",
    "--with-end",
    "--by-task",
    "--show-differing",
    "--demo",
    "--install-completion",
    "--show-completion",
    "--version",
    "--help",
}

TABLE: dict[str, dict[str, tuple[str, ...]]] = {
    "": {"--threads": (*NOT_WHOLE, str(10**9))},
    "generate": {
        **SETTINGS,
        **FORM,
        "prompt": ("", " ", "\udc80"),
        "--file": NOT_PROMPTS,
        "--limit": NOT_WHOLE,
        **SAMPLING,
        "--policy": NOT_POLICIES,
        "--pace": NOT_NUMBERS,
    },
    "chat": {
        **CANVAS,
        **MODEL,
        **SAMPLING,
        "--system": FORM["--system"],
        "--policy": NOT_POLICIES,
        "--pace": NOT_NUMBERS,
    },
    "compare": {
        **SETTINGS,
        **SAMPLING,
        "--policy": NOT_POLICIES,
        **FORM,
        "--prompts": NOT_PROMPTS,
        "--limit": NOT_WHOLE,
        "--json-file": NOT_WRITTEN,
        "--html": NOT_WRITTEN,
        "--out": NOT_FILLED,
        "--format": NOT_WORDS,
    },
    "tune": {
        **SETTINGS,
        **SAMPLING,
        "policy": NOT_POLICIES,
        "--set": ("", "threshold", "threshold=", "threshold=0.5,", "=1", "x=1", "threshold=nan"),
        "--lose": (*NOT_NUMBERS, "101"),
        **FORM,
        "--prompts": NOT_PROMPTS,
        "--limit": NOT_WHOLE,
        "--plot": (*NOT_WRITTEN, "x.nonsense", "x"),
        "--json-file": NOT_WRITTEN,
        "--out": NOT_FILLED,
        "--format": NOT_WORDS,
    },
    "score": {
        **MODEL,
        **FORM,
        "prompt": ("", " ", "\udc80"),
        "answers": ("", " ", "\udc80"),
        "--file": (*NOT_PROMPTS, "-"),
        "--answer-field": NOT_LINES,
        "--limit": NOT_WHOLE,
        "--samples": (*NOT_WHOLE, str(10**9)),
        "--seed": NOT_SEEDS,
        "--order": (*NOT_WORDS, "right_to_left"),
        "--batch-size": (*NOT_WHOLE, str(10**9)),
    },
    "demo": {
        **MODEL,
        "--host": (*NOT_LINES, "two words", "256.0.0.1"),
        "--port": (*NOT_WHOLE, "65536"),
    },
    "doctor": {"model": NOT_MODELS, "--filter": NOT_FOLDERS},
    "policies": {"name": ("", " ", "learn3pd"), "--format": NOT_WORDS},
    "plugins": {"--format": NOT_WORDS},
    "config": {"--format": NOT_WORDS},
    "new-policy": {
        "name": (*NOT_LINES, "My-Rule", "1st", "cora", "class", "../x"),
        "--folder": NOT_FILLED,
    },
    "export-generate": {"folder": NOT_FILLED},
    "learn2pd collect": {
        **COLLECTING,
        "--out": NOT_FILLED,
        **FORM,
        "--prompts": NOT_PROMPTS,
        "--limit": (*NOT_WHOLE, "1"),
        "--policy": NOT_POLICIES,
        "--prompts-per-shard": (*NOT_WHOLE, str(2**31)),
        "--labels": NOT_WORDS,
    },
    "learn2pd train": {
        **COLLECTING,
        "--out": NOT_FILLED,
        "--data": NOT_FILLED,
        "--policy": ("", "oracle", "learn3pd", "settled,threshold=0.5"),
        "--rounds": (*(v for v in NOT_WHOLE if v != "0"), "1001"),
        **FORM,
        "--prompts": NOT_PROMPTS,
        "--limit": (*NOT_WHOLE, "1"),
        "--epochs": NOT_WHOLE,
        "--false-positive-rate": (*NOT_NUMBERS, "1.01"),
        "--labels": NOT_WORDS,
        "--seed": NOT_SEEDS,
    },
    "learn2pd familiar": {
        "folder": NOT_FOLDERS,
        "--data": NOT_FOLDERS,
        "--policy": ("", "oracle", "learn3pd", "settled,threshold=0.5"),
    },
    "learn2pd convert": {
        "file": NOT_READ,
        "--out": NOT_FILLED,
        "--threshold": (*NOT_NUMBERS, "0", "1"),
        "--progress": NOT_WORDS,
        "--base-model": NOT_LINES,
    },
}

BASE = {
    "": ("policies",),
    "generate": ("Hello",),
    "compare": ("--policy", "oracle"),
    "tune": ("cora",),
    "score": ("Hello", "Hi"),
    "doctor": ("tiny-llada",),
    "new-policy": ("my_rule",),
    "learn2pd collect": ("--out", "out"),
    "learn2pd train": ("--out", "out", "--data", "data", "--rounds", "1"),
    "learn2pd familiar": ("FOLDER", "--data", "FOLDER"),
    "learn2pd convert": ("FILE", "--out", "out"),
}
"""What each command needs besides the value that is tried."""
WITH = {"--pace": ("--watch",), "--html": ("--policy", "cora")}
"""What an option goes with."""
