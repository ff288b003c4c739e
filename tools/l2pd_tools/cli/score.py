"""`l2pd score`: the log-likelihoods of answers."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from l2pd_plugins import L2PDError
from l2pd_tools.cli import arguments
from l2pd_tools.cli.arguments import SEEDS_BELOW, option
from l2pd_tools.cli.groups import Form, Loading
from l2pd_tools.cli.kinds import Line, OneOf, PromptSource, PromptText, Whole, quoted
from l2pd_tools.progress import importing, say

if TYPE_CHECKING:
    from l2pd_tools.evaluation.prompts import Prompt
    from l2pd_tools.evaluation.scoring import Scored, Scores

ORDERS = ("left_to_right", "confidence")
"""Those of `l2pd_adapters.huggingface.likelihood`, which imports torch."""
_MOST_SAMPLES = 2**20


def score(
    *,
    prompt: Annotated[
        str | None,
        typer.Argument(parser=PromptText(), help="The prompt.", show_default="those of --file"),
    ] = None,
    answers: Annotated[
        list[str] | None,
        typer.Argument(parser=PromptText(), help="Answers to the prompt.", show_default=False),
    ] = None,
    file: Annotated[
        str | None,
        option(PromptSource(), "Rows of .jsonl, .json, .csv or a data set.", "--file", "--prompts"),
    ] = None,
    answer_field: Annotated[
        str | None,
        option(
            Line("a field's name"),
            "Field with the answer, or a list of them.",
            show_default="answer",
        ),
    ] = None,
    limit: arguments.PromptLimit = None,
    form: Form,
    loading: Loading,
    samples: Annotated[
        int,
        option(Whole(1, _MOST_SAMPLES), "Maskings of each answer; all, where it has no more."),
    ] = 128,
    seed: Annotated[int, option(Whole(0, SEEDS_BELOW - 1), "Seed of the maskings.")] = 0,
    order: Annotated[
        str | None,
        option(
            OneOf(ORDERS),
            "Of decoding one token after the other, instead of maskings.",
            show_default="none",
        ),
    ] = None,
    with_end: Annotated[
        bool, typer.Option("--with-end", help="Count the end-of-text token after the answer, too.")
    ] = False,
    batch_size: Annotated[
        int, option(Whole(1, arguments.MOST_ROWS), "Maskings per forward pass.")
    ] = 32,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say how likely answers are.

    Each line has the log-likelihood in nats, its standard error, the perplexity per token, and, of
    several answers to one prompt, the probability of each among them.
    """
    if (prompt is None) == (file is None):
        told = "both are given" if prompt is not None else "neither is given"
        raise L2PDError(f"expected a prompt with its answers, or --file; {told}")
    if prompt is not None and not answers:
        raise L2PDError(f"the prompt {quoted(prompt)} has no answer; expected one after it")
    prompts, texts = _asked(prompt, answers, file, answer_field, limit, form)
    with importing():
        from l2pd_tools.evaluation.scoring import score as scored

    model, tokenizer = loading.load()
    estimate = {"samples": samples, "seed": seed, "order": order}
    found = scored(
        model, tokenizer, prompts, texts, with_end=with_end, batch_size=batch_size, **estimate
    )
    if as_json:
        typer.echo(json.dumps(_as_json(found)))
    else:
        for each in found.answers:
            _print_answers(each)
    say(f"{found.configuration} perplexity={found.perplexity:.4g}")


def _asked(
    prompt: str | None,
    answers: list[str] | None,
    file: str | None,
    field: str | None,
    limit: int | None,
    form: Form,
) -> tuple[list[Prompt], list[list[str]]]:
    """The prompts, and the answers of each."""
    from l2pd_tools.cli.prompt_files import STDIN, prompts_of
    from l2pd_tools.evaluation.prompts import Prompt

    wanted = form.form
    if prompt is not None:
        for name, value in (
            ("--limit", limit),
            ("--answer-field", field),
            ("--prompt-field", form.prompt_field),
            ("--prompt-format", form.prompt_format),
        ):
            if value is not None:
                raise L2PDError(f"{name} {quoted(value)}: only for prompts of a file")
        return [Prompt(prompt, "1", before=wanted.before, raw=wanted.raw)], [list(answers or ())]
    assert file is not None
    if file == STDIN:
        raise L2PDError("--file -: answers are not read from stdin; expected a file or a data set")
    from l2pd_tools.evaluation.answer_fields import ANSWER, answers_of

    return prompts_of(file, limit, wanted), answers_of(file, field or ANSWER, wanted.format, limit)


def _print_answers(answers: tuple[Scored, ...]) -> None:
    from l2pd_tools.evaluation.scoring import shares

    for each, share in zip(answers, shares(answers), strict=True):
        found = each.likelihood
        among = f" p={share:.4f}" if len(answers) > 1 else ""
        typer.echo(
            f"{found.value:.4f} +-{found.standard_error:.4f} perplexity={found.perplexity:.4g}"
            f"{among}\t{json.dumps(each.answer, ensure_ascii=False)}"
        )


def _as_json(found: Scores) -> dict[str, Any]:
    from l2pd_tools.evaluation.scoring import shares

    return {
        "configuration": found.configuration,
        "perplexity": found.perplexity,
        "prompts": [
            {
                "id": answers[0].prompt.id,
                "prompt": answers[0].prompt.text,
                "answers": [
                    {
                        "answer": each.answer,
                        "log_likelihood": each.likelihood.value,
                        "standard_error": each.likelihood.standard_error,
                        "tokens": each.likelihood.tokens,
                        "nfe": each.likelihood.nfe,
                        "probability_among": share,
                    }
                    for each, share in zip(answers, shares(answers), strict=True)
                ],
            }
            for answers in found.answers
        ],
    }
