"""Decoding with several policies, so that what is finished is kept: after Ctrl-C it is shown, and
in the folder of --out it is found again by the next run.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from l2pd_plugins.policy_attributes import description_of
from l2pd_tools.cli.arguments import option
from l2pd_tools.cli.groups import Decoding, Drawing
from l2pd_tools.cli.kinds import OutFolder, quoted
from l2pd_tools.evaluation.comparison import Row, finished_rows, require_accepted

if TYPE_CHECKING:
    from l2pd_plugins import UnmaskPolicy
    from l2pd_tools.evaluation.prompts import Prompt

INTERRUPTED = 130
"""The exit code of a program that Ctrl-C ended."""

Out = Annotated[
    Path | None,
    option(
        OutFolder(),
        "Keep each policy's answers in this folder; the same command goes on with what is left.",
        "--out",
    ),
]


class Decodes:
    """The decodes of a command: the same prompts and settings with several policies."""

    def __init__(
        self, prompts: Sequence[Prompt], decoding: Decoding, drawing: Drawing, out: Path | None
    ) -> None:
        """Raises L2PDError if the folder was made from other prompts or settings."""
        self.prompts = prompts
        self.batch_size = decoding.batch_size
        self.settings = {**decoding.settings, **drawing.settings(len(prompts))}
        """As `evaluate` takes them, without the batch size."""
        self._out, self._called = out, f"--out {quoted(out)}"
        if out is None:
            return
        from l2pd_tools.evaluation.run_folder import inputs_of, require_same, seed_in

        if drawing.seed is None and self.settings["seed"] is not None:
            there = seed_in(out, self._called)
            self.settings["seed"] = self.settings["seed"] if there is None else there
        self._inputs = inputs_of(prompts, {**self.settings, "batch_size": self.batch_size})
        require_same(out, self._inputs, self._called)

    def rows(self, model: Any, tokenizer: Any, policies: Sequence[UnmaskPolicy]) -> list[Row]:
        """The policies' rows, in their order; after Ctrl-C those of the finished ones, see `end`.

        Raises L2PDError if a policy cannot decode on this model, before the first has run, and if
        the folder was made from another model.
        """
        require_accepted(model, policies, self.settings)
        settings = {**self.settings, "batch_size": self.batch_size}
        folder = None if self._out is None else self._folder(model)
        rows: dict[int, Row] = {}
        try:
            for place, row in finished_rows(
                model, tokenizer, self.prompts, policies, settings, folder
            ):
                rows[place] = row
        except KeyboardInterrupt:
            pass
        return [rows[place] for place in sorted(rows)]

    def end(self, rows: Sequence[Row], policies: Sequence[UnmaskPolicy]) -> None:
        """End the command if Ctrl-C has: with a line on stderr that names what is missing."""
        if len(rows) == len(policies):
            return
        done = [id(row.policy) for row in rows]
        missing = ", ".join(description_of(p) for p in policies if id(p) not in done)
        again = "" if self._out is None else "; the same command goes on with what is left"
        typer.echo(
            f"interrupted: {len(rows)} of {len(policies)} policies are finished, not {missing}"
            f"{again}",
            err=True,
        )
        raise typer.Exit(INTERRUPTED)

    def _folder(self, model: Any) -> Any:
        from l2pd_plugins import __version__
        from l2pd_plugins.trajectories import fingerprint
        from l2pd_tools.evaluation.run import hardware_of
        from l2pd_tools.evaluation.run_folder import RunFolder

        assert self._out is not None
        told = {
            "model_fingerprint": fingerprint(model.state_dict()),
            "hardware": hardware_of(model),
            "version": __version__,
        }
        return RunFolder(self._out, {**told, **self._inputs}, self._called)
