"""What vLLM's kernels that run at every step compute, in NumPy.

Triton's interpreter needs about ten milliseconds for a kernel that a GPU runs in ten microseconds,
so most of a step's time on a CPU would be its own. A function here takes the place of the kernel of
its name (`vllm/v1/worker/gpu/{block_table,buffer_utils,input_batch}.py`) if both have the same
arguments; of a release that has others, the kernel is interpreted.
`tests/engines/vllm/test_rig.py` compares each with the interpreted kernel.
"""

import ctypes
from functools import partial
from importlib import import_module

import numpy as np


def replace():
    """Put every function here in the place of vLLM's kernel of the same name."""
    for module, functions in REPLACEMENTS.items():
        found = import_module(f"vllm.v1.worker.gpu.{module}")
        for function in functions:
            kernel = getattr(found, function.__name__, None)
            if getattr(kernel, "arg_names", None) == arguments(function):
                setattr(found, function.__name__, Replaced(kernel, function))


def arguments(function):
    """The names of what its kernel takes: all of its own but the grid."""
    code = function.__code__
    return list(code.co_varnames[1 : code.co_argcount])


class Replaced:
    """Is launched as the kernel is: ``replaced[grid](arguments)``."""

    def __init__(self, kernel, function):
        self.kernel, self.function = kernel, function

    def __getitem__(self, grid):
        return partial(self._launch, grid)

    def _launch(self, grid, *args, num_warps=None, **kwargs):
        self.function(grid, *map(_values, args), **kwargs)


def _values(argument):
    return argument.numpy() if hasattr(argument, "numpy") else argument


def _row(pointers, group, row, stride):
    """Row `row` of the int32 matrix at an address."""
    address = int(pointers[group]) + 4 * row * stride
    return np.ctypeslib.as_array((ctypes.c_int32 * stride).from_address(address))


def _gather_block_tables_kernel(
    grid,
    batch_idx_to_req_idx,
    src_block_table_ptrs,
    dst_block_table_ptrs,
    block_table_strides,
    num_blocks_ptr,
    num_blocks_stride,
    num_reqs,
    BLOCK_SIZE,
):
    groups, rows = grid
    for group in range(groups):
        stride = int(block_table_strides[group])
        for row in range(rows):
            made = _row(dst_block_table_ptrs, group, row, stride)
            if row >= num_reqs:
                made[:] = 0
                continue
            request = int(batch_idx_to_req_idx[row])
            count = int(num_blocks_ptr.reshape(-1)[group * num_blocks_stride + request])
            made[:count] = _row(src_block_table_ptrs, group, request, stride)[:count]


def _compute_slot_mappings_kernel(
    grid,
    max_num_tokens,
    idx_mapping,
    query_start_loc,
    pos,
    block_table_ptrs,
    block_table_strides,
    block_sizes,
    slot_mapping_enabled,
    dcp_sharded,
    slot_mappings_ptr,
    slot_mappings_stride,
    cp_rank,
    CP_SIZE,
    CP_INTERLEAVE,
    PAD_ID,
    TRITON_BLOCK_SIZE,
):
    assert CP_SIZE == 1, "one process holds a request's whole context here"
    groups, rows = grid[0], grid[1] - 1
    for group in range(groups):
        slots, size = slot_mappings_ptr[group], int(block_sizes[group])
        slots[int(query_start_loc[rows]) : max_num_tokens] = PAD_ID
        for row in range(rows):
            request, (start, end) = int(idx_mapping[row]), query_start_loc[row : row + 2]
            if request < 0 or not slot_mapping_enabled[group]:
                slots[start:end] = PAD_ID
                continue
            table = _row(block_table_ptrs, group, request, int(block_table_strides[group]))
            block, offset = np.divmod(pos[start:end], size)
            slots[start:end] = table[block].astype(np.int64) * size + offset


def _apply_write_kernel(
    grid,
    output_ptr,
    output_stride,
    write_indices_ptr,
    write_starts_ptr,
    write_contents_ptr,
    write_cu_lens_ptr,
    write_group_ids_ptr,
    BLOCK_SIZE,
    MULTI_GROUP,
):
    begin = 0
    for write in range(grid[0]):
        row, start = int(write_indices_ptr[write]), int(write_starts_ptr[write])
        end = int(write_cu_lens_ptr[write])
        if MULTI_GROUP:
            group = int(write_group_ids_ptr[write])
            made = _row(output_ptr, group, row, int(output_stride[group]))
        else:
            made = output_ptr.reshape(-1)[row * output_stride :]
        made[start : start + end - begin] = write_contents_ptr[begin:end]
        begin = end


