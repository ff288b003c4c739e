"""Train a small dLLM on the small world.

    python examples/tiny_dllm/train.py --out runs/tiny-llada --seconds 2700
    python examples/tiny_dllm/train.py --architecture sdar --out runs/tiny-sdar --seconds 2700
    python examples/tiny_dllm/train.py --cacheable 0.1 --start-from runs/tiny-llada/model --out ...

Runs two processes of one thread each by default (`--processes`). `--out` gets `checkpoint.pt`
(resumable with `--resume`), `model/` (the native transformers checkpoint of the averaged weights)
and `training_log.jsonl`.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, get_args

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.nn import functional as F

from batches import Batch, Example, bidirectional_batches, block_causal_batches, blocks_of
from evaluate import evaluate, summary
from l2pd_tools.tiny_world import TASKS
from model import Architecture, Shape, TinyModel, export, load
from tasks import GENERATORS, distinct_prompts, sample
from tokenizer import encode, prompt_ids

NAMES = list(GENERATORS)
EMA = 0.99
EVEN_SHARE = 0.25  # added to every task's failure rate, so that learnt tasks are still drawn
WARM_UP = 20


@dataclass
class Progress:
    step: int = 0
    seconds: float = 0.0
    validity: dict[str, float] = field(default_factory=dict)  # of every task, last measured


# data


def make_step(
    rng: Random,
    progress: Progress,
    done: float,
    boost: dict[str, float],
    architecture: Architecture,
    cacheable: bool = False,
    rows: int = 96,
) -> list[Batch]:
    """The micro-batches of one process and step; tasks that fail often are drawn more often."""
    # The loss is not a usable measure: for a coupled task it stays high however well it is learnt.
    chances = [
        (EVEN_SHARE + 1.0 - progress.validity.get(name, 0.0)) * boost.get(name, 1.0)
        for name in NAMES
    ]
    examples: list[Example] = []
    for task in rng.choices(range(len(NAMES)), chances, k=rows):
        example = _example(task, rng)
        if architecture == "sdar" and rng.random() < 0.5:
            # Answers that continue in another block are harder.
            example = max([example, *(_example(task, rng) for _ in range(3))], key=blocks_of)
        examples.append(example)
    if architecture == "sdar":
        return block_causal_batches(examples, rng)
    return bidirectional_batches(examples, done, rng, cacheable)


def _example(task: int, rng: Random) -> Example:
    exercise = sample(NAMES[task], rng)
    return task, prompt_ids(exercise.prompt), encode(exercise.answer)


# optimisation


def make_optimizers(model: TinyModel) -> list[torch.optim.Optimizer]:
    matrices = [p for n, p in model.named_parameters() if "layers" in n and p.dim() == 2]
    others = [p for n, p in model.named_parameters() if "layers" not in n or p.dim() != 2]
    return [
        torch.optim.Muon(matrices, lr=0.02, momentum=0.95, ns_steps=5, weight_decay=0.0),
        torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def schedule(step: int, done: float) -> float:
    """Warm up, constant to 60 %, then linear to 2 %."""
    return min(1.0, (step + 1) / WARM_UP) * (1.0 - 0.98 * max(0.0, done - 0.6) / 0.4)


def margin(done: float) -> float:
    """The margin of the penalty: it grows from 2 to 12 nats until 60 % of the training is done.

    Log odds of attending to later blocks that are below minus this margin are hardly penalised.
    """
    return 2.0 + 10.0 * min(1.0, done / 0.6)


def train_step(
    model: TinyModel, batches: list[Batch], device: torch.device, done: float, cacheable: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Run forward and backward through all micro-batches.

    Returns the summed loss and the summed weight of every task, and for every layer the share of
    the attention that goes to later blocks.
    """
    loss_of, weight_of = torch.zeros(len(NAMES)), torch.zeros(len(NAMES))
    rows = sum(len(batch.tokens) for batch in batches)
    leak = torch.zeros(model.shape.layers)
    for batch in batches:
        tokens, valid = batch.tokens.to(device), batch.valid.to(device)
        penalty: Tensor | float = 0.0
        if batch.blocks is None:
            hidden = model(tokens, valid, torch.bfloat16)
        else:
            hidden, odds = model.look_ahead(
                tokens, valid, batch.blocks.to(device), closed=batch.closed, dtype=torch.bfloat16
            )
            odds = [of_layer[of_layer > -1e8] for of_layer in odds]
            penalty = sum(F.softplus(x + margin(done)).mean() for x in odds) * cacheable
            leak += torch.stack([x.detach().sigmoid().mean() for x in odds]).cpu() / len(batches)
        where = batch.weights > 0
        logits = model.lm_head(hidden[where.to(device)]).float()
        losses = F.cross_entropy(logits, batch.targets[where].to(device), reduction="none")
        weights = batch.weights[where]
        weighted = losses * weights.to(device)
        loss = weighted.sum() / weights.sum() + penalty
        (loss * len(batch.tokens) / rows).backward()
        task = batch.task[:, None].expand_as(where)[where]
        loss_of.index_add_(0, task, weighted.detach().cpu())
        weight_of.index_add_(0, task, weights)
    return loss_of, weight_of, leak


