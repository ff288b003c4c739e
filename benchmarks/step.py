"""Compare the step between two forward passes with published alternatives, on the same logits.

    python benchmarks/step.py                                   # every size, some ten minutes
    python benchmarks/step.py --rows 256 --vocabularies 157184 --dtypes bfloat16 --json FILE

For each size, in turns: the whole denoising step with `confidence_threshold`; only the statistics,
also with entropy and margin; one read of the logits (`amax`), which is the memory floor; `softmax`
with `argmax` and `gather`; the same in float64, as in Fast-dLLM; SGLang's LowConfidence step. Then
the cost of each policy's own decision, compared with a forward pass of a random model of 100
million parameters. The script runs on the GPU if there is one.
"""

from __future__ import annotations

import argparse
import weakref
from collections.abc import Callable
from typing import Any

import torch
from measuring import amount, device_of, environment, output, positive, timed, write
from plain import low_confidence_step, softmax_gather
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from l2pd_adapters.tiny_models import folder_of
from l2pd_plugins import DenoisingStep, ModelContext, UnmaskPolicy, create_policy
from l2pd_plugins.blocks import BlockBatch
from l2pd_plugins.denoising import denoising_step
from l2pd_plugins.end_of_text import EndOfText
from l2pd_plugins.statistics import row_statistics

BLOCK = 32
EVERYTHING = frozenset({"confidence", "entropy", "margin"})
POLICIES = ("fixed_schedule", "confidence_threshold", "learn2pd", "settled")
DEVICE = device_of("auto")


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of tensors that operations allocate and that are alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, torch.Tensor):
                self._known.add(leaf.untyped_storage()._cdata)
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def peak_bytes(run: Callable[[], object]) -> int:
    """Memory that `run` takes beyond what is there before."""
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats(DEVICE)
        before = torch.cuda.memory_allocated(DEVICE)
        run()
        return torch.cuda.max_memory_allocated(DEVICE) - before
    with PeakMemory() as memory:
        run()
    return memory.peak


def compare(rows: int, vocabulary: int, dtype: str, repeats: int) -> dict[str, Any]:
    """All ways on one set of logits: (rows, vocabulary), blocks of 32 positions, all masked."""
    shape = (rows // BLOCK, BLOCK, vocabulary)
    logits = torch.empty(shape, dtype=getattr(torch, dtype), device=DEVICE)
    for part in logits:  # no float32 copy of everything
        part.copy_(3 * torch.randn(part.shape, device=DEVICE))
    flat = logits.flatten(0, 1)
    mask = vocabulary - 1
    policy = create_policy("confidence_threshold")
    end_of_text = EndOfText("block", (vocabulary - 2,))
    tokens = torch.full(shape[:2], mask, device=DEVICE)

    def step() -> None:
        batch = BlockBatch.start(tokens, [policy] * len(tokens), mask_token_id=mask)
        denoising_step(batch, logits, end_of_text=end_of_text)

    ways: dict[str, Callable[[], object]] = {
        "step": step,
        "statistics": lambda: row_statistics(flat, suppress=mask),
        "with entropy, margin": lambda: row_statistics(flat, EVERYTHING, mask),
        "amax": lambda: logits.amax(-1),
        "softmax + gather": lambda: softmax_gather(logits),
        "float64 + gather": lambda: softmax_gather(logits, torch.float64),
        "SGLang LowConfidence": lambda: low_confidence_step(logits, tokens.clone(), mask, 0.9),
    }
    times = timed(ways, repeats, device=DEVICE)
    share = peak_bytes(step) / (logits.numel() * logits.element_size())
    print(f"\n{rows} rows, vocabulary {vocabulary}, {dtype}; peak memory of the step {share:.3%}")
    ratios = {name: times[name].over(times["step"]) for name in ways}
    for name in ways:
        print(f"  {name:22} {times[name]}   {ratios[name]} the step's time")
    over_floor = times["step"].over(times["amax"])
    print(f"  the step takes {over_floor} the time of amax", flush=True)
    return {
        "rows": rows,
        "vocabulary": vocabulary,
        "dtype": dtype,
        "peak_memory_share": share,
        "step_over_amax": over_floor.median,
        "seconds": {name: found.values for name, found in times.items()},
        "over_step": {name: ratio.median for name, ratio in ratios.items()},
    }


def policies_against_forward(repeats: int, rows: int = 8) -> dict[str, Any]:
    """The `select` of each policy on `rows` blocks, against a forward pass of just those blocks."""
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=7,
        num_attention_heads=12,
        is_causal=False,
        max_position_embeddings=2048,
    )
    model = LlamaForCausalLM(config).to(DEVICE).eval()
    millions = sum(weight.numel() for weight in model.parameters()) / 1e6
    tokens = torch.randint(config.vocab_size, (rows, BLOCK), device=DEVICE)
    context = ModelContext(
        name="tiny-llada",
        block_length=BLOCK,
        mask_token_id=0,
        vocab_size=config.vocab_size,
        path=str(folder_of("tiny-llada")),
    )
    policies = [create_policy(name).for_model(context) for name in POLICIES]
    step = random_step(rows)

    def forward() -> None:
        with torch.inference_mode():
            model(input_ids=tokens, use_cache=False)

    def deciding(policy: UnmaskPolicy) -> Callable[[], object]:
        state = policy.init_state(rows, BLOCK, DEVICE)
        return torch.no_grad()(lambda: policy.select(step, state))

    ways = {policy.name: deciding(policy) for policy in policies}
    times = timed({"forward": forward, **ways}, repeats, device=DEVICE)
    print(f"\nforward pass of {millions:.0f} M parameters, {rows} blocks: {times['forward']}")
    shares = {name: times[name].over(times["forward"]) for name in ways}
    for name, share in shares.items():
        print(f"  {name:22} {times[name]}   {share.median:.3%} of the forward pass")
    return {
        "parameters_in_millions": millions,
        "rows": rows,
        "seconds": {name: found.values for name, found in times.items()},
        "share_of_forward": {name: share.median for name, share in shares.items()},
    }


