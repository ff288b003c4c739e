"""The likelihoods of an answer, by their definition: one pass of the whole model per state."""

from __future__ import annotations

import itertools

import torch

from tests.fixtures.random_model import BLOCK


class Dense:
    """One model. `shift`: the logits of a position are those of so many positions before it."""

    def __init__(self, model, shift=0):
        self.model, self.shift = model, shift
        self.mask = model.config.mask_token_id
        self.block = getattr(model.config, "block_length", BLOCK)
        self.block_causal = type(model).__name__ == "SDARForCausalLM"

    @torch.no_grad()
    def scores(self, prompt, answers):
        """(S, N, V) log-probabilities at an answer's positions in S states; the masked ones are
        None.
        """
        rows = [
            [*prompt, *(self.mask if token is None else token for token in answer)]
            for answer in answers
        ]
        arguments = {}
        if self.block_causal:
            rows = [row + [self.mask] * (-len(row) % self.block) for row in rows]
            of_block = torch.arange(len(rows[0])) // self.block
            arguments["attention_mask"] = (of_block <= of_block[:, None])[None, None]
        logits = self.model(input_ids=torch.tensor(rows), **arguments).logits
        begin = len(prompt) - self.shift
        return logits[:, begin : begin + len(answers[0])].double().log_softmax(-1)

    def mean_over_orders(self, prompt, answer):
        """The mean log-likelihood over all orders in which an answer can be decoded."""
        positions = range(len(answer))
        states = [
            frozenset(known)
            for count in positions
            for known in itertools.combinations(positions, count)
        ]
        shown = [[answer[i] if i in known else None for i in positions] for known in states]
        of_answer = self.scores(prompt, shown)[:, torch.arange(len(answer)), torch.tensor(answer)]
        table = dict(zip(states, of_answer.tolist(), strict=True))
        orders = list(itertools.permutations(positions))
        total = sum(
            table[frozenset(order[:step])][order[step]] for order in orders for step in positions
        )
        return total / len(orders)

    def chain(self, prompt, answer, order):
        """The log-likelihood with one token after the other."""
        shown, total = [None] * len(answer), 0.0
        while None in shown:
            end = len(answer)
            if self.block_causal:
                now = (len(prompt) + shown.index(None)) // self.block
                end = min(end, (now + 1) * self.block - len(prompt))
            open_ = [i for i in range(end) if shown[i] is None]
            scores = self.scores(prompt, [shown[:end]])[0]
            at = open_[0]
            if order == "confidence":
                at = max(open_, key=lambda i: float(scores[i].max()))
            total += float(scores[at, answer[at]])
            shown[at] = answer[at]
        return total