def reduce_gradients(parameters: list[Tensor], extra: Tensor) -> Tensor:
    """Average the gradients over the processes and sum `extra`, in one all-reduce."""
    flat = torch.cat([p.grad.flatten().cpu() for p in parameters] + [extra])
    if dist.is_initialized():
        dist.all_reduce(flat)
    world = dist.get_world_size() if dist.is_initialized() else 1
    gradients, extra = flat[: -len(extra)] / world, flat[-len(extra) :]
    for p, piece in zip(parameters, gradients.split([p.numel() for p in parameters]), strict=True):
        p.grad.copy_(piece.view_as(p))
    return extra


# the run


def run(rank: int, args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    torch._dynamo.config.recompile_limit = 64
    torch.manual_seed(args.seed)
    device = torch.device(args.device)
    if args.processes > 1:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(args.port)}
        dist.init_process_group("gloo", rank=rank, world_size=args.processes)
    shape = Shape(architecture=args.architecture)
    model = load(args.start_from, args.architecture) if args.start_from else TinyModel(shape)
    model = model.to(device).train()
    average = copy.deepcopy(model)
    optimizers, progress = make_optimizers(model), Progress()
    checkpoint = args.out / "checkpoint.pt"
    if args.resume:
        saved = torch.load(checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(saved["model"])
        average.load_state_dict(saved["average"])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        progress = Progress(**saved["progress"])
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group.setdefault("peak", group["lr"])
    if not args.no_compile:
        model.compile_layers()

    parameters = list(model.parameters())
    boost = {name: float(value) for name, value in (item.split("=") for item in args.boost)}
    before, began, reported = progress.seconds, time.perf_counter(), time.perf_counter()
    recent = torch.zeros(2, len(NAMES))  # running loss and weight of every task
    validated, done, tokens = progress.seconds, 0.0, 0
    validation = distinct_prompts("train", 12, args.seed + 1)[rank :: args.processes]
    while True:
        # Every process needs the same clock: that of rank 0 is sent with the gradients.
        rng = Random(f"{args.seed}/{rank}/{progress.step}")
        batches = make_step(rng, progress, done, boost, args.architecture, args.cacheable > 0)
        tokens += sum(batch.tokens.numel() for batch in batches)
        loss_of, weight_of, leak = train_step(model, batches, device, done, args.cacheable)
        elapsed = before + time.perf_counter() - began if rank == 0 else 0.0
        extra = reduce_gradients(parameters, torch.cat([loss_of, weight_of, Tensor([elapsed])]))
        loss_of, weight_of, clock = extra.split([len(NAMES), len(NAMES), 1])
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * args.rate * schedule(progress.step, done)
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), parameters, 1 - EMA)
        recent.lerp_(torch.stack([loss_of, weight_of]), 0.02)
        progress.step += 1
        progress.seconds = float(clock)
        done = progress.step / args.steps if args.steps else progress.seconds / args.seconds
        finished = done >= 1.0
        if rank == 0 and (progress.step % 50 == 0 or finished):
            now = time.perf_counter()
            losses = (recent[0] / recent[1].clamp(min=1e-9)).tolist()
            leaks = {"leak": [float(f"{x:.2g}") for x in leak]} if args.cacheable else {}
            _log(args.out, step=progress.step, seconds=round(progress.seconds, 1), **leaks,
                 loss=round(float(loss_of.sum() / weight_of.sum()), 4),
                 losses={n: round(x, 4) for n, x in zip(NAMES, losses, strict=True)},
                 tokens_per_second=round(tokens * args.processes / (now - reported)))  # fmt: skip
            reported, tokens = now, 0
        if finished or progress.seconds - validated >= args.validate_every:
            validated = progress.seconds
            _validate(average, validation, rank, progress, args)
            if rank == 0:
                _save(args.out, model, average, optimizers, progress)
        if finished:
            break
    if dist.is_initialized():
        dist.destroy_process_group()


