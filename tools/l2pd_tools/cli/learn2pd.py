"""`l2pd learn2pd`: from a model and prompts to a trained filter."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from l2pd_plugins import L2PDError
from l2pd_plugins.files import is_there
from l2pd_plugins.writing import require_writable_folder, write_folder
from l2pd_tools.cli import arguments, reports
from l2pd_tools.cli.arguments import MOST_PROMPTS, POLICY_HELP, PROMPT_HELP, SEEDS_BELOW, option
from l2pd_tools.cli.examining import examined
from l2pd_tools.cli.groups import Loading, Prompting
from l2pd_tools.cli.kinds import (
    InFile,
    InFolder,
    Line,
    Model,
    Number,
    OneOf,
    OutFolder,
    PolicyText,
    PromptSource,
    Whole,
    quoted,
)
from l2pd_tools.cli.needing_torch import policy_of
from l2pd_tools.cli.usage import Commands
from l2pd_tools.cli.verbosity import reporting
from l2pd_tools.progress import importing, progress, say

if TYPE_CHECKING:
    from l2pd_tools.evaluation.prompts import Prompt

app = typer.Typer(
    cls=Commands, help="Collect trajectories and train filters.", no_args_is_help=True
)

COLLECTING = (
    *(field.name for group in (Loading, Prompting) for field in fields(group)),
    "max_new_tokens",
    "block_length",
    "cache",
    "batch_size",
    "labels",
)
"""Arguments of training that control how its rounds collect trajectories."""
Prompts = Annotated[
    str | None,
    option(
        PromptSource(),
        f"Prompts like those that you will serve: {PROMPT_HELP[:1].lower()}{PROMPT_HELP[1:]}",
        show_default="the shipped training prompts",
    ),
]


LABELS = ("reference", "consistent")
"""`l2pd_plugins.trajectories.LABELS`, spelled out here because that module imports torch."""
PROGRESS = ("argmax_if_empty", "always_top1", "leftmost_if_empty")
"""`l2pd_plugins.policy.PROGRESS_RULES`, likewise."""
TRAINABLE = ("learn2pd", "learn2pd,variant=monotone", "settled")
"""The policies that have a filter, see `l2pd_tools.training.rounds.recipes`."""
FILTER_FILES = ("config.json", "model.safetensors")
"""The files of a filter's folder."""
MOST_EPOCHS = 10**6
MOST_ROUNDS = 1000
LARGEST_SHARD = 2**31 - 1
"""Greatest number of prompts per shard, as in the manifest."""

LabelRule = Annotated[
    str,
    option(
        OneOf(LABELS),
        "Which predictions are right: those equal to the reference decode's token, or, for "
        "prompts with several answers, those consistent with the surer predictions.",
    ),
]


@dataclass(frozen=True)
class TrainingPrompts(Prompting):
    """Which prompts are trained on."""

    prompts: Prompts = None
    limit: Annotated[
        int | None, option(Whole(2, MOST_PROMPTS), "Use only the first N prompts.")
    ] = None


@app.command()
@reporting
@examined
def collect(
    *,
    out: Annotated[Path, option(OutFolder(), "Folder for the trajectories.")],
    loading: Loading,
    prompting: TrainingPrompts,
    policy: Annotated[
        list[str] | None,
        option(
            PolicyText(), f"Policy whose states to record: {POLICY_HELP}", show_default="oracle"
        ),
    ] = None,
    max_new_tokens: arguments.MaxNewTokens = 128,
    block_length: arguments.BlockLength = None,
    cache: arguments.Cache = None,
    batch_size: arguments.BatchSize = 16,
    prompts_per_shard: Annotated[
        int,
        option(Whole(1, LARGEST_SHARD), "A run that is stopped loses at most one shard's work."),
    ] = 64,
    labels: LabelRule = "reference",
) -> None:
    """Record reference decodes and the states that policies reach.

    The same command resumes a stopped run. Several processes can share the work: accelerate launch
    -m l2pd_tools.cli learn2pd collect ...
    """
    source, chosen = _prompts(prompting)
    with importing():
        from l2pd_tools.training.collecting import collect as run
        from l2pd_tools.training.collecting import share_of_prompts

        policies = [policy_of(text) for text in policy or ["oracle"]]
    loaded = loading.load()
    with progress(share_of_prompts(len(chosen), prompts_per_shard)) as start:
        manifest = run(
            *loaded,
            chosen,
            out,
            policies=policies,
            source=source,
            max_new_tokens=max_new_tokens,
            block_length=block_length,
            cache=cache,
            batch_size=batch_size,
            prompts_per_shard=prompts_per_shard,
            labels=labels,
            progress=start(f"collecting into {out}"),
        )
    for line in reports.collected(out, manifest):
        typer.echo(line)
    say(f"next: {reports.training_command(out, policy or ['oracle'])}")


FilterFolder = Annotated[Path, option(OutFolder(), "Folder for the filter.")]
Force = Annotated[
    bool, typer.Option("--force", help="Replace the filter that the folder already holds.")
]