def _prepare_prefill_inputs_kernel(
    grid,
    input_ids_ptr,
    next_prefill_tokens_ptr,
    next_prefill_tokens_stride,
    num_lookahead,
    idx_mapping_ptr,
    query_start_loc_ptr,
    all_token_ids_ptr,
    all_token_ids_stride,
    prefill_lens_ptr,
    num_computed_tokens_ptr,
    BLOCK_SIZE,
    LOOKAHEAD_BLOCK,
):
    for row in range(grid[0]):
        request = idx_mapping_ptr[row]
        length, computed = prefill_lens_ptr[request], num_computed_tokens_ptr[request]
        if computed >= length:
            continue
        start, end = query_start_loc_ptr[row : row + 2]
        tokens, after = all_token_ids_ptr[request], computed + end - start
        input_ids_ptr[start:end] = tokens[computed:after]
        for ahead in range(num_lookahead):
            is_prefill = after + ahead < length
            next_prefill_tokens_ptr[ahead, request] = tokens[after + ahead] if is_prefill else 0


def _prepare_pos_seq_lens_kernel(
    grid,
    pos_ptr,
    seq_lens_ptr,
    idx_mapping_ptr,
    query_start_loc_ptr,
    num_computed_tokens_ptr,
    max_num_reqs,
    BLOCK_SIZE,
):
    rows = grid[0] - 1
    seq_lens_ptr[rows:max_num_reqs] = 0
    for row in range(rows):
        computed = int(num_computed_tokens_ptr[idx_mapping_ptr[row]])
        start, end = query_start_loc_ptr[row : row + 2]
        seq_lens_ptr[row] = computed + end - start
        pos_ptr[start:end] = np.arange(computed, computed + end - start)


def _combine_sampled_and_draft_tokens_kernel(
    grid,
    input_ids_ptr,
    idx_mapping_ptr,
    last_sampled_tokens_ptr,
    query_start_loc_ptr,
    seq_lens_ptr,
    prefill_len_ptr,
    draft_tokens_ptr,
    draft_tokens_stride,
    cu_num_logits_ptr,
    logits_indices_ptr,
    BLOCK_SIZE,
    NUM_NEW_SAMPLED_TOKENS=1,
):
    for row in range(grid[0]):
        request = idx_mapping_ptr[row]
        first, last = cu_num_logits_ptr[row : row + 2]
        count, end = last - first, query_start_loc_ptr[row + 1]
        logits_indices_ptr[first:last] = np.arange(end - count, end)
        length = prefill_len_ptr[request]
        if seq_lens_ptr[row] <= length:
            continue
        if NUM_NEW_SAMPLED_TOKENS > 0 and seq_lens_ptr[row] - count >= length:
            input_ids_ptr[end - count] = last_sampled_tokens_ptr[request].item()
        drafts = count - NUM_NEW_SAMPLED_TOKENS
        if drafts > 0:
            input_ids_ptr[end - drafts : end] = draft_tokens_ptr[request, :drafts]


def _post_update_kernel(
    grid,
    idx_mapping_ptr,
    num_computed_tokens_ptr,
    last_sampled_tokens_ptr,
    output_bin_counts_ptr,
    output_bin_counts_stride,
    sampled_tokens_ptr,
    sampled_tokens_stride,
    num_sampled_ptr,
    num_rejected_ptr,
    query_start_loc_ptr,
    all_token_ids_ptr,
    all_token_ids_stride,
    total_len_ptr,
):
    for row in range(grid[0]):
        request = idx_mapping_ptr[row]
        if request < 0:
            continue
        count, length = int(num_sampled_ptr[row]), int(total_len_ptr[request])
        if count > 0:
            sampled = sampled_tokens_ptr[row, :count]
            last_sampled_tokens_ptr[request] = sampled[-1]
            all_token_ids_ptr[request, length : length + count] = sampled
            total_len_ptr[request] = length + count
            if output_bin_counts_ptr is not None:
                np.add.at(output_bin_counts_ptr[request], sampled, 1)
        queries = 0
        if query_start_loc_ptr is not None:
            queries = query_start_loc_ptr[row + 1] - query_start_loc_ptr[row]
        num_computed_tokens_ptr[request] += queries - num_rejected_ptr[row]


def _expand_idx_mapping_kernel(
    grid,
    idx_mapping_ptr,
    expanded_idx_mapping_ptr,
    expanded_local_pos_ptr,
    cu_num_logits_ptr,
    BLOCK_SIZE,
):
    for row in range(grid[0]):
        first, last = cu_num_logits_ptr[row : row + 2]
        expanded_idx_mapping_ptr[first:last] = idx_mapping_ptr[row]
        expanded_local_pos_ptr[first:last] = np.arange(last - first)


REPLACEMENTS = {
    "block_table": (_gather_block_tables_kernel, _compute_slot_mappings_kernel),
    "buffer_utils": (_apply_write_kernel,),
    "input_batch": (
        _prepare_prefill_inputs_kernel,
        _prepare_pos_seq_lens_kernel,
        _combine_sampled_and_draft_tokens_kernel,
        _post_update_kernel,
        _expand_idx_mapping_kernel,
    ),
}
"""The kernels of each module that are replaced."""
