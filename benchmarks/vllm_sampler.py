"""Compare our sampler in vLLM with the model's forward pass and with vLLM's own sampler.

    .venv-vllm/bin/python benchmarks/vllm_sampler.py
    .venv-vllm/bin/python benchmarks/vllm_sampler.py --batches 8 --vocabulary 151936 --json FILE

A random SDAR of the given sizes decodes a batch of equal requests. In each denoising step both
samplers get the same logits, one row per position of each block. Ours takes its step; vLLM's takes
the most likely token of every row, and its result is discarded. The script prints milliseconds per
step (median and range) and ratios. On a CPU, vLLM's sampler runs in Triton's interpreter: its time
does not predict that on a GPU, and is long. So fewer steps of large batches are timed (--rows), and
--without-vllm leaves vLLM's sampler out.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine runs in this process

import torch
from measuring import Times, output, positive, timed, write
from random_checkpoint import save_random
from vllm import LLM, SamplingParams

from l2pd_adapters.huggingface.models.native import SDARForCausalLM
from l2pd_adapters.vllm.model_state import DiffusionState
from l2pd_adapters.vllm.sampler import UnmaskSampler
from l2pd_tools.loading import resolve_device

DEVICE = torch.device(resolve_device("auto"))
"""The device on which vLLM runs."""


def checkpoint(folder: Path, args: argparse.Namespace) -> str:
    """A random SDAR."""
    return save_random(
        SDARForCausalLM,
        folder,
        vocabulary=args.vocabulary,
        hidden=args.hidden,
        layers=args.layers,
        head_dim=64,
        block_length=args.block_length,
        max_position_embeddings=1024,
    )


@dataclass
class Seconds:
    """How long each part of some denoising steps took."""

    wanted: int = 0
    """How many steps are timed."""
    of: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    """Seconds by part; all lists have the same length."""

    @property
    def enough(self) -> bool:
        """Whether all requested steps were timed."""
        return len(self.of["ours"]) >= self.wanted

    def begin(self, wanted: int) -> None:
        """Discard all times, and time this many steps."""
        self.wanted = wanted
        self.of.clear()


@contextmanager
def watched(seconds: Seconds, beside_vllm: bool) -> Iterator[Callable[[Any], None]]:
    """The times of the requested denoising steps; the yielded function attaches a model."""
    custom, call = DiffusionState.custom_sampler, UnmaskSampler.__call__
    stock: Any = None
    last: dict[str, float] = {}  # of the step that is running

    def keep_stock(state: Any, sampler: Any) -> Any:
        nonlocal stock
        stock = sampler
        return custom(state, sampler)

    def add(self: Any, req_idx: int, sampling_params: Any) -> None:
        stock.add_request(req_idx, sampling_params)
        stock.apply_staged_writes()

    def sample(self: Any, logits: torch.Tensor, input_batch: Any, *rest: Any) -> Any:
        if not input_batch.num_draft_tokens or seconds.enough:
            return call(self, logits, input_batch, *rest)
        if beside_vllm:
            again = logits.clone()
            once("vllm", lambda: stock(again, input_batch))
        output = once("ours", lambda: call(self, logits, input_batch, *rest))
        for name, taken in last.items():
            seconds.of[name].append(taken)
        return output

    def once(name: str, run: Callable[[], Any]) -> Any:
        result = None

        def kept() -> None:
            nonlocal result
            result = run()

        (last[name],) = timed({name: kept}, 1, device=DEVICE, warm=False)[name].values
        return result

    def attach(model: Any) -> None:
        forward, head = model.forward, model.compute_logits
        model.forward = lambda *a, **k: once("forward", lambda: forward(*a, **k))
        model.compute_logits = lambda *a, **k: once("head", lambda: head(*a, **k))

    DiffusionState.custom_sampler, UnmaskSampler.__call__ = keep_stock, sample
    UnmaskSampler.add_request = add
    yield attach
    DiffusionState.custom_sampler, UnmaskSampler.__call__ = custom, call


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--batches", type=positive, nargs="+", default=[1, 8, 32])
    parser.add_argument("--vocabulary", type=positive, default=8192)
    parser.add_argument("--hidden", type=positive, default=512)
    parser.add_argument("--layers", type=positive, default=8)
    parser.add_argument("--block-length", type=positive, default=32)
    parser.add_argument("--policy", default="confidence_threshold")
    parser.add_argument(
        "--steps", type=positive, default=24, help="denoising steps that are timed, at most"
    )
    parser.add_argument(
        "--rows",
        type=positive,
        default=12288,
        help="rows of logits in the timed steps of a batch, about; three steps are timed anyway",
    )
    parser.add_argument("--without-vllm", action="store_true")
    parser.add_argument("--json", type=output)
    args = parser.parse_args()
    seconds = Seconds()
    results = []
    with tempfile.TemporaryDirectory() as folder, watched(seconds, not args.without_vllm) as attach:
        llm = LLM(
            checkpoint(Path(folder), args),
            max_model_len=512,
            max_num_seqs=max(args.batches),
            enforce_eager=True,
            kv_cache_memory_bytes=1 << 30,
            additional_config={"decoding_plugin": args.policy},
        )
        llm.apply_model(attach)
        # A block of a random model takes about as many steps as it has positions.
        length = max(args.steps, args.block_length)
        params = SamplingParams(max_tokens=length, temperature=0, ignore_eos=True)
        for batch in args.batches:
            prompts = [{"prompt_token_ids": [5, 6, 7, 8]}] * batch
            steps = min(args.steps, max(3, args.rows // (batch * args.block_length)))
            for wanted in (1, steps):  # the first warms up
                seconds.begin(wanted)
                llm.generate(prompts, params, use_tqdm=False)
            times = {name: Times(tuple(found)) for name, found in seconds.of.items()}
            model = Times(
                tuple(
                    a + b
                    for a, b in zip(times["forward"].values, times["head"].values, strict=True)
                )
            )
            print(
                f"batch {batch}: {batch * args.block_length} rows of {args.vocabulary} logits, "
                f"{len(times['ours'].values)} steps"
            )
            print(f"  model's forward and head  {model}")
            print(f"  our sampler's step        {times['ours']}")
            print(f"  ours / model              {times['ours'].over(model)}")
            if "vllm" in times:
                print(f"  vLLM's own sampler        {times['vllm']}")
                print(f"  ours / vLLM's             {times['ours'].over(times['vllm'])}")
            milliseconds = {name: 1e3 * found.median for name, found in times.items()}
            counted = {"batch": batch, "steps": len(times["ours"].values)}
            results.append({**counted, "model": 1e3 * model.median, **milliseconds})
    settings = {name: value for name, value in vars(args).items() if name != "json"}
    write(args.json, {"settings": settings, "milliseconds": results}, DEVICE)


if __name__ == "__main__":
    main()
