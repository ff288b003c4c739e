"""Wrong arguments of the Python functions."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, TextStreamer

from l2pd_adapters.huggingface import disable, enable, generate, load
from l2pd_adapters.huggingface.likelihood import are_greedy, log_likelihoods
from l2pd_plugins import create_policy
from l2pd_policies.confidence_threshold import ConfidenceThreshold
from l2pd_policies.settled import Settled
from l2pd_tools.evaluation.frontier import draw
from l2pd_tools.evaluation.prompts import Prompt, parse_prompts
from l2pd_tools.evaluation.run import evaluate
from l2pd_tools.training.collecting import collect
from l2pd_tools.training.rounds import add_familiar, train_filter
from tests.wrong_inputs.place import Act, Place, Rows

PROMPTS = [Prompt("Sort: ba", "a"), Prompt("Add: 1 2", "b")]


def loading(name: Any = "tiny-llada", **keywords: Any) -> Act:
    return lambda here: load(name, **keywords)


def generating(**keywords: Any) -> Act:
    return lambda here: here.model.generate(here.ids, **{"max_new_tokens": 4, **keywords})


def making(policy: Any, **options: Any) -> Act:
    return lambda here: create_policy(policy, **options)


def evaluating(**given: Any) -> Act:
    def act(here: Place) -> object:
        arguments = {"model": here.model, "tokenizer": here.tokenizer, "prompts": PROMPTS}
        settings = {"policy": "cora", "max_new_tokens": 4}
        return evaluate(**{**arguments, **settings, **given})

    return act


def likelihood(prompt: Any = (3, 4), answer: Any = (5, 6), **settings: Any) -> Act:
    return lambda here: here.model.log_likelihood(prompt, answer, **settings)


def collecting(**given: Any) -> Act:
    def act(here: Place) -> object:
        arguments = {"model": here.model, "tokenizer": here.tokenizer, "prompts": PROMPTS}
        return collect(**{**arguments, "out": here.folder / "out", "max_new_tokens": 4, **given})

    return act


def training(**given: Any) -> Act:
    def act(here: Place) -> object:
        return train_filter(**{"out": here.folder / "out", "data": here.folder / "data", **given})

    return act


LOAD: Rows = {
    "a model that is nowhere": (loading("nonsense"), "model 'nonsense'"),
    "a folder that is nowhere": (loading(Path("no/where")), "no/where"),
    "an empty name": (loading(""), "''"),
    "a number as the name": (loading(5), "name=5: expected a model's name"),
    "a class as the name": (loading(Path), "name=<class 'Path'>"),
    "a name of three parts": (loading("a/b/c"), "a/b/c"),
    "an unknown dtype": (loading(dtype="fp16"), "dtype='fp16': expected one of auto, float32"),
    "two dtypes": (loading(dtype="float16", torch_dtype="float32"), "dtype='float16'"),
    "an unknown device": (loading(device="gpu"), "device='gpu'"),
    "a device that is not here": (loading(device="cuda:99"), "device='cuda:99'"),
    "a device and a device map": (loading(device="cpu", device_map="auto"), "device_map='auto'"),
    "a number as the device": (loading(device=1.5), "device=1.5"),
    "a misspelt keyword": (loading(torch_dtyp="auto"), "'torch_dtyp'...did you mean 'torch_dtype'"),
    "a setting of generate": (
        loading(unmask_policy="cora"),
        "'unmask_policy' (= 'cora')...generate",
    ),
    "an adapter that is nowhere": (loading(adapter="no/where"), "no/where"),
    "a number as the adapter": (loading(adapter=5), "adapter=5: expected a path"),
    "the name of a family": (loading(family="LLaDA"), "family='LLaDA': expected a ModelFamily"),
    "remote code": (loading(trust_remote_code=True), "trust_remote_code=True"),
    "a number as the revision": (loading(revision=5), "revision=5: expected a text"),
    "a text as a flag": (loading(local_files_only="no"), "local_files_only='no': expected True"),
}

GENERATE: Rows = {
    "an option of the policy as a keyword": (
        generating(unmask_policy="settled", risk=0.2),
        "risk=0.2: it is an option of the policy settled; write unmask_options={'risk': 0.2}",
    ),
    "an option that other code has as a keyword": (
        generating(unmask_policy="learn2pd", threshold=0.9),
        "threshold=0.9: it is an option of the policy learn2pd; write unmask_options={'threshold'",
    ),
    "an option of a policy object as a keyword": (
        generating(unmask_policy=create_policy("eb_sampler"), gamma=0.1),
        "gamma=0.1: it is an option of the policy eb_sampler",
    ),
    "an option of a policy in a config as a keyword": (
        generating(unmask_policy={"name": "eb_sampler"}, gamma=0.1),
        "gamma=0.1: it is an option of the policy eb_sampler",
    ),
    "an option of policies that were not chosen": (
        generating(gamma=0.1),
        "gamma=0.1: it is an option of the policies ...eb_sampler...unmask_options",
    ),
    "a misspelt option of the policy": (
        generating(unmask_policy="settled", fallback_gama=0.1),
        "'fallback_gama' (= 0.1)",
    ),
    "an option's value": (
        generating(unmask_policy="cora", unmask_options={"threshold": 2}),
        "'threshold' = 2: expected",
    ),
    "NaN in unmask_options": (
        generating(unmask_policy="cora", unmask_options={"threshold": math.nan}),
        "'threshold' = nan: it is NaN",
    ),
    "a class of a policy": (
        generating(unmask_policy=ConfidenceThreshold),
        "unmask_policy=<class 'ConfidenceThreshold'>...ConfidenceThreshold(...)",
    ),
    "a class of a streamer": (
        generating(streamer=TextStreamer),
        "streamer=<class 'TextStreamer'>...TextStreamer(...)",
    ),
    "a class of settings": (
        generating(generation_config=GenerationConfig),
        "generation_config=<class 'GenerationConfig'>...GenerationConfig(...)",
    ),
    "a class as a function": (generating(on_step=Prompt), "on_step=<class 'Prompt'>"),
    "an unknown policy": (generating(unmask_policy="learn3pd"), "'learn3pd'...'learn2pd'"),
    "a policy that is a number": (generating(unmask_policy=5), "unmask_policy=5"),
    "a model as the policy": (
        lambda here: here.model.generate(here.ids, max_new_tokens=4, unmask_policy=here.model),
        "unmask_policy=<Qwen3ForCausalLM>",
    ),
    "a config without a name": (generating(unmask_policy={"threshold": 0.5}), "{'threshold': 0.5}"),
    "a wrong config in a list": (generating(unmask_policy=["nope"]), "'nope'"),
    "a list of policies of another length": (generating(unmask_policy=["cora"] * 3), "3 policies"),
    "unmask_options as a text": (generating(unmask_options="a=1"), "unmask_options='a=1'"),
    "options of a policy object": (
        generating(unmask_policy=create_policy("cora"), unmask_options={"threshold": 0.5}),
        "cora...threshold=0.5",
    ),
    "no length": (generating(max_new_tokens=None), "max_new_tokens is not given"),
    "a length of zero": (generating(max_new_tokens=0), "max_new_tokens=0: expected a whole"),
    "a fraction as the length": (generating(max_new_tokens=4.5), "max_new_tokens=4.5"),
    "NaN as the length": (generating(max_new_tokens=math.nan), "max_new_tokens=nan"),
    "a canvas beyond all bounds": (generating(max_new_tokens=2**40), f"max_new_tokens={2**40}"),
    "a temperature of NaN": (
        generating(do_sample=True, temperature=math.nan),
        "temperature=nan: it is NaN; expected a number",
    ),
    "NumPy's NaN": (
        generating(do_sample=True, temperature=np.float32("nan")),
        "temperature=np.float32(nan): it is NaN",
    ),
    "an infinite temperature": (
        generating(do_sample=True, temperature=math.inf),
        "temperature=inf: it is infinite; expected a number",
    ),
    "a top_p above 1": (generating(do_sample=True, top_p=1.5), "top_p=1.5: expected"),
    "a negative top_k": (generating(do_sample=True, top_k=-1), "top_k=-1: expected"),
    "a text as the seed": (generating(do_sample=True, seed="x"), "seed='x': expected"),
    "seeds for other prompts": (generating(do_sample=True, seed=[1, 2]), "2 seeds"),
    "an unknown cache": (generating(cache="triple"), "cache='triple': the choices"),
    "the cache of another family": (generating(cache="block"), "cache='block': the choices"),
    "an unknown rule for the end": (generating(end_of_text="eot"), "end_of_text='eot'"),
    "a block of zero": (generating(block_length=0), "block_length=0"),
    "a block of another length than the filter's": (
        generating(unmask_policy="learn2pd", block_length=4),
        "learn2pd...blocks of 8 positions...block_length=4",
    ),
    "an unknown statistic": (generating(observe={"entropie"}), "observe={'entropie'}"),
    "a text as statistics": (generating(observe="entropy"), "observe='entropy'"),
    "a keyword of transformers": (generating(num_beams=4), "num_beams=4 is not supported"),
    "a keyword of other code": (generating(gen_length=8), "gen_length=8...max_new_tokens"),
    "a misspelt keyword": (generating(max_new_token=8), "'max_new_token' (= 8); did you mean"),
    "a keyword of load": (
        generating(dtype="float16"),
        "dtype='float16': it is a keyword of load, not of generate",
    ),
    "several answers without drawing": (
        generating(num_return_sequences=2),
        "num_return_sequences=2 with greedy decoding",
    ),
    "a text as the prompt": (
        lambda here: here.model.generate("Sort: ba", max_new_tokens=4),
        "'Sort: ba'",
    ),
    "no prompt": (lambda here: here.model.generate(max_new_tokens=4), "give the prompts once"),
    "token ids outside the vocabulary": (
        lambda here: here.model.generate(torch.tensor([[3, 9999]]), max_new_tokens=4),
        "input_ids: 9999 at position 1",
    ),
    "logits as the prompt": (
        lambda here: here.model.generate(torch.zeros(1, 3), max_new_tokens=4),
        "torch.float32 of shape (1, 3)",
    ),
    "a mask of another shape": (
        generating(attention_mask=torch.ones(1, 99)),
        "attention_mask has shape (1, 99)",
    ),
    "a text instead of a model": (
        lambda here: generate("tiny-llada", here.ids, max_new_tokens=4),
        "model='tiny-llada': expected a model of transformers",
    ),
    "the class of the model": (
        lambda here: generate(type(here.model), here.ids, max_new_tokens=4),
        "model=<class 'Qwen3ForCausalLM'>: expected a model of transformers",
    ),
    "what load returns instead of the model": (
        lambda here: generate((here.model, here.tokenizer), here.ids, max_new_tokens=4),
        "model=(<Qwen3ForCausalLM>, ...expected a model of transformers",
    ),
}

POLICY: Rows = {
    "a misspelt policy": (making("confidense_threshold"), "'confidense_threshold'...did you mean"),
    "a number": (making(5), "policy 5: expected its name"),
    "a class": (
        making(ConfidenceThreshold),
        "<class 'ConfidenceThreshold'>...ConfidenceThreshold(",
    ),
    "an object that is no policy": (making(object()), "<object>"),
    "a misspelt option": (making("cora", treshold=0.5), "'treshold' (given 0.5)...threshold"),
    "NaN": (making("cora", threshold=math.nan), "'threshold' = nan: it is NaN"),
    "infinity": (making("cora", threshold=-math.inf), "'threshold' = -inf: it is infinite"),
    "too much": (making("cora", threshold=1.5), "'threshold' = 1.5: expected"),
    "a text for a number": (
        making("cora", threshold="0.5"),
        "'threshold' = '0.5': expected a number",
    ),
    "a flag for a number": (
        making("cora", threshold=True),
        "'threshold' = True: expected a number",
    ),
    "None for a number": (making("cora", threshold=None), "'threshold' = None: expected a number"),
    "a fraction for a whole number": (
        making("fixed_schedule", tokens_per_step=1.5),
        "'tokens_per_step' = 1.5: expected a whole number",
    ),
    "zero": (making("fixed_schedule", steps=0), "'steps' = 0: expected a number from 1"),
    "an unknown choice": (
        making("settled", fallback="never"),
        "'fallback' = 'never': expected 'eb_sampler', 'confidence_threshold' or 'none'",
    ),
    "a number for a path": (making("learn2pd", filter=5), "'filter' = 5: expected a text"),
    "an option without its name": (
        lambda here: ConfidenceThreshold(0.9),  # type: ignore[misc]
        "options are given by name (threshold), got 0.9",
    ),
    "a wrong option of a class": (lambda here: Settled(risk=7.0), "'risk' = 7.0: expected"),
    "a list for a number": (making("cora", threshold=[0.5]), "'threshold' = [0.5]: expected"),
    "two wrong options": (
        making("settled", risk=2, threshold=3),
        "'threshold' = 3: expected...'risk' = 2: expected",
    ),
}

REST: Rows = {
    "enable: a text": (lambda here: enable("tiny-llada"), "model='tiny-llada'"),
    "enable: a class": (lambda here: enable(type(here.model)), "model=<class 'Qwen3ForCausalLM'>"),
    "disable: a text": (lambda here: disable("tiny-llada"), "'tiny-llada'...was not enabled"),
    "likelihood: no model": (
        lambda here: log_likelihoods("tiny-llada", [([3], [4])]),
        "model='tiny-llada': expected a model of transformers",
    ),
    "likelihood: texts": (
        likelihood("Sort: ba", "ab"),
        "prompt_ids='Sort: ba': expected token ids",
    ),
    "likelihood: an empty answer": (likelihood(answer=[]), "answer_ids"),
    "likelihood: an unknown token": (likelihood(answer=[9999]), "answer_ids: 9999"),
    "likelihood: one sample": (likelihood(samples=1), "samples=1: expected"),
    "likelihood: NaN as the seed": (likelihood(seed=math.nan), "seed=nan"),
    "likelihood: an unknown order": (likelihood(order="right_to_left"), "order='right_to_left'"),
    "likelihood: a batch of zero": (likelihood(batch_size=0), "batch_size=0"),
    "likelihood: one pair without a list": (
        lambda here: log_likelihoods(here.model, ([3], [4])),
        "pairs",
    ),
    "likelihood: greedy pairs that are a number": (
        lambda here: are_greedy(here.model, 5),
        "pairs=5",
    ),
    "evaluate: a text as the prompts": (evaluating(prompts="Sort: ba"), "prompts='Sort: ba'"),
    "evaluate: texts as prompts": (evaluating(prompts=["Sort: ba"]), "prompts[0]='Sort: ba'"),
    "evaluate: no prompts": (evaluating(prompts=[]), "prompts=[]: there is no prompt"),
    "evaluate: no model": (evaluating(model="tiny-llada"), "model='tiny-llada'...enabled"),
    "evaluate: no tokenizer": (evaluating(tokenizer=None), "tokenizer=None"),
    "evaluate: an unknown policy": (evaluating(policy="nope"), "'nope'"),
    "evaluate: a class of a policy": (evaluating(policy=Settled), "policy=<class 'Settled'>"),
    "evaluate: NaN as an option": (evaluating(options={"threshold": math.nan}), "nan: it is NaN"),
    "evaluate: a batch of zero": (evaluating(batch_size=0), "batch_size=0"),
    "evaluate: a number as a function": (evaluating(progress=5), "progress=5: expected a function"),
    "evaluate: answers to other prompts": (evaluating(reference_answers=[5]), "reference answers"),
    "prompts: a limit of zero": (lambda here: parse_prompts(["a"], "here", limit=0), "limit=0"),
    "prompts: a limit that is a text": (
        lambda here: parse_prompts(["a"], "here", limit="2"),
        "limit='2'",
    ),
    "collect: no model": (collecting(model="tiny-llada"), "model='tiny-llada'"),
    "collect: no prompts": (collecting(prompts=[]), "prompts=[]: there is no prompt"),
    "collect: texts as prompts": (collecting(prompts=["Sort: ba"]), "prompts[0]='Sort: ba'"),
    "collect: an unknown policy": (collecting(policies=["nope"]), "'nope'"),
    "collect: a class of a policy": (collecting(policies=[Settled]), "<class 'Settled'>"),
    "collect: one policy without a list": (collecting(policies="oracle"), "policies='oracle'"),
    "collect: unknown labels": (collecting(labels="right"), "labels='right'"),
    "collect: a batch of zero": (collecting(batch_size=0), "batch_size=0"),
    "collect: a length of NaN": (collecting(max_new_tokens=math.nan), "max_new_tokens=nan"),
    "collect: a rank beyond the processes": (collecting(rank=3, world_size=2), "rank=3"),
    "collect: a folder that cannot be made": (
        collecting(out=Path("/proc/there")),
        "/proc/there cannot be made",
    ),
    "collect: a file as the folder": (
        lambda here: collecting(out=_file(here))(here),
        "mine cannot be made",
    ),
    "collect: references that are nowhere": (
        collecting(references_from=Path("no/where")),
        "no/where",
    ),
    "train: no trajectories": (training(data=Path("no/where")), "no/where holds no trajectories"),
    "train: a policy without a filter": (training(policy="cora"), "policy 'cora' has no filter"),
    "train: rounds without a model": (
        training(rounds=2, prompts=PROMPTS),
        "rounds=2: load is not given; expected a function that returns the model and its tokenizer",
    ),
    "train: rounds with a model": (
        lambda here: training(rounds=2, prompts=PROMPTS, load=here.model)(here),
        "load=<Qwen3ForCausalLM>",
    ),
    "train: rounds without prompts": (
        lambda here: training(rounds=2, load=lambda: (here.model, here.tokenizer))(here),
        "prompts=(): there is no prompt",
    ),
    "train: rounds that are a fraction": (training(rounds=1.5), "rounds=1.5"),
    "train: no epochs": (training(epochs=0), "epochs=0"),
    "train: a rate of NaN": (training(false_positive_rate=math.nan), "false_positive_rate=nan: it"),
    "train: a text as the seed": (training(seed="x"), "seed='x'"),
    "familiar: a policy without a filter": (
        lambda here: add_familiar(here.folder, here.folder, policy="cora"),
        "policy 'cora' has no filter",
    ),
    "draw: an unknown format": (lambda here: draw({}, here.folder / "x.nope"), "x.nope"),
}


def _file(here: Place) -> Path:
    path = here.folder / "mine"
    path.write_text("mine")
    return path


TABLES: dict[str, Rows] = {"load": LOAD, "generate": GENERATE, "policy": POLICY, "tools": REST}
