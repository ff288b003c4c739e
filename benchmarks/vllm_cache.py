"""Compare the caches of bidirectional models on vLLM: positions computed, and seconds.

    .venv-vllm/bin/python benchmarks/vllm_cache.py
    .venv-vllm/bin/python benchmarks/vllm_cache.py --lengths 512 --concurrency 8 --json FILE

One engine, in this process, answers the same requests with each cache in turns, as many at a time
as --concurrency says, without an end of text: with `fixed_schedule` at 4 tokens per step, and with
`confidence_threshold` at a threshold that every prediction reaches, which finishes a block in one
pass. Each line has the positions per token, tokens per second, and the seconds of the first cache
over those of this one. On a shared machine, --cpu-time measures the
processor's seconds instead.

On a GPU, compare CUDA graphs with eager mode on a random model of LLaDA-8B's shape; `graphs` in the
file has the number of passes in each mode of vLLM, and `answers` a hash of all tokens:

    python benchmarks/vllm_cache.py --hidden 4096 --layers 32 --vocabulary 126464 --dtype bfloat16 \
        --json graphs.json
    python benchmarks/vllm_cache.py --hidden 4096 --layers 32 --vocabulary 126464 --dtype bfloat16 \
        --eager --json eager.json
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine runs in this process

import torch
from measuring import amount, output, positive, timed, write
from random_checkpoint import save_random
from transformers import Qwen3ForCausalLM
from vllm import LLM, SamplingParams

from l2pd_adapters.families import CACHES
from l2pd_adapters.tiny_models import folder_of, heldout_prompts
from l2pd_adapters.vllm.model_state import BidirectionalState
from l2pd_tools.loading import resolve_device

DEVICE = torch.device(resolve_device("auto"))
"""The device on which vLLM runs."""
POLICIES: dict[str, dict[str, Any]] = {
    "4 tokens per step": {"name": "fixed_schedule", "tokens_per_step": 4},
    "a block per step": {"name": "confidence_threshold", "threshold": 0.0},
}
PROMPT = 64
"""Tokens of a prompt, at most."""


def random_model(folder: Path, args: argparse.Namespace) -> str:
    """A random bidirectional model."""
    return save_random(
        Qwen3ForCausalLM,
        folder,
        vocabulary=args.vocabulary,
        hidden=args.hidden,
        layers=args.layers,
        head_dim=128,
        dtype=args.dtype,
        device=DEVICE,
        block_length=32,
        is_causal=False,
        max_position_embeddings=4096,
    )


class Watched:
    """What an engine computes: positions, passes, and the passes in each mode of CUDA graphs."""

    def __init__(self, llm: LLM) -> None:
        self.positions, self.passes, self.graphs = 0, 0, Counter[str]()
        scheduler = llm.llm_engine.engine_core.engine_core.scheduler  # type: ignore[attr-defined]
        schedule, prepare = scheduler.schedule, BidirectionalState.prepare_attn

        def scheduled(*args: Any, **kwargs: Any) -> Any:
            made = schedule(*args, **kwargs)
            self.positions += made.total_num_scheduled_tokens
            self.passes += bool(made.total_num_scheduled_tokens)
            return made

        def prepared(state: Any, batch: Any, mode: Any, *args: Any, **kwargs: Any) -> Any:
            self.graphs[mode.name] += 1
            return prepare(state, batch, mode, *args, **kwargs)

        scheduler.schedule = scheduled
        BidirectionalState.prepare_attn = prepared  # type: ignore[method-assign]

    def restart(self) -> None:
        """Count from 0 on."""
        self.positions = self.passes = 0
        self.graphs.clear()


def prompts(llm: LLM, count: int) -> list[dict[str, Any]]:
    """Held-out prompts as token ids."""
    tokenizer: Any = llm.get_tokenizer()
    lines = heldout_prompts().read_text(encoding="utf-8").splitlines()
    ids = (tokenizer.encode(json.loads(line)["prompt"]) for line in lines[:count])
    return [{"prompt_token_ids": found[:PROMPT]} for found in ids]


def answered(
    llm: LLM, watched: Watched, cache: str, policy: dict[str, Any], length: int, count: int
) -> dict[str, Any]:
    """Answer this many prompts, and return what was computed for it."""
    options = {f"decoding_plugin.{k}": v for k, v in policy.items() if k != "name"}
    extra = {"decoding_plugin": policy["name"], "decoding_plugin.cache": cache}
    params = SamplingParams(
        max_tokens=length, temperature=0, ignore_eos=True, extra_args={**options, **extra}
    )
    watched.restart()
    outputs = llm.generate(prompts(llm, count), params, use_tqdm=False)
    tokens = [list(each.outputs[0].token_ids) for each in outputs]
    return {
        "positions_per_token": watched.positions / (length * count),
        "passes": watched.passes,
        "graphs": dict(watched.graphs),
        "answers": hashlib.sha256(json.dumps(tokens).encode()).hexdigest()[:16],
    }


def compared(llm: LLM, watched: Watched, args: argparse.Namespace) -> None:
    """Measure every setting, print a line for each cache, and write the file."""
    results: list[dict[str, Any]] = []
    settings = {key: value for key, value in vars(args).items() if key != "json"}
    clock = time.process_time if args.cpu_time else time.perf_counter
    for length, count, name in itertools.product(args.lengths, args.concurrency, POLICIES):
        print(f"max_tokens {length}, {count} at a time, {name}")
        made: dict[str, dict[str, Any]] = {}

        def run(cache: str, length: int = length, count: int = count, name: str = name) -> None:
            made[cache] = answered(llm, watched, cache, POLICIES[name], length, count)  # noqa: B023

        ways = {cache: partial(run, cache) for cache in args.caches}
        times = timed(ways, args.turns, device=DEVICE, warm=args.warm, clock=clock)
        for cache, found in times.items():
            per_token, rate = made[cache]["positions_per_token"], length * count / found.median
            ratio = times[args.caches[0]].over(found)
            print(f"  {cache:6} {per_token:8.2f} positions/token {rate:8.1f} tokens/s {ratio}")
            results.append(
                {
                    "max_tokens": length,
                    "concurrency": count,
                    "policy": name,
                    "cache": cache,
                    "seconds": found.median,
                    "tokens_per_second": rate,
                    "over_first": ratio.median,
                    **made[cache],
                }
            )
        write(args.json, {"settings": settings, "runs": results}, DEVICE)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--lengths", type=positive, nargs="+", default=[128, 256, 512, 1024])
    parser.add_argument("--concurrency", type=positive, nargs="+", default=[8, 16])
    choices = CACHES["bidirectional"]
    parser.add_argument("--caches", nargs="+", choices=choices, default=list(choices))
    parser.add_argument("--turns", type=positive, default=3)
    parser.add_argument("--no-warm-up", dest="warm", action="store_false")
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs, no compilation")
    parser.add_argument("--hidden", type=positive, help="of a random model; else tiny-llada")
    parser.add_argument("--layers", type=positive, default=2)
    parser.add_argument("--vocabulary", type=positive, default=101)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--kv-gib", type=amount, default=2.0, help="GiB of keys and values")
    parser.add_argument("--json", type=output)
    args = parser.parse_args()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        longest, rows = PROMPT + max(args.lengths), max(args.concurrency)
        llm = LLM(
            random_model(folder, args) if args.hidden else str(folder_of("tiny-llada")),
            dtype=args.dtype,
            max_model_len=longest,
            max_num_seqs=rows,
            max_num_batched_tokens=rows * longest,  # so that "none" never waits
            enforce_eager=args.eager,
            kv_cache_memory_bytes=int(args.kv_gib * (1 << 30)),
            additional_config={"decoding_plugin": {"name": "fixed_schedule", "cache": "dual"}},
        )
        compared(llm, Watched(llm), args)


if __name__ == "__main__":
    main()
