"""Where a text ends under each rule, compared with a plain loop over positions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from l2pd_plugins.end_of_text import EndOfText, behind_end, is_end_of_text
from l2pd_plugins.errors import L2PDError

ENDS = (7, 9)
RULES = ("block", "predicted", "off")


@st.composite
def blocks(draw):
    """tokens, masked, x0 and confidence of the same shape (B, L), with many end-of-text tokens."""
    rows, length = draw(st.integers(1, 3)), draw(st.integers(1, 7))

    def grid(values):
        flat = draw(st.lists(values, min_size=rows * length, max_size=rows * length))
        return torch.tensor(flat).view(rows, length)

    token = st.sampled_from([1, 7, 8, 9])
    confidence = st.sampled_from([0.1, 0.5, 0.9])
    return grid(token), grid(st.booleans()), grid(token), grid(confidence)


def end_of_row(tokens, masked, x0, confidence, rule):
    """Whether the row has ended, and the first position after the end."""
    nowhere = len(tokens)
    if rule == "off":
        return False, nowhere
    for i, token in enumerate(tokens):
        if token in ENDS and not masked[i]:
            return True, i + 1
    if rule == "predicted":
        likely = [i for i, token in enumerate(x0) if token in ENDS and masked[i]]
        if likely:
            return True, max(likely, key=lambda i: (confidence[i], -i)) + 1
    return False, nowhere


@given(case=blocks(), rule=st.sampled_from(RULES))
def test_a_text_ends_at_the_position_of_the_rule(case, rule):
    ended, behind = behind_end(*case, EndOfText(rule, ENDS))
    for row, (is_ended, marked) in enumerate(zip(ended, behind, strict=True)):
        wanted, start = end_of_row(*(each[row].tolist() for each in case), rule)
        assert bool(is_ended) == wanted
        assert marked.tolist() == [i >= start for i in range(len(marked))]


def test_every_end_of_text_id_ends_a_text():
    tokens = torch.tensor([[7, 8, 9, 1]])
    assert is_end_of_text(tokens, ENDS).tolist() == [[True, False, True, False]]
    assert is_end_of_text(tokens, (9,)).tolist() == [[False, False, True, False]]
    assert not is_end_of_text(tokens, ()).any()


@pytest.mark.parametrize("rule", RULES)
def test_only_the_rule_off_needs_no_end_of_text_id(rule):
    assert EndOfText(rule, (0,)).token_ids == (0,)
    if rule == "off":
        assert EndOfText(rule, ()).token_ids == ()
    else:
        with pytest.raises(L2PDError, match="needs an end-of-text token"):
            EndOfText(rule, ())


def test_a_prediction_ends_only_rows_without_a_committed_end_of_text():
    masked = torch.tensor([[True, False, True], [True, False, True]])
    tokens, x0 = torch.tensor([[8, 9, 8], [8, 1, 8]]), torch.tensor([[7, 9, 8], [7, 1, 8]])
    ended, behind = behind_end(
        tokens, masked, x0, torch.full((2, 3), 0.5), EndOfText("predicted", ENDS)
    )
    assert ended.tolist() == [True, True]
    assert behind.tolist() == [[False, False, True], [False, True, True]]
