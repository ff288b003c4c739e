"""Measure how good answers on real text are, without a checker.

    python examples/text_dllm/quality.py runs/text-dllm/model --prompts runs/text/heldout.jsonl \
        --policy fixed_schedule --policy confidence_threshold,threshold=0.9

It prints a table. "Nats" is the negative log-likelihood that the model itself assigns to the
answers, per token, with the tokens in the order in which one token per step would commit them.
"Lost" is the difference to the answers of one token per step, with the paired 95 % interval over
the prompts. "Parses" is the percentage of functions whose header and body together are valid
Python, "agreement" that of answers equal to those of one token per step, and "fallback" that of the
tokens that a policy's fallback decided.
"""

from __future__ import annotations

import argparse
import ast
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from l2pd_tools.evaluation.prompts import read_prompts
from l2pd_tools.evaluation.results import Answer, Evaluation
from l2pd_tools.evaluation.run import encode_prompts, evaluate, left_padded
from l2pd_tools.loading import load_model
from l2pd_tools.policy_text import parse_policy

REFERENCE = "fixed_schedule"
"""One token per step."""
DRAWS = 2000
HEADER = """| policy | TPF | nats | lost | parses | agreement | fallback |
|---|---:|---:|---|---:|---:|---:|"""


@torch.inference_mode()
def nats(
    model: Any, prompts: Sequence[Tensor], answers: Sequence[Sequence[int]], *, canvas: int
) -> list[float]:
    """The negative log-likelihood of each answer, in nats, summed over its tokens.

    Blocks go from left to right. At each step the position with the highest confidence in the block
    gets the answer's token. Once the answer's end-of-text token is placed, the canvas after it is
    cut off. `prompts` are token ids, (P,) each; answers have at most `canvas` tokens.
    """
    block, mask = model.config.block_length, model.config.mask_token_id
    end = model.generation_config.eos_token_id
    inputs, attention = left_padded(list(prompts))
    first, count = inputs.shape[1], len(answers)
    tokens = torch.cat((inputs, torch.full((count, canvas), mask)), dim=1)
    attention = torch.cat((attention, torch.ones(count, canvas, dtype=attention.dtype)), dim=1)
    wanted, length = torch.full((count, canvas), mask), torch.tensor([len(a) for a in answers])
    for row, answer in enumerate(answers):
        wanted[row, : len(answer)] = torch.tensor(answer)
    total = torch.zeros(count)
    every = torch.arange(count)
    for begin in range(0, canvas, block):
        columns = torch.arange(begin, min(begin + block, canvas))
        open_ = columns < length[:, None]
        while open_.any():
            logits = model(input_ids=tokens, attention_mask=attention).logits
            scores = logits[:, first + columns].float()
            scores[..., mask] = -torch.inf
            scores = scores.log_softmax(-1)
            sure = torch.where(open_, scores.amax(-1), -torch.inf)
            at, active = sure.argmax(-1), open_.any(-1)
            token = wanted[every, columns[at]]
            total -= torch.where(active, scores[every, at, token], 0.0)
            rows = every[active]
            tokens[rows, first + columns[at[rows]]] = token[rows]
            open_[rows, at[rows]] = False
            for row in rows[token[rows] == end].tolist():
                attention[row, first + int(length[row]) :] = 0
    return total.tolist()


def parses(header: str, body: str) -> bool:
    """Whether a function is valid Python; a body that the canvas's end cuts counts as it is."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ast.parse(f"{header}\n{body}")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def lost_of(nats: Sequence[float], answers: Sequence[Answer], best: Sequence[Answer],
            best_nats: Sequence[float]) -> tuple[float, float, float]:  # fmt: skip
    """Nats per token that answers lose against the reference's, and the paired 95 % interval."""
    values = [nats, best_nats, [a.length for a in answers], [a.length for a in best]]
    table = torch.tensor(values, dtype=torch.float64)

    def lost(sums: Tensor) -> Tensor:
        return sums[0] / sums[2] - sums[1] / sums[3]

    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(nats), (DRAWS, len(nats)), generator=generator)
    low, high = lost(table[:, drawn].sum(-1)).quantile(torch.tensor([0.025, 0.975]).double())
    return float(lost(table.sum(-1))), float(low), float(high)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model")
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--kind", choices=("code", "prose"), help="only prompts of this kind")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--policy", action="append", required=True)
    parser.add_argument("--out", type=Path, help="append every policy's row, with its answers")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = load_model(args.model, "cpu")
    prompts = [p for p in read_prompts(args.prompts) if args.kind in (None, p.kind)][: args.limit]
    encoded = encode_prompts(tokenizer, prompts)

    def measured(policy: str, reference: Sequence[Answer] | None) -> tuple[Evaluation, list[float]]:
        found = evaluate(
            model, tokenizer, prompts, policy=parse_policy(policy), reference_answers=reference,
            max_new_tokens=args.max_new_tokens, batch_size=args.batch_size,
        )  # fmt: skip
        total: list[float] = []
        for start in range(0, len(prompts), args.batch_size):
            part = slice(start, start + args.batch_size)
            spoken = [answer.tokens for answer in found.answers[part]]
            total += nats(model, encoded[part], spoken, canvas=args.max_new_tokens)
        return found, total

    best, best_nats = measured(REFERENCE, None)
    print(HEADER)
    for policy in args.policy:
        found, total = measured(policy, best.answers) if policy != REFERENCE else (best, best_nats)
        lost, low, high = lost_of(total, found.answers, best.answers, best_nats)
        code = [a for a in found.answers if a.prompt.kind == "code"]
        parsed = [parses(a.prompt.text, a.text) for a in code]
        row = {
            "policy": policy,
            "nats_per_token": sum(total) / sum(a.length for a in found.answers),
            "lost": [lost, low, high],
            "parses": sum(parsed) / len(parsed) if parsed else None,
            "agreement": 1.0 if found is best else found.agreement,
            "tokens_per_forward": found.tokens_per_forward,
            "fallback_share": found.fallback_share,
            "configuration": found.configuration,
        }
        shown = ["-" if row[name] is None else f"{100 * row[name]:.1f}"  # type: ignore[operator]
                 for name in ("parses", "agreement", "fallback_share")]  # fmt: skip
        cells = [f"`{policy}`", f"{found.tokens_per_forward:.2f}", f"{row['nats_per_token']:.3f}",
                 f"{lost:+.3f} [{low:+.3f}, {high:+.3f}]", *shown]  # fmt: skip
        print(f"| {' | '.join(cells)} |", flush=True)
        if args.out is not None:
            row |= {"texts": [a.text for a in found.answers], "nats": [round(x, 3) for x in total],
                    "lengths": [a.length for a in found.answers],
                    "nfe": [a.nfe for a in found.answers], "parsed": parsed}  # fmt: skip
            with args.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
