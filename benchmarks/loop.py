"""Compare `generate` with a plain loop with the same policy, on the same prompts, in turns.

    python benchmarks/loop.py                                    # everything, some hours
    python benchmarks/loop.py --batches 1 16 64 --lengths 256 --json FILE
    python benchmarks/loop.py --cpu-time --turns 7 --threads 1 --batches 1 --lengths 256 \\
        --prompts 4 --end-of-text off --policies fixed_schedule confidence_threshold --json FILE

The plain loop is that of the published `generate` functions of LLaDA and Fast-dLLM (see plain.py);
with `--plain published` it has no additional operators. The script prints milliseconds per token of
the answers, tokens per second, forward passes, and the ratios. It runs on the GPU if there is one.

Only prompts for which both give the same tokens up to the end of text are compared. With
`--end-of-text off` these are all prompts. With "block", positions after the end of text are removed
from the canvas, so that the others no longer see them, and some answers differ: the share of equal
answers is printed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from measuring import device_of, environment, output, positive, run_script, timed, write
from plain import Rule, above_threshold, fixed_number, plain_loop, published_loop

from l2pd_adapters.tiny_models import heldout_prompts
from l2pd_tools.evaluation.prompts import read_prompts
from l2pd_tools.loading import load_model

RULES: dict[str, tuple[dict[str, Any], Rule]] = {
    "fixed_schedule": ({"tokens_per_step": 1}, fixed_number(1)),
    "confidence_threshold": ({"threshold": 0.9}, above_threshold(0.9)),
}

LOOPS = {"plain": plain_loop, "published": published_loop}


@dataclass
class Decoded:
    """Canvases of some prompts, the length of their answers, and the forward passes of each."""

    canvases: list[list[int]]
    lengths: list[int]
    nfe: list[int]


@dataclass
class Comparison:
    """Two ways to decode the same prompts with one model."""

    model: Any
    tokenizer: Any
    policy: str
    end_of_text: str
    length: int
    cache: str
    loop: str

    def ours(self, prompts: Sequence[str], batch: int) -> Decoded:
        """By `generate`."""
        found = Decoded([], [], [])
        for start in range(0, len(prompts), batch):
            inputs = self._inputs(prompts[start : start + batch])
            out = self.model.generate(
                **inputs,
                max_new_tokens=self.length,
                unmask_policy=self.policy,
                unmask_options=RULES[self.policy][0],
                end_of_text=self.end_of_text,
                cache=self.cache,
                return_dict_in_generate=True,
            )
            found.canvases += out.sequences[:, inputs["input_ids"].shape[1] :].tolist()
            found.lengths += out.trace.length.tolist()
            found.nfe += out.nfe.tolist()
        return found

    def plain(self, prompts: Sequence[str], batch: int) -> Decoded:
        """By the plain loop."""
        config = self.model.config
        found = Decoded([], [], [])
        for start in range(0, len(prompts), batch):
            tokens, forwards = LOOPS[self.loop](
                self.model,
                **self._inputs(prompts[start : start + batch]),
                rule=RULES[self.policy][1],
                mask_token_id=config.mask_token_id,
                max_new_tokens=self.length,
                block_length=config.block_length,
            )
            ends = tokens == config.eos_token_id
            lengths = torch.where(ends.any(-1), ends.int().argmax(-1) + 1, self.length)
            found.canvases += tokens.tolist()
            found.lengths += lengths.tolist()
            found.nfe += [forwards] * len(tokens)
        return found

    def _inputs(self, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        inputs = self.tokenizer.apply_chat_template(
            [[{"role": "user", "content": prompt}] for prompt in prompts],
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
            padding=True,
        )
        device = self.model.device
        return {name: inputs[name].to(device) for name in ("input_ids", "attention_mask")}


def same(one: Decoded, other: Decoded) -> list[bool]:
    """Which answers are equal up to the end of text."""
    pairs = zip(one.canvases, other.canvases, one.lengths, strict=True)
    return [a[:length] == b[:length] for a, b, length in pairs]


def measure(
    comparison: Comparison, prompts: Sequence[str], batch: int, turns: int, cpu_time: bool
) -> dict[str, Any]:
    """Both ways on the prompts, in batches."""
    last: dict[str, Decoded] = {}

    def ours() -> None:
        last["ours"] = comparison.ours(prompts, batch)

    def plain() -> None:
        last["plain"] = comparison.plain(prompts, batch)

    device = comparison.model.device
    clock = time.process_time if cpu_time else time.perf_counter
    ways = {"ours": ours, "plain": plain}
    times = timed(ways, turns, device=device, warm=False, clock=clock)
    if not all(same(last["ours"], last["plain"])):
        raise SystemExit("the two loops gave different tokens: there is nothing to compare")
    tokens = sum(last["ours"].lengths)
    ratio, cost = times["plain"].over(times["ours"]), times["ours"].over(times["plain"])
    return {
        "batch": batch,
        "prompts": len(prompts),
        "tokens": tokens,
        "nfe": sum(last["ours"].nfe) / len(prompts),
        "plain_nfe": sum(last["plain"].nfe) / len(prompts),
        "seconds": times["ours"].values,
        "plain_seconds": times["plain"].values,
        "tokens_per_second": tokens / times["ours"].median,
        "plain_tokens_per_second": tokens / times["plain"].median,
        "speedup": ratio.median,
        "speedup_spread": ratio.spread,
        "cost": cost.median,
        "cost_spread": cost.spread,
    }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny-llada")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:N, or auto")
    parser.add_argument("--policies", nargs="+", choices=RULES, default=["confidence_threshold"])
    parser.add_argument(
        "--end-of-text", nargs="+", choices=["block", "off"], default=["block", "off"]
    )
    parser.add_argument("--batches", type=positive, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--lengths", type=positive, nargs="+", default=[128, 256, 512, 1024])
    parser.add_argument(
        "--prompts", type=positive, default=64, help="the same for every batch size"
    )
    parser.add_argument("--cache", choices=["none", "prefix", "dual"], default="none")
    parser.add_argument(
        "--plain", choices=LOOPS, default="plain", help="which loop to compare with, see plain.py"
    )
    parser.add_argument("--turns", "--repeats", type=positive, default=3)
    parser.add_argument(
        "--cpu-time", action="store_true", help="measure CPU time, not wall-clock time"
    )
    parser.add_argument("--threads", type=positive, help="torch's threads")
    parser.add_argument("--json", type=output)
    arguments = parser.parse_args()

    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    device = device_of(arguments.device)
    print(" ".join(f"{name}={value}" for name, value in environment(device).items()))
    model, tokenizer = load_model(arguments.model, str(device))
    pool = [prompt.text for prompt in read_prompts(heldout_prompts(), 2 * arguments.prompts)]
    results = []
    unit = "CPU time" if arguments.cpu_time else "time"
    for policy in arguments.policies:
        for rule in arguments.end_of_text:
            for length in arguments.lengths:
                comparison = Comparison(
                    model, tokenizer, policy, rule, length, arguments.cache, arguments.plain
                )
                equal = same(comparison.ours(pool, 16), comparison.plain(pool, 16))
                prompts = [text for text, is_same in zip(pool, equal, strict=True) if is_same]
                prompts = prompts[: arguments.prompts]
                share = sum(equal) / len(equal)
                print(f"\n{policy} end_of_text={rule} gen={length}: {share:.0%} equal answers")
                if not prompts:
                    print("  no result")
                    continue
                first = None
                for batch in arguments.batches:
                    found = measure(comparison, prompts, batch, arguments.turns, arguments.cpu_time)
                    first = first or found
                    results.append(
                        {
                            "policy": policy,
                            "end_of_text": rule,
                            "cache": arguments.cache,
                            "plain": arguments.plain,
                            "clock": "cpu" if arguments.cpu_time else "wall",
                            "length": length,
                            "equal_answers": share,
                            **found,
                        }
                    )
                    write(arguments.json, results, device)
                    low, high = found["speedup_spread"]
                    gain = found["tokens_per_second"] / first["tokens_per_second"]
                    print(
                        f"  batch {batch:3}: {1e3 / found['tokens_per_second']:8.3f} ms/token, "
                        f"plain {1e3 / found['plain_tokens_per_second']:8.3f}; "
                        f"{found['speedup']:.2f}x [{low:.2f}, {high:.2f}] as fast, "
                        f"{found['cost']:.3f} times the {unit}; "
                        f"NFE {found['nfe']:.1f}, plain {found['plain_nfe']:.1f}; "
                        f"{found['tokens_per_second']:.0f} tokens/s, "
                        f"{gain:.2f}x those of batch {first['batch']}",
                        flush=True,
                    )


if __name__ == "__main__":
    run_script(main)
