"""Measure how good answers on real text are, without a checker.

    python examples/text_dllm/quality.py runs/text-dllm/model --prompts runs/text/heldout.jsonl \
        --policy fixed_schedule --policy confidence_threshold,threshold=0.9

`nats_per_token` is the negative log-likelihood that the model itself assigns to the answers, with
the tokens in the order in which one token per step would commit them. `parses` is the share of
functions whose header and body together are valid Python.
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
from l2pd_tools.evaluation.run import encode_prompts, evaluate, left_padded
from l2pd_tools.loading import load_model
from l2pd_tools.policy_text import parse_policy


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model")
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--policy", action="append", required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = load_model(args.model, "cpu")
    prompts = read_prompts(args.prompts, args.limit)
    encoded = encode_prompts(tokenizer, prompts)
    for text in args.policy:
        found = evaluate(
            model, tokenizer, prompts, policy=parse_policy(text),
            max_new_tokens=args.max_new_tokens, batch_size=args.batch_size,
        )  # fmt: skip
        total: list[float] = []
        for start in range(0, len(prompts), args.batch_size):
            part = slice(start, start + args.batch_size)
            spoken = [answer.tokens for answer in found.answers[part]]
            total += nats(model, encoded[part], spoken, canvas=args.max_new_tokens)
        lengths = [answer.length for answer in found.answers]
        code = [a for a in found.answers if a.prompt.kind == "code"]
        line = {
            "policy": text,
            "nats_per_token": sum(total) / sum(lengths),
            "parses": sum(parses(a.prompt.text, a.text) for a in code) / max(1, len(code)),
            "tokens_per_forward": found.tokens_per_forward,
            "configuration": found.configuration,
            "nats": [round(x, 4) for x in total],
            "lengths": lengths,
            "nfe": [a.nfe for a in found.answers],
            "parsed": [parses(a.prompt.text, a.text) for a in code],
        }
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