def random_step(rows: int) -> DenoisingStep:
    """A step in the middle of a block, with everything that a policy may read."""
    shape = (rows, BLOCK)
    confidence = torch.rand(shape, device=DEVICE)
    zeros = torch.zeros(rows, dtype=torch.int64, device=DEVICE)
    return DenoisingStep(
        tokens=torch.randint(1000, shape, device=DEVICE),
        masked=torch.rand(shape, device=DEVICE) < 0.5,
        x0=torch.randint(1000, shape, device=DEVICE),
        confidence=confidence,
        entropy=1 - confidence,
        margin=confidence / 2,
        logits=None,
        step_index=zeros + 3,
        block_index=zeros,
        canvas_length=zeros + BLOCK,
        mask_token_id=-1,
        present=torch.ones(shape, dtype=torch.bool, device=DEVICE),
    )


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=positive, nargs="+", default=[32, 256, 1024, 4096])
    parser.add_argument(
        "--vocabularies",
        type=positive,
        nargs="+",
        default=[126464, 151936, 157184],
        help="those of LLaDA; of Dream and SDAR; of LLaDA2",
    )
    parser.add_argument(
        "--dtypes",
        nargs="+",
        choices=["bfloat16", "float16", "float32"],
        default=["bfloat16", "float32"],
    )
    parser.add_argument(
        "--gigabytes", type=amount, default=12, help="sizes whose baselines take more are left out"
    )
    parser.add_argument("--repeats", type=positive, default=7)
    parser.add_argument("--json", type=output)
    arguments = parser.parse_args()
    for rows in arguments.rows:
        if rows % BLOCK:
            parser.error(f"--rows {rows}: a multiple of {BLOCK}")

    torch.manual_seed(0)
    print(" ".join(f"{name}={value}" for name, value in environment(DEVICE).items()))
    results: dict[str, Any] = {"sizes": [], "left_out": []}
    for dtype in arguments.dtypes:
        for vocabulary in arguments.vocabularies:
            for rows in arguments.rows:
                # The logits, their float64 copy and its softmax.
                wanted = rows * vocabulary * (getattr(torch, dtype).itemsize + 16) / 1e9
                if wanted > arguments.gigabytes:
                    print(f"\nleft out: {rows} rows, {vocabulary}, {dtype}: {wanted:.0f} GB")
                    results["left_out"].append([rows, vocabulary, dtype])
                else:
                    results["sizes"].append(compare(rows, vocabulary, dtype, arguments.repeats))
                write(arguments.json, results, DEVICE)
    results["policies"] = policies_against_forward(arguments.repeats)
    write(arguments.json, results, DEVICE)


if __name__ == "__main__":
    main()