def _validate(
    model: TinyModel,
    rows: list[dict[str, Any]],
    rank: int,
    progress: Progress,
    args: argparse.Namespace,
) -> None:
    """Measure every task on a few prompts of the training split; each process decodes a share."""
    scored = evaluate(model, rows, gen_length=128, dtype=torch.bfloat16)
    gathered: list[Any] = [scored]
    if dist.is_initialized():
        gathered = [None] * args.processes
        dist.all_gather_object(gathered, scored)
    table = summary([row for part in gathered for row in part])
    progress.validity = {name: table[name]["valid"] for name in NAMES}
    if rank == 0:
        valid = {name: round(line["valid"], 3) for name, line in sorted(table.items())}
        _log(args.out, step=progress.step, seconds=round(progress.seconds, 1), valid=valid)


def _save(
    out: Path,
    model: TinyModel,
    average: TinyModel,
    optimizers: list[torch.optim.Optimizer],
    progress: Progress,
) -> None:
    state = {
        "model": model.state_dict(),
        "average": average.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "progress": vars(progress),
    }
    torch.save(state, out / "checkpoint.new")
    os.replace(out / "checkpoint.new", out / "checkpoint.pt")
    export(average, out / "model")


def _log(out: Path, **entry: Any) -> None:
    with (out / "training_log.jsonl").open("a") as file:
        file.write(json.dumps(entry) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--seconds", type=float, help="of training, resumed parts included")
    length.add_argument("--steps", type=int)
    parser.add_argument("--architecture", choices=get_args(Architecture), default="llada")
    parser.add_argument("--start-from", type=Path, metavar="FOLDER", help="weights of a checkpoint")
    parser.add_argument("--rate", type=float, default=1.0, help="factor on the learning rates")
    parser.add_argument(
        "--cacheable", type=float, default=0.0, metavar="WEIGHT",
        help="of the penalty on attention to later blocks, which makes caches exact",
    )  # fmt: skip
    parser.add_argument("--resume", action="store_true", help="continue from OUT/checkpoint.pt")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--port", type=int, default=29511)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--validate-every", type=float, default=300, metavar="SECONDS")
    parser.add_argument("--boost", nargs="*", default=[], metavar="TASK=FACTOR")
    args = parser.parse_args()
    unknown = {item.split("=")[0] for item in args.boost} - TASKS.keys()
    if unknown:
        parser.error(f"unknown tasks: {', '.join(sorted(unknown))}")
    if args.cacheable and args.architecture != "llada":
        parser.error(f"--cacheable requires llada; {args.architecture} never sees later blocks")
    args.out.mkdir(parents=True, exist_ok=True)
    if args.processes > 1:
        mp.spawn(run, (args,), nprocs=args.processes)
    else:
        run(0, args)


if __name__ == "__main__":
    main()
