"""The modules that are mutated, and the tests of each."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """A module and the test files that should detect changes in it."""

    module: str
    tests: list[str]
    unseen: str = ""
    """A part of the names of tests that run lines which no tracer sees (compiled kernels)."""
    also: tuple[str, ...] = ()
    """Parts of the names of tests that run the module in another process, unseen by the tracer."""


_DEVICES = "tests/core/test_devices.py"
_STATISTICS = [
    "tests/core/test_eager_kernel.py",
    "tests/core/test_kernel_dispatch.py",
    "tests/core/test_statistics.py",
    "tests/core/test_statistics_bad_rows.py",
    _DEVICES,
]
_STEP = [
    "tests/core/test_block_batch.py",
    "tests/core/test_block_invariant.py",
    "tests/core/test_denoising.py",
    "tests/core/test_editing.py",
    "tests/core/test_looking_ahead.py",
    "tests/core/test_misbehaving_policies.py",
    "tests/core/test_moving_rows.py",
    "tests/core/test_policy_calls.py",
    "tests/core/test_predicted_masks.py",
    "tests/core/test_remasking.py",
    "tests/core/test_row_options.py",
    "tests/core/test_sampling_rows.py",
    "tests/core/test_slots.py",
    "tests/core/test_step_corners.py",
    "tests/fuzz/test_fuzz.py::test_nothing_is_found[core]",
    _DEVICES,
]
_FILTERS = ["tests/policies/test_filter_policy.py", "tests/policies/test_exact.py"]

TARGETS = {
    "blocks": Target("l2pd_plugins/blocks.py", _STEP),
    "row_options": Target(
        "l2pd_plugins/row_options.py",
        ["tests/core/test_row_options.py", "tests/policies/test_row_options.py"],
    ),
    "policy_groups": Target("l2pd_plugins/policy_groups.py", _STEP),
    "later_blocks": Target("l2pd_plugins/later_blocks.py", _STEP),
    "denoising": Target("l2pd_plugins/denoising.py", _STEP),
    "group_answers": Target("l2pd_plugins/group_answers.py", _STEP),
    "progress": Target("l2pd_plugins/progress_rules.py", _STEP),
    "policy_calls": Target("l2pd_plugins/policy_calls.py", _STEP),
    "end_of_text": Target("l2pd_plugins/end_of_text.py", ["tests/core/test_end_of_text.py"]),
    "selection": Target("l2pd_plugins/selection.py", ["tests/core/test_selection.py", _DEVICES]),
    "sampling": Target(
        "l2pd_plugins/sampling.py",
        ["tests/core/test_sampling.py", "tests/core/test_sampling_rows.py"],
    ),
    "slots": Target("l2pd_plugins/slots.py", _STEP),
    "statistics": Target("l2pd_plugins/statistics/__init__.py", _STATISTICS),
    "dispatch": Target("l2pd_plugins/statistics/dispatch.py", _STATISTICS),
    "eager": Target("l2pd_plugins/statistics/eager.py", _STATISTICS),
    "numba": Target(
        "l2pd_plugins/statistics/numba_kernel.py",
        ["tests/core/test_numba_interpreted.py", *_STATISTICS],
        unseen="[numba",
        also=("test_compilation_is", "test_a_forked"),
    ),
    "_buffers": Target("l2pd_plugins/statistics/_buffers.py", _STATISTICS),
    "triton": Target(
        "l2pd_plugins/statistics/triton_kernel.py",
        ["tests/core/test_triton_spans.py", *_STATISTICS],
        unseen="test_triton_spans",
    ),
    "learned": Target(
        "policies/l2pd_policies/learned/policy.py",
        [*_FILTERS, "tests/policies/test_learn2pd.py", "tests/policies/test_settled.py"],
    ),
    "settled": Target(
        "policies/l2pd_policies/settled/policy.py", [*_FILTERS, "tests/policies/test_settled.py"]
    ),
}
