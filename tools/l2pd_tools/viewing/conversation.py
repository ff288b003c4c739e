"""A conversation with a model: each answer sees the turns before it."""

from __future__ import annotations

from typing import Any

from l2pd_adapters.families import end_of_text_ids
from l2pd_adapters.huggingface.enabling import configuration_of
from l2pd_plugins import UnmaskPolicy
from l2pd_tools.evaluation.prompts import Message, Prompt
from l2pd_tools.evaluation.results import Answer
from l2pd_tools.evaluation.run import evaluate, settings_of_generate
from l2pd_tools.progress import waiting


class Conversation:
    """The turns so far, and how the next message is answered.

    Args:
        model, tokenizer: as `load` returns them.
        before: the messages before the first turn, such as a system prompt.
        settings: those of `evaluate`, without the policy. Turn i, from 0, draws with seed + i.
        watching: the terminal and the pace with which each step is drawn; None draws nothing.

    Raises L2PDError if the model cannot decode with the policy and the settings.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        policy: UnmaskPolicy,
        *,
        before: tuple[Message, ...] = (),
        settings: dict[str, Any],
        watching: tuple[Any, float] | None = None,
    ) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._before, self._settings, self._watching = before, settings, watching
        self._turns: list[Message] = []
        self.configuration = ""
        """The policy and the settings, in one line."""
        self.switch(policy)

    def switch(self, policy: UnmaskPolicy) -> None:
        """Answer with another policy from now on; the turns so far are kept.

        Raises L2PDError, and keeps the policy, if the model cannot decode with the new one.
        """
        self.configuration = configuration_of(
            self._model, unmask_policy=policy, **settings_of_generate(**self._settings)
        )
        self._policy = policy

    def reset(self) -> None:
        """Forget all turns."""
        self._turns.clear()

    def answer(self, text: str) -> tuple[Answer, float]:
        """Answer a message, and keep both as a turn; also returns the seconds of the decode.

        If it raises, or is interrupted, the conversation is as before.
        """
        number = len(self._turns) // 2
        prompt = Prompt(text, str(number + 1), before=(*self._before, *self._turns))
        settings = {**self._settings, "policy": self._policy}
        if settings["seed"] is not None:
            settings["seed"] += number
        if self._watching is None:
            with waiting("answering"):
                result = evaluate(self._model, self._tokenizer, [prompt], batch_size=1, **settings)
            seconds = result.seconds
        else:
            from l2pd_tools.viewing import live_terminal

            console, pace = self._watching
            result, seconds = live_terminal.watch(
                console, self._model, self._tokenizer, [prompt], pace=pace, **settings
            )
        (answer,) = result.answers
        self._turns += [
            {"role": "user", "content": text},
            {"role": "assistant", "content": answer.text},
        ]
        return answer, seconds

    def is_cut(self, answer: Answer) -> bool:
        """Whether an answer fills the canvas without an end of text."""
        ends = end_of_text_ids(self._model.generation_config.eos_token_id)
        full = answer.length == self._settings["max_new_tokens"]
        return full and answer.tokens[-1] not in ends
