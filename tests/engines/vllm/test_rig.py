"""The rig's NumPy functions write what vLLM's kernels write in Triton's interpreter."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from l2pd_vllm_rig import kernels
from vllm.plugins import load_general_plugins

REQUESTS, ROWS, LENGTH = 7, 4, 40


class Inputs:
    """Random arguments as vLLM makes them, of `ROWS` rows that are among `REQUESTS` requests."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.requests = torch.randperm(REQUESTS, generator=self.generator)[:ROWS].int()
        self.queries = self.starts(1, 9)
        self.logits = self.starts(0, 4)
        self.tokens = self.whole(0, 100, REQUESTS, LENGTH, dtype=torch.int32)

    def whole(self, low: int, high: int, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=self.generator, dtype=dtype)

    def starts(self, low: int, high: int) -> torch.Tensor:
        counts = self.whole(low, high, ROWS, dtype=torch.int32)
        return torch.cat([torch.zeros(1, dtype=torch.int32), counts.cumsum(0).int()])

    def each(self, low: int, high: int) -> torch.Tensor:
        return self.whole(low, high, REQUESTS, dtype=torch.int32)

    def addresses(self, tables: list[torch.Tensor]) -> torch.Tensor:
        self.tables = [*getattr(self, "tables", ()), *tables]
        return torch.tensor([table.data_ptr() for table in tables], dtype=torch.uint64)

    def pages(self, width: int = 12) -> list[torch.Tensor]:
        return [self.whole(0, 90, REQUESTS, width, dtype=torch.int32) for _ in range(2)]


def gather_block_tables(made: Inputs) -> tuple:
    strides = torch.tensor([12, 12])
    counts = made.whole(0, 13, 2, REQUESTS, dtype=torch.int32)
    source, target = made.addresses(made.pages()), made.addresses(made.pages())
    padded = ROWS + 2
    arguments = (made.requests, source, target, strides, counts, counts.stride(0), ROWS)
    return (2, padded), arguments, {"BLOCK_SIZE": 8}


def compute_slot_mappings(made: Inputs) -> tuple:
    made.requests[1] = -1
    slots = made.whole(0, 9, 2, 50, dtype=torch.int64)
    arguments = (
        *(50, made.requests, made.queries, made.whole(0, 40, 50, dtype=torch.int64)),
        *(made.addresses(made.pages()), torch.tensor([12, 12])),
        *(torch.tensor([4, 8], dtype=torch.int32), torch.tensor([True, False])),
        *(torch.tensor([True, True]), slots, slots.stride(0), 0),
    )
    rest = {"CP_SIZE": 1, "CP_INTERLEAVE": 1, "PAD_ID": -1, "TRITON_BLOCK_SIZE": 16}
    return (2, ROWS + 1), arguments, rest


def apply_write(made: Inputs, groups: bool = False) -> tuple:
    ends = made.starts(0, 6)[1:]
    contents = made.whole(0, 100, int(ends[-1]) + 1, dtype=torch.int32)
    rows, begins = made.requests, made.whole(0, 7, ROWS, dtype=torch.int32)
    if groups:
        group = made.whole(0, 2, ROWS, dtype=torch.int32)
        target = (made.addresses(made.pages()), torch.tensor([12, 12]))
    else:
        group, target = None, (made.tokens, made.tokens.stride(0))
    kinds = {"BLOCK_SIZE": 4, "MULTI_GROUP": groups}
    return (ROWS,), (*target, rows, begins, contents, ends, group), kinds


def apply_write_of_groups(made: Inputs) -> tuple:
    return apply_write(made, groups=True)


def prepare_prefill_inputs(made: Inputs) -> tuple:
    ahead = made.whole(0, 100, 2, REQUESTS, dtype=torch.int32)
    arguments = (
        *(made.whole(0, 100, 50, dtype=torch.int32), ahead, ahead.stride(0), 2),
        *(made.requests, made.queries, made.tokens, made.tokens.stride(0)),
        *(made.each(1, 30), made.each(0, 20)),
    )
    return (ROWS,), arguments, {"BLOCK_SIZE": 4, "LOOKAHEAD_BLOCK": 2}


def prepare_pos_seq_lens(made: Inputs) -> tuple:
    positions, lengths = made.whole(0, 9, 50, dtype=torch.int64), made.each(0, 9)
    arguments = (positions, lengths, made.requests, made.queries, made.each(0, 30), REQUESTS)
    return (ROWS + 1,), arguments, {"BLOCK_SIZE": 4}


