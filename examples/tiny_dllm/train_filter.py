"""Train the paper's Learn2PD filter (arXiv 2509.25188) on a model's own decodes.

    python examples/tiny_dllm/train_filter.py --model tiny-llada --out FOLDER

Reference decodes at one token per step; then the oracle replays them, and every step stores the
confidences of the block and which predictions equal the reference. The filter learns to tell them
apart. Prompts, not steps, are split into training and validation.
"""

from __future__ import annotations

import argparse
import copy
import random
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from l2pd_adapters.evaluation import Prompt, read_prompts
from l2pd_adapters.huggingface import load
from l2pd_adapters.tiny_models import training_prompts
from l2pd_plugins.denoising import StepOutcome
from l2pd_policies.learn2pd import UnmaskFilter
from l2pd_policies.oracle import Oracle


class WatchedOracle(Oracle):
    """The oracle; committed positions carry the model's present confidence, as the filter's do."""

    requires = Oracle.requires | {"committed"}


def collect(
    model, tokenizer, prompts: list[Prompt], max_new_tokens: int, batch_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Replay the oracle: confidences (N, L), correct (N, L), masked (N, L), one row per step."""
    confidence, correct, masked = [], [], []

    def watch(rows: list[int], blocks: list[int], outcome: StepOutcome) -> None:
        step = outcome.step
        assert step.reference is not None
        confidence.append(step.confidence)
        correct.append(step.x0 == step.reference)
        masked.append(step.masked)

    ordered = sorted(prompts, key=lambda prompt: len(prompt.text))
    for start in range(0, len(ordered), batch_size):
        chats = [
            [{"role": "user", "content": prompt.text}]
            for prompt in ordered[start : start + batch_size]
        ]
        inputs = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt"
        )
        model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            unmask_policy=WatchedOracle(),
            on_step=watch,
        )
        print(f"collected {min(start + batch_size, len(ordered))}/{len(ordered)} prompts")
    return torch.cat(confidence), torch.cat(correct), torch.cat(masked)


def train(
    filter_: UnmaskFilter,
    training: tuple[Tensor, Tensor, Tensor],
    validation: tuple[Tensor, Tensor, Tensor],
    epochs: int,
) -> float:
    """Full batch, AdamW, BCE over all positions, as the paper; keeps the best validation loss."""
    optimizer = torch.optim.AdamW(filter_.parameters(), lr=3e-3)
    best, kept = float("inf"), copy.deepcopy(filter_.state_dict())
    for epoch in range(epochs):
        loss = binary_cross_entropy_with_logits(filter_(training[0]), training[1].float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if epoch % 50 == 49:
            with torch.no_grad():
                held = binary_cross_entropy_with_logits(
                    filter_(validation[0]), validation[1].float()
                ).item()
            if held < best:
                best, kept = held, copy.deepcopy(filter_.state_dict())
    filter_.load_state_dict(kept)
    return best


@torch.no_grad()
def calibrate(filter_: UnmaskFilter, validation: tuple[Tensor, Tensor, Tensor]) -> float:
    """The lowest threshold at which at most 1 % of the accepted predictions are not final ones."""
    confidence, correct, masked = validation
    probability = filter_(confidence).sigmoid()
    for percent in range(50, 99):
        accepted = masked & (probability > percent / 100)
        if (accepted & ~correct).sum() <= 0.01 * accepted.sum():
            return percent / 100
    return 0.99


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny-llada")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--prompts", type=Path, default=training_prompts())
    parser.add_argument("--limit", type=int, default=800, help="prompts to use")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    torch.manual_seed(arguments.seed)
    started = time.perf_counter()
    model, tokenizer = load(arguments.model)
    prompts = read_prompts(arguments.prompts, arguments.limit)
    random.Random(arguments.seed).shuffle(prompts)
    held = max(1, len(prompts) // 5)
    parts = [
        collect(model, tokenizer, part, arguments.max_new_tokens, arguments.batch_size)
        for part in (prompts[held:], prompts[:held])
    ]
    collected = time.perf_counter()
    filter_ = UnmaskFilter(block_length=model.config.block_length, base_model=arguments.model)
    loss = train(filter_, parts[0], parts[1], arguments.epochs)
    threshold = calibrate(filter_, parts[1])
    made = UnmaskFilter(
        block_length=model.config.block_length, threshold=threshold, base_model=arguments.model
    )
    made.load_state_dict(filter_.state_dict())
    made.save_pretrained(arguments.out)
    print(
        f"{len(parts[0][0])} + {len(parts[1][0])} steps of {len(prompts)} prompts collected in "
        f"{collected - started:.0f} s, trained in {time.perf_counter() - collected:.0f} s; "
        f"validation loss {loss:.4f}, threshold {threshold}; saved to {arguments.out}"
    )


if __name__ == "__main__":
    main()
