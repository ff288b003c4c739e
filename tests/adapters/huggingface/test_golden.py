"""The golden traces of all engines, with the transformers adapter, and what a renewal prints."""

import copy
import json

import pytest

from tests.engines.golden import FILE, RUNS, changes, decode, golden


@pytest.mark.parametrize("run", range(len(RUNS)), ids=lambda run: RUNS[run][0]["name"])
def test_golden_traces(run: int) -> None:
    policy, cases = golden()[run]
    assert (policy, len(cases)) == RUNS[run]
    assert decode(*RUNS[run]) == cases


def content(cases, policy=None, **environment):
    policy = policy or {"name": "klass"}
    return {"environment": environment, "runs": [{"policy": policy, "cases": cases}]}


def case(prompt, tokens, committed_at):
    return {"prompt": prompt, "tokens": tokens, "committed_at": committed_at}


KEPT = case("kept", [7, 8], [0, 1])


def test_a_renewal_that_changes_nothing_prints_nothing():
    before = json.loads(FILE.read_text())
    assert list(changes(before, copy.deepcopy(before))) == []


def test_a_renewal_shows_other_tokens_and_where_they_begin():
    before = content([KEPT, case("p", [1, 2, 3, *range(20, 30)], [0, 1, 2, *range(10)])])
    after = content([KEPT, case("p", [1, 5, 3], [0, 1, 2])])
    assert list(changes(before, after)) == [
        '{"name": "klass"}: of 2 prompts, 1 with other tokens',
        "  'p' differs from position 1 on (token@step):",
        "  - 2@1 3@2 20@0 21@1 22@2 23@3 24@4 25@5 ...",
        "  + 5@1 3@2",
    ]


def test_a_renewal_tells_other_steps_from_other_tokens():
    before = content([KEPT, case("a", [1, 2], [0, 1]), case("b", [1], [0])])
    after = content([KEPT, case("a", [1, 2], [0, 2]), case("b", [1, 9], [0, 1])])
    lines = list(changes(before, after))
    assert lines[0] == (
        '{"name": "klass"}: of 3 prompts, 1 with other tokens, '
        "1 with the same tokens at other steps"
    )
    assert lines[1:] == ["  'a' differs from position 1 on (token@step):", "  - 2@1", "  + 2@2"]


def test_a_renewal_names_an_answer_that_only_grew():
    before, after = content([case("b", [1], [0])]), content([case("b", [1, 9], [0, 1])])
    assert list(changes(before, after))[2:] == ["  - (ends)", "  + 9@1"]


def test_a_renewal_names_prompts_and_policies_that_came_and_went():
    before = content([KEPT, case("went", [1], [0])])
    after = content([KEPT, case("came", [1], [0])])
    assert list(changes(before, after)) == ['{"name": "klass"}: of 2 prompts, 1 new, 1 gone']
    assert list(changes(before, content([KEPT], {"name": "cora"}))) == [
        '{"name": "cora"}: of 1 prompts, 1 new',
        '{"name": "klass"}: of 2 prompts, 2 gone',
    ]


def test_a_renewal_names_what_the_traces_may_depend_on():
    assert list(changes(content([], torch="1", threads=1), content([], torch="2", threads=1))) == [
        "environment: torch 1 -> 2"
    ]