@app.command()
@reporting
@examined
def train(
    *,
    context: typer.Context,
    out: FilterFolder,
    data: Annotated[
        Path,
        option(
            InFolder(there=False),
            "Folder of trajectories; with --rounds, they are collected there.",
        ),
    ],
    policy: Annotated[
        str, typer.Option(parser=OneOf(TRAINABLE, loosely=True), help=f"{', '.join(TRAINABLE)}.")
    ] = "learn2pd",
    rounds: Annotated[
        int, option(Whole(0, MOST_ROUNDS), "Rounds of decoding with the filter and training again.")
    ] = 0,
    loading: Loading,
    prompting: TrainingPrompts,
    max_new_tokens: arguments.MaxNewTokens = 128,
    block_length: arguments.BlockLength = None,
    cache: arguments.Cache = None,
    batch_size: arguments.BatchSize = 16,
    epochs: Annotated[int | None, option(Whole(1, MOST_EPOCHS), show_default="by policy")] = None,
    false_positive_rate: Annotated[
        float, option(Number(0, 1), "Share of the wrong predictions that the threshold may accept.")
    ] = 0.01,
    labels: LabelRule = "reference",
    seed: Annotated[int, option(Whole(0, SEEDS_BELOW - 1))] = 0,
    force: Force = False,
) -> None:
    """Train a filter on trajectories; with --rounds N, on the states of its own decisions too.

    Train on prompts like those that you will serve. On other kinds of text a filter can ruin
    answers: docs/learned_policies.md, "Prompts unlike those trained on".
    """
    sources = {name: context.get_parameter_source(name) for name in COLLECTING}
    given = [name for name, source in sources.items() if source and source.name == "COMMANDLINE"]
    if rounds == 0 and given:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise L2PDError(f"{options}: only with --rounds, which collects trajectories")
    _require_no_filter(out, force)
    source, chosen = _prompts(prompting) if rounds else ("", [])
    if rounds:
        loading.require()
    with importing():
        from l2pd_tools.training.rounds import train_filter
    trained = train_filter(
        out,
        data,
        policy=policy,
        rounds=rounds,
        load=loading.load,
        prompts=chosen,
        source=source,
        max_new_tokens=max_new_tokens,
        block_length=block_length,
        cache=cache,
        batch_size=batch_size,
        epochs=epochs,
        false_positive_rate=false_positive_rate,
        labels=labels,
        seed=seed,
    )
    for line in reports.trained_filter(out, policy, trained):
        typer.echo(line)
    model = loading.model if rounds else _model_of(trained.filter.base_model)
    say(f"next: {reports.comparing_command(out, policy, model)}")


@app.command()
@examined
def familiar(
    folder: Annotated[Path, typer.Argument(parser=InFolder(), help="The filter's folder.")],
    data: Annotated[
        Path,
        typer.Option(
            parser=InFolder(),
            metavar=InFolder.metavar,
            help="Folder of trajectories of the prompts that the filter was trained on.",
        ),
    ],
    policy: Annotated[
        str,
        typer.Option(parser=OneOf(TRAINABLE, loosely=True), help=f"{', '.join(TRAINABLE)}."),
    ] = "settled",
) -> None:
    """Record in a filter's folder what blocks looked like in its training.

    Blocks unlike these are then decided by the policy's fallback, not by the filter. `train` does
    this by itself; the command is for filters that were trained before.
    """
    from l2pd_tools.training.rounds import add_familiar

    count = add_familiar(folder, data, policy=policy)
    typer.echo(f"{folder}: {count} examples of blocks")


@app.command()
@examined
def convert(
    file: Annotated[Path, typer.Argument(parser=InFile(), help="The authors' .pth file.")],
    out: FilterFolder,
    threshold: Annotated[
        float, option(Number(0, 1, open=True), "As in the authors' LLaDA script.")
    ] = 0.96,
    progress: Annotated[
        str, typer.Option(parser=OneOf(PROGRESS), help="As in the authors' code.")
    ] = "always_top1",
    base_model: Annotated[
        str, option(Line("a model's name"), "The model that the filter is for.")
    ] = "GSAI-ML/LLaDA-8B-Instruct",
    force: Force = False,
) -> None:
    """Turn the authors' released filter into a filter folder. No code of the file is run."""
    from l2pd_policies.learn2pd.convert import convert as read

    _require_no_filter(out, force)
    require_writable_folder(out, f"--out {out}")
    made = read(file, threshold=threshold, progress=progress, base_model=base_model)
    write_folder(out, made.save_pretrained, f"--out {out}")
    typer.echo(f"{out}: a filter for blocks of {made.block_length} positions")


def _require_no_filter(out: Path, force: bool) -> None:
    """Raise L2PDError if the folder holds a filter, unless it may be replaced."""
    if not force and any(is_there(out / name) for name in FILTER_FILES):
        raise L2PDError(
            f"--out {quoted(out)} already holds a filter; name another folder, or replace it with "
            "--force"
        )


def _model_of(name: str) -> str:
    """The name of the model that made the trajectories, or a word to be replaced if --model does
    not take it: a folder that is not here, or a model with an adapter.
    """
    try:
        Model().examine(name, name)
    except L2PDError:
        return "MODEL"
    return name


def _prompts(prompting: Prompting) -> tuple[str, list[Prompt]]:
    """The name of the prompts in the manifest, which holds no folders, and the prompts."""
    from l2pd_adapters.tiny_models import training_prompts
    from l2pd_tools.evaluation.prompt_sources import is_hub

    source, prompts = prompting.read(training_prompts())
    return source if is_hub(source) else Path(source).name, prompts
