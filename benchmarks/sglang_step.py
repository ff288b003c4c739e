"""Compare our step on SGLang's run loops with its own LowConfidence, and many policies with one.

    .venv-sglang/bin/python benchmarks/sglang_step.py
    .venv-sglang/bin/python benchmarks/sglang_step.py --batches 8 --vocabulary 32000 --json FILE

SGLang's loops (`_run_sync` and `_run_fdfo`) decode blocks on given logits, so that the time is that
of the loop and the step. Each step makes some more positions of every block certain; both
algorithms commit the same tokens. Then a batch of small logits is decoded with one threshold, with
as many thresholds as rows, with one policy and with eight. The script prints seconds of the
processor for each step (median and range) and ratios.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from measuring import Times, output, positive, timed, write
from sglang.srt.dllm.algorithm.low_confidence import LowConfidence
from sglang.srt.dllm.config import DllmConfig

from l2pd_adapters.sglang.algorithm import UnmaskPolicyAlgorithm
from l2pd_adapters.sglang.requests import RequestState
from l2pd_adapters.sglang.settings import SglangServer
from l2pd_plugins import ModelContext, UnmaskPolicy, create_policy
from l2pd_plugins.end_of_text import EndOfText

BLOCK, STEPS, CERTAIN = 32, 8, 30.0
CPU = torch.device("cpu")
EIGHT = (
    "confidence_threshold",
    "fixed_schedule",
    "fast_dllm_factor",
    "frechet",
    "eb_sampler",
    "local_leap",
    "hierarchy",
    "ccd",
)


class Request:
    """What the algorithm reads of SGLang's Req, which cannot be made without a tokenizer."""

    def __init__(self, policy: UnmaskPolicy, mask: int) -> None:
        self.l2pd = RequestState(policy, ignores_end=True)
        self.origin_input_ids: list[int] = []
        self.output_ids: list[int] = []
        self.full_untruncated_fill_ids = [mask] * BLOCK
        self.sampling_params = SimpleNamespace(max_new_tokens=BLOCK)


class Given:
    """A model runner whose logits are given: step n makes the positions n, n + 8, ... certain."""

    def __init__(self, batch: int, vocabulary: int) -> None:
        self.logits = torch.empty(batch, BLOCK, vocabulary)
        for rows in self.logits:
            rows.normal_()
        self.steps = 0

    def forward(self, forward_batch: Any, pp_proxy_tensors: Any = None) -> Any:
        places = [*range(self.steps % STEPS, BLOCK, STEPS)]
        if self.steps < STEPS:
            self.logits[:, places, 5] = CERTAIN
        self.steps += 1
        output = SimpleNamespace(full_logits=self.logits.flatten(0, 1))
        return SimpleNamespace(logits_output=output, can_run_graph=False)


def decode(algorithm: Any, model: Given, mask: int, fdfo: bool) -> torch.Tensor:
    """One block of every row, by SGLang's loop: its tokens."""
    model.steps = 0
    model.logits[:, :, 5] = 0.0
    batch = len(model.logits)
    ids = torch.full((batch * BLOCK,), mask)
    states = None
    for _ in range(2 * BLOCK):
        forward_batch = SimpleNamespace(
            batch_size=batch,
            input_ids=ids,
            rids=[str(row) for row in range(batch)],
            seq_lens_cpu=torch.full((batch,), BLOCK),
            dllm_prompt_mask=None,
        )
        _, found, accepted, states, _ = algorithm.run(model, forward_batch, states)
        if not fdfo:
            return torch.stack([*found])
        ids = torch.tensor(found).flatten()
        if all(accepted):
            return ids.view(batch, BLOCK)
    raise RuntimeError("the blocks do not end")


def config_of(vocabulary: int, fdfo: bool) -> DllmConfig:
    """A config of SGLang with our settings for a model of this vocabulary."""
    mask = vocabulary - 1
    config = DllmConfig(
        "LowConfidence", {"threshold": 0.95}, BLOCK, mask, 64, first_done_first_out_mode=fdfo
    )
    config.l2pd = SglangServer(
        policy_name="confidence_threshold",
        options={"threshold": 0.95},
        model=ModelContext("given", BLOCK, mask, vocabulary),
        end_of_text=EndOfText("block", (vocabulary - 2,)),
        suppress_mask=True,
    )
    return config


