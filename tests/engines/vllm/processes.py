"""vLLM's engine in a process of its own."""

import json
import os
import subprocess
import sys

SEED = 7
TWICE = [([[5, 6, 7]], {"max_tokens": 20, "temperature": 0})] * 2
"""A worker is told of the end of a request together with the next request."""

ARGUMENTS = {
    "dtype": "float32",
    "max_model_len": 64,
    "max_num_seqs": 2,
    "enforce_eager": True,
    "kv_cache_memory_bytes": 64 << 20,
}
SCRIPT = """
import json, sys
exec(sys.argv[1])
import torch
from vllm import LLM, SamplingParams
model, seed, arguments, requests = sys.argv[2], *map(json.loads, sys.argv[3:])
llm = LLM(model, **arguments)
for prompts, params in requests:
    torch.manual_seed(seed)
    inputs = [{"prompt_token_ids": ids} for ids in prompts]
    outputs = llm.generate(inputs, SamplingParams(**params), use_tqdm=False)
    print("tokens:", json.dumps([list(output.outputs[0].token_ids) for output in outputs]))
"""


def alone(model, requests=TWICE, *, before="", environment=None, **arguments):
    """The process, ended, which answered requests, (prompts, sampling parameters), one by one; code
    to run `before` vLLM is imported."""
    words = map(json.dumps, (SEED, ARGUMENTS | arguments, requests))
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, before, str(model), *words],
        capture_output=True,
        text=True,
        env={**os.environ, **(environment or {})},
        timeout=400,
    )


def tokens_of(ended):
    """The tokens of each request's prompts, of such a process."""
    lines = [line for line in ended.stdout.splitlines() if line.startswith("tokens: ")]
    return [json.loads(line.removeprefix("tokens: ")) for line in lines]


def last_line(ended):
    """Why such a process has failed."""
    assert ended.returncode != 0
    return ended.stderr.strip().splitlines()[-1]
