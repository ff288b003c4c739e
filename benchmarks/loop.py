"""A whole generate against a plain loop with the same policy and the same tokens.

    python benchmarks/loop.py                                    # all of it, about half an hour
    python benchmarks/loop.py --batches 16 --lengths 256 --json FILE

The plain loop is that of the published `generate` functions of LLaDA and Fast-dLLM (see plain.py).
Prints seconds per token of the answers, forward passes per sequence, and the ratios. The tokens of
both loops are compared up to the end of text; with --end-of-text off they must be equal.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from measuring import timed, write
from plain import Rule, above_threshold, fixed_number, plain_loop

from l2pd_adapters.huggingface import load
from l2pd_adapters.huggingface.evaluation import read_prompts
from l2pd_adapters.tiny_models import heldout_prompts

RULES: dict[str, tuple[dict[str, Any], Rule]] = {
    "fixed_schedule": ({"tokens_per_step": 1}, fixed_number(1)),
    "confidence_threshold": ({"threshold": 0.9}, above_threshold(0.9)),
}


def compare(
    model: Any, inputs: dict[str, torch.Tensor], policy: str, rule: str, length: int, repeats: int
) -> dict[str, Any]:
    """Both loops on one batch, in turns."""
    options, plain_rule = RULES[policy]
    block_length = model.config.block_length
    last: dict[str, Any] = {}

    def ours() -> None:
        last["ours"] = model.generate(
            **inputs,
            max_new_tokens=length,
            block_length=block_length,
            unmask_policy=policy,
            unmask_options=options,
            end_of_text=rule,
            return_dict_in_generate=True,
        )

    def plain() -> None:
        last["plain"] = plain_loop(
            model,
            **inputs,
            rule=plain_rule,
            mask_token_id=model.config.mask_token_id,
            max_new_tokens=length,
            block_length=block_length,
        )

    times = timed({"ours": ours, "plain": plain}, repeats)
    out, (tokens, forwards) = last["ours"], last["plain"]
    prompt = inputs["input_ids"].shape[1]
    lengths = out.trace.length.tolist()
    same = [
        torch.equal(out.sequences[row, prompt : prompt + n], tokens[row, :n])
        for row, n in enumerate(lengths)
    ]
    ratio = times["plain"].over(times["ours"])
    return {
        "policy": policy,
        "end_of_text": rule,
        "batch": len(tokens),
        "length": length,
        "tokens": sum(lengths),
        "equal_answers": sum(same) / len(same),
        "nfe": out.nfe.float().mean().item(),
        "plain_nfe": forwards,
        "seconds": times["ours"].seconds,
        "plain_seconds": times["plain"].seconds,
        "milliseconds_per_token": 1e3 * times["ours"].median / sum(lengths),
        "plain_milliseconds_per_token": 1e3 * times["plain"].median / sum(lengths),
        "speedup": ratio.median,
        "speedup_spread": [min(ratio.values), max(ratio.values)],
    }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny-llada")
    parser.add_argument("--policies", nargs="+", choices=RULES, default=["confidence_threshold"])
    parser.add_argument(
        "--end-of-text", nargs="+", choices=["block", "off"], default=["block", "off"]
    )
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 256, 512, 1024])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    model, tokenizer = load(arguments.model)
    results = []
    for batch in arguments.batches:
        chats = [
            [{"role": "user", "content": prompt.text}]
            for prompt in read_prompts(heldout_prompts(), batch)
        ]
        inputs = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, return_dict=True, return_tensors="pt", padding=True
        )
        inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        for length in arguments.lengths:
            for rule in arguments.end_of_text:
                for policy in arguments.policies:
                    found = compare(model, inputs, policy, rule, length, arguments.repeats)
                    results.append(found)
                    print(
                        f"{policy} end_of_text={rule} batch={batch} gen={length}: "
                        f"{found['milliseconds_per_token']:.3f} ms/token, "
                        f"plain {found['plain_milliseconds_per_token']:.3f}, "
                        f"speedup {found['speedup']:.2f}x {found['speedup_spread']}; "
                        f"NFE {found['nfe']:.1f}, plain {found['plain_nfe']}; "
                        f"equal answers {found['equal_answers']:.0%}",
                        flush=True,
                    )
    write(arguments.json, results)


if __name__ == "__main__":
    main()