def ours(
    config: DllmConfig, policies: list[UnmaskPolicy], model: Given, fdfo: bool
) -> Callable[[], torch.Tensor]:
    """A decode of one block of every row by our algorithm."""
    algorithm = UnmaskPolicyAlgorithm(config)

    def run() -> torch.Tensor:
        requests = [Request(policy, config.mask_id) for policy in policies]
        for row, request in enumerate(requests):
            UnmaskPolicyAlgorithm.requests[str(row)] = request
        return decode(algorithm, model, config.mask_id, fdfo)

    return run


def against_sglang(batch: int, vocabulary: int, fdfo: bool, repeats: int) -> dict[str, Any]:
    """Our step and LowConfidence's on the same logits."""
    config, model = config_of(vocabulary, fdfo), Given(batch, vocabulary)
    policy = create_policy("confidence_threshold", threshold=0.95)
    stock = LowConfidence(config)
    ways: dict[str, Callable[[], object]] = {
        "LowConfidence": lambda: decode(stock, model, config.mask_id, fdfo),
        "ours": ours(config, [policy] * batch, model, fdfo),
    }
    tokens = [way() for way in ways.values()]
    assert torch.equal(*tokens), "the two algorithms commit different tokens"  # type: ignore[arg-type]
    return show(f"batch {batch}, vocabulary {vocabulary}, fdfo={fdfo}", ways, model, repeats)


def many_against_one(rows: int, vocabulary: int, fdfo: bool, repeats: int) -> dict[str, Any]:
    """Thresholds of their own against one threshold; eight policies against one."""
    config, model = config_of(vocabulary, fdfo), Given(rows, vocabulary)
    one = create_policy("confidence_threshold", threshold=0.95)
    own = [create_policy("confidence_threshold", threshold=0.9 + row / 1e4) for row in range(rows)]
    eight = [create_policy(name) for name in EIGHT]
    several = [eight[row % len(eight)] for row in range(rows)]
    ways: dict[str, Callable[[], object]] = {
        "one threshold": ours(config, [one] * rows, model, fdfo),
        "own thresholds": ours(config, own, model, fdfo),
    }
    if not fdfo:  # these end at different steps, for which that loop needs a scheduler
        ways["eight policies"] = ours(config, several, model, fdfo)
    return show(f"{rows} rows, vocabulary {vocabulary}, fdfo={fdfo}", ways, model, repeats)


def show(
    title: str, ways: dict[str, Callable[[], object]], model: Given, repeats: int
) -> dict[str, Any]:
    """Time the alternatives, and print the time of a step of each and its ratio to the first."""
    steps = {}
    for name, run in ways.items():
        run()
        steps[name] = model.steps
    taken = timed(ways, repeats, device=CPU, warm=False, clock=time.process_time)
    times = {n: Times(tuple(v / steps[n] for v in t.values)) for n, t in taken.items()}
    first = next(iter(times.values()))
    print(title)
    for name, found in times.items():
        print(f"  {name:16} {found}   {found.over(first)} of the first", flush=True)
    return {"case": title, "seconds": {name: found.values for name, found in times.items()}}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--batches", type=positive, nargs="+", default=[8, 32])
    parser.add_argument("--vocabulary", type=positive, default=157184)
    parser.add_argument("--rows", type=positive, default=256)
    parser.add_argument("--small-vocabulary", type=positive, default=1024)
    parser.add_argument("--repeats", type=positive, default=3)
    parser.add_argument("--json", type=output)
    args = parser.parse_args()
    results = []
    for fdfo in (False, True):
        results.append(many_against_one(args.rows, args.small_vocabulary, fdfo, args.repeats))
        for batch in args.batches:
            results.append(against_sglang(batch, args.vocabulary, fdfo, args.repeats))
    write(args.json, {"cases": results}, CPU)


if __name__ == "__main__":
    main()