def combine_sampled_and_draft_tokens(made: Inputs, sampled: int = 1) -> tuple:
    if sampled:
        made.logits[1:] += torch.arange(1, ROWS + 1).int()
    made.queries = made.logits * 2 + torch.arange(ROWS + 1).int()
    drafts = made.whole(0, 100, REQUESTS, 8, dtype=torch.int64)
    arguments = (
        *(made.whole(0, 100, 80, dtype=torch.int32), made.requests),
        *(made.whole(0, 100, REQUESTS, 1, dtype=torch.int64), made.queries),
        *(made.whole(10, 30, ROWS, dtype=torch.int32), made.each(0, 25)),
        *(drafts, drafts.stride(0), made.logits),
        made.whole(0, 9, int(made.logits[-1]) + 1, dtype=torch.int64),
    )
    return (ROWS,), arguments, {"NUM_NEW_SAMPLED_TOKENS": sampled, "BLOCK_SIZE": 8}


def combine_draft_tokens(made: Inputs) -> tuple:
    return combine_sampled_and_draft_tokens(made, sampled=0)


def post_update(made: Inputs, whole: bool = True) -> tuple:
    made.requests[2] = -1
    seen = made.whole(0, 4, REQUESTS, 100, dtype=torch.int32)
    sampled = made.whole(0, 100, ROWS, 5, dtype=torch.int64)
    arguments = (
        *(made.requests, made.each(0, 30), made.whole(0, 9, REQUESTS, 1, dtype=torch.int64)),
        *((seen, seen.stride(0)) if whole else (None, 0)),
        *(sampled, sampled.stride(0), made.whole(0, 6, ROWS, dtype=torch.int32)),
        *(made.whole(0, 3, ROWS, dtype=torch.int32), made.queries if whole else None),
        *(made.tokens, made.tokens.stride(0), made.each(0, 30)),
    )
    return (ROWS,), arguments, {}


def post_update_of_tokens_alone(made: Inputs) -> tuple:
    return post_update(made, whole=False)


def expand_idx_mapping(made: Inputs) -> tuple:
    count = int(made.logits[-1]) + 1
    places = made.whole(0, 9, count, dtype=torch.int32), made.whole(0, 9, count, dtype=torch.int32)
    return (ROWS,), (made.requests, *places, made.logits), {"BLOCK_SIZE": 4}


CASES = {
    "_gather_block_tables_kernel": (gather_block_tables,),
    "_compute_slot_mappings_kernel": (compute_slot_mappings,),
    "_apply_write_kernel": (apply_write, apply_write_of_groups),
    "_prepare_prefill_inputs_kernel": (prepare_prefill_inputs,),
    "_prepare_pos_seq_lens_kernel": (prepare_pos_seq_lens,),
    "_combine_sampled_and_draft_tokens_kernel": (
        combine_sampled_and_draft_tokens,
        combine_draft_tokens,
    ),
    "_post_update_kernel": (post_update, post_update_of_tokens_alone),
    "_expand_idx_mapping_kernel": (expand_idx_mapping,),
}


def written(launch, case, seed: int) -> list[torch.Tensor]:
    """All tensors, also those behind addresses, after a launch with the inputs of this seed."""
    made = Inputs(seed)
    grid, arguments, rest = case(made)
    launch[grid](*arguments, **rest)
    kept = [each for each in arguments if isinstance(each, torch.Tensor)]
    return [
        *(each for each in kept if each.dtype != torch.uint64),
        *getattr(made, "tables", ()),
    ]


@pytest.fixture(scope="module", autouse=True)
def replaced() -> None:
    load_general_plugins()


class Unlaunched:
    """Is launched and does nothing."""

    def __getitem__(self, grid: tuple[int, ...]):
        return lambda *args, **kwargs: None


@pytest.mark.parametrize("name", CASES)
def test_a_function_writes_what_its_kernel_writes(name: str) -> None:
    modules = {f.__name__: module for module, each in kernels.REPLACEMENTS.items() for f in each}
    assert CASES.keys() == modules.keys()
    found = getattr(import_module(f"vllm.v1.worker.gpu.{modules[name]}"), name)
    assert isinstance(found, kernels.Replaced)
    for case in CASES[name]:
        untouched = 0
        for seed in range(20):
            expected = written(found.kernel, case, seed)
            both = list(zip(expected, written(found, case, seed), strict=True))
            assert all(torch.equal(*pair) for pair in both), (case.__name__, seed)
            same = zip(expected, written(Unlaunched(), case, seed), strict=True)
            untouched += all(torch.equal(*pair) for pair in same)
        assert untouched < 5
