"""Rounds of collecting and training: what ``l2pd learn2pd train`` does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from l2pd_plugins import L2PDError, create_policy
from l2pd_plugins.policy import normalize_name
from l2pd_plugins.policy_attributes import description_of
from l2pd_plugins.trajectories import (
    Manifest,
    Trajectories,
    read_manifest,
    read_trajectories,
)
from l2pd_plugins.writing import require_writable, require_writable_folder, write_folder
from l2pd_policies.learn2pd import MonotoneFilter, UnmaskFilter
from l2pd_policies.learned.familiar import FILE as FAMILIAR
from l2pd_policies.learned.load_filter import load_filter
from l2pd_policies.learned.training import (
    Recipe,
    Trained,
    familiar_blocks,
    require_matplotlib,
    save_with_card,
)
from l2pd_policies.learned.training import train as fit
from l2pd_policies.settled import SignalFilter
from l2pd_tools.evaluation.prompts import Prompt
from l2pd_tools.evaluation.run import require_prompts
from l2pd_tools.policy_text import parse_policy
from l2pd_tools.progress import progress
from l2pd_tools.training.arguments import TRAIN, require_arguments, require_pair
from l2pd_tools.training.collecting import collect, place_among_processes

STARTING_POLICIES = ("oracle", "confidence_threshold,threshold=0.7", "confidence_threshold")
"""The policies whose states the first round is trained on."""


def train_filter(
    out: str | Path,
    data: str | Path,
    *,
    policy: str = "learn2pd",
    rounds: int = 0,
    load: Callable[[], tuple[Any, Any]] | None = None,
    prompts: Sequence[Prompt] = (),
    source: str = "prompts",
    max_new_tokens: int = 128,
    block_length: int | None = None,
    cache: str | None = None,
    batch_size: int = 16,
    epochs: int | None = None,
    false_positive_rate: float = 0.01,
    labels: str = "reference",
    seed: int = 0,
) -> Trained:
    """Train a filter on the trajectories in `data`, or make them there in rounds.

    With rounds, trajectories are written to ``data/round-0`` (those of the starting policies) and
    ``data/round-N`` (those of the previous round's filter), and after each round the filter is
    trained again on all of them. Without rounds, the arguments for collecting are not used.

    Args:
        load: makes the model and its tokenizer; called after everything else is checked.
        prompts: those to collect from.
        source: the name of the prompts in the manifest.
        max_new_tokens, block_length, cache: as `collect` takes them.

    Raises L2PDError for invalid arguments, before anything is written.
    """
    require_arguments(
        TRAIN,
        out=out,
        data=data,
        policy=policy,
        rounds=rounds,
        load=load,
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
    out, data = Path(out), Path(data)
    policy, (kind, recipe, own_decisions) = _recipe_of(policy)
    recipe = replace(
        recipe,
        epochs=epochs or recipe.epochs,
        false_positive_rate=false_positive_rate,
        seed=seed,
    )
    require_matplotlib()

    def fitted(
        trajectories: Trajectories, manifest: Manifest, compared: int | None, what: str
    ) -> Trained:
        with progress(recipe.epochs) as start:
            advance = start(what)
            return fit(
                kind,
                trajectories,
                recipe,
                block_length=None if kind.ANY_BLOCK_LENGTH else manifest.block_length,
                base_model=manifest.model,
                compared=compared,
                report=lambda epoch: advance(1),
            )

    facts: dict[str, Any] = {"policy": policy, "seed": seed, "rounds": rounds}
    if rounds == 0:
        manifest, trajectories = read_trajectories(data)
        require_writable_folder(out, f"--out {out}")
        trained = fitted(trajectories, manifest, compared_policy(manifest), "training")
    else:
        processes = place_among_processes()[1]
        if processes > 1:
            raise L2PDError(
                f"--rounds runs in one process, but there are {processes}; several can share "
                "`l2pd learn2pd collect`"
            )
        if load is None:
            raise L2PDError(
                f"rounds={rounds}: load is not given; expected {TRAIN['load'].expected}"
            )
        require_prompts(prompts)
        require_writable_folder(out, f"--out {out}")
        require_writable_folder(data / "filter-0", f"--data {data}")
        loaded = require_pair(load())
        parts: list[Trajectories] = []
        policies: list[Any] = [parse_policy(text) for text in STARTING_POLICIES]

        def one_round(number: int) -> tuple[Manifest, Trained]:
            folder = data / f"round-{number}"
            with progress(len(prompts)) as start:
                collect(
                    *loaded,
                    prompts,
                    folder,
                    policies=policies,
                    source=source,
                    max_new_tokens=max_new_tokens,
                    block_length=block_length,
                    cache=cache,
                    batch_size=batch_size,
                    labels=labels,
                    references_from=data / "round-0" if number else None,
                    progress=start(f"collecting, round {number} of {rounds}"),
                )
            manifest, trajectories = read_trajectories(folder)
            # Policies are numbered per folder; keep those of different rounds apart.
            shift = trajectories.policy + 1000 * number
            parts.append(replace(trajectories, policy=shift))
            everything = Trajectories.concatenate(parts)
            what = f"training, round {number} of {rounds}"
            compared = compared_policy(read_manifest(data / "round-0"))
            return manifest, fitted(everything, manifest, compared, what)

        manifest, trained = one_round(0)
        for number in range(1, rounds + 1):
            step = data / f"filter-{number - 1}"
            write_folder(step, trained.filter.save_pretrained)
            policies = [
                {**parse_policy(policy), "filter": str(step), **round_options}
                for round_options in own_decisions
            ]
            manifest, trained = one_round(number)
        write_folder(data / f"filter-{rounds}", trained.filter.save_pretrained)
    facts |= {
        "model": manifest.model,
        "prompts": f"{manifest.prompts}, {manifest.prompt_count}",
        "max_new_tokens": manifest.max_new_tokens,
        "block_length": manifest.block_length,
        "end_of_text": manifest.end_of_text,
        "dtype": manifest.dtype,
        "labels": manifest.labels,
        "cache": manifest.cache or "the model's default",
        "recipe": recipe,
    }
    save_with_card(trained, out, title=f"{policy} filter for {manifest.model}", facts=facts)
    return trained


def add_familiar(folder: Path, data: Path, *, policy: str) -> int:
    """Write into a filter's folder what blocks looked like in recorded trajectories, which should
    be of the prompts that it was trained on; the weights stay as they are.

    policy: one of `recipes`. Returns the number of examples that were kept. Raises L2PDError
    if the filter or the trajectories cannot be read, or the file cannot be written.
    """
    kind = _recipe_of(policy)[1][0]
    loaded = load_filter(kind, folder)
    require_writable(folder / FAMILIAR)
    manifest, trajectories = read_trajectories(data)
    if loaded.block_length not in (None, manifest.block_length):
        raise L2PDError(
            f"{data} holds blocks of {manifest.block_length} positions, the filter {folder} is for "
            f"blocks of {loaded.block_length}"
        )
    made = familiar_blocks(kind, trajectories, compared_policy(manifest))
    assert made is not None  # both kinds compare blocks
    made.save(folder)
    return len(made.reach)


def _recipe_of(policy: str) -> tuple[str, tuple[Any, Any, tuple[dict[str, Any], ...]]]:
    """The policy's name as in `recipes`, and its entry there. Raises L2PDError if it has none."""
    kinds = recipes()
    name = {normalize_name(name): name for name in kinds}.get(normalize_name(policy), policy)
    if name not in kinds:
        raise L2PDError(f"policy {policy!r} has no filter to train; choices: {', '.join(kinds)}")
    return name, kinds[name]


def compared_policy(manifest: Manifest) -> int | None:
    """The recorded policy whose blocks a filter's `Familiar` is made of: confidence_threshold at
    its default, if it was recorded, since it needs no filter; None for all policies.
    """
    default = description_of(create_policy("confidence_threshold"))
    return manifest.policies.index(default) if default in manifest.policies else None


def recipes() -> dict[str, tuple[Any, Any, tuple[dict[str, Any], ...]]]:
    """For each policy: class of the filter, recipe, and the options (careful and bold) with which
    it decodes the training prompts between rounds.
    """
    return {
        "learn2pd": (UnmaskFilter, Recipe(epochs=4000), ({"threshold": 0.9}, {"threshold": 0.7})),
        "learn2pd,variant=monotone": (
            MonotoneFilter,
            Recipe(
                epochs=20,
                batch_size=512,
                learning_rate=5e-3,
                decay=True,
                masked_only=True,
                check_every=5,
            ),
            ({"threshold": 0.95}, {"threshold": 0.85}),
        ),
        "settled": (
            SignalFilter,
            Recipe(epochs=60, batch_size=512, decay=True, masked_only=True, check_every=5),
            (
                {"threshold": 0.98, "risk": 0.05, "fallback": "none"},
                {"threshold": 0.9, "risk": 0.2, "fallback": "none"},
            ),
        ),
    }
