"""The filter, its folder, and which folders are refused."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from l2pd_plugins import L2PDError, ModelContext, create_policy
from l2pd_plugins.trajectories import Trajectories
from l2pd_policies import exact
from l2pd_policies.learn2pd import UnmaskFilter
from l2pd_policies.learned.load_filter import load_filter
from l2pd_policies.learned.training import Recipe, split_by_prompt, train


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    made = UnmaskFilter(block_length=8, threshold=0.6, progress="always_top1", base_model="m")
    for layer in (made.fc1, made.fc2):  # wide enough that some probabilities pass and some do not
        layer.weight.data.mul_(6)
    made.save_pretrained(tmp_path / "filter")
    return tmp_path / "filter"


def rewrite(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config.update({k: v for k, v in changes.items() if v is not ...})
    for key in [k for k, v in changes.items() if v is ...]:
        del config[key]
    path.write_text(json.dumps(config))


def test_the_paper_s_filter_has_2112_parameters():
    assert sum(p.numel() for p in UnmaskFilter(block_length=32).parameters()) == 2112


def test_select_is_two_matrix_products(make_step, folder):
    policy = create_policy("learn2pd", filter=str(folder))
    weights = load_file(folder / "model.safetensors")
    confidence = torch.rand(5, 8)
    masked = torch.rand(5, 8) > 0.3
    policy.init_state(5, 8, torch.device("cpu"))
    chosen = policy.select(make_step(confidence.tolist(), masked.tolist()), {})
    hidden = (confidence @ weights["fc1.weight"].T + weights["fc1.bias"]).clamp(min=0)
    logits = hidden @ weights["fc2.weight"].T + weights["fc2.bias"]
    assert torch.equal(chosen, masked & (1 / (1 + (-logits).exp()) > 0.6))
    assert 0 < chosen.sum() < masked.sum()


def test_a_row_does_not_depend_on_its_batch_to_the_bit(folder):
    loaded = load_filter(UnmaskFilter, folder)
    confidence = torch.rand(33, 8)
    together = loaded(confidence)
    for row in range(33):
        assert torch.equal(loaded(confidence[row : row + 1])[0], together[row])


def test_a_device_is_recognised_by_any_of_its_names(folder, make_step):
    policy = create_policy("learn2pd", filter=str(folder))
    state = policy.init_state(1, 8, torch.device("cpu:0"))
    assert policy.select(make_step([[0.5] * 8]), state).shape == (1, 8)


def random_steps(steps, length, generator=None):
    """Steps of prompts with two each; half of the predictions are right."""
    names = ("confidence", "entropy", "margin")
    values = {name: torch.rand(steps, length, generator=generator) for name in names}
    correct = torch.rand(steps, length, generator=generator) > 0.5
    index = torch.zeros(steps, dtype=torch.int64)
    return Trajectories(
        prompt=torch.arange(steps) // 2,
        policy=index,
        block=index,
        step=index,
        masked=correct | True,
        present=correct | True,
        x0=torch.zeros(steps, length, dtype=torch.int32),
        correct=correct,
        **values,
    )


@pytest.mark.parametrize("name", ["confidence", "entropy", "margin"])
def test_trajectories_with_nan_are_refused(name):
    data = random_steps(8, 4)
    getattr(data, name)[5, 2] = torch.nan
    with pytest.raises(L2PDError, match=rf"a {name} that is not finite, .* counted from 0: 2;"):
        train(UnmaskFilter, data, Recipe(epochs=1), block_length=4, base_model="m")


@pytest.mark.parametrize("seed", range(4))
def test_the_threshold_is_a_probability_as_the_policy_computes_it(seed):
    """Otherwise rounding could let the wrong prediction at the threshold exceed it."""
    data = random_steps(40, 7, torch.Generator().manual_seed(seed))
    recipe = Recipe(epochs=1, seed=seed)
    made = train(UnmaskFilter, data, recipe, block_length=7, base_model="m").filter
    held = data.take(split_by_prompt(data, recipe.validation_share, seed)[1])
    wrong = exact.sigmoid(made(UnmaskFilter.inputs_of(held)))[~held.correct]
    assert made.threshold in wrong.tolist()
    assert int((wrong > made.threshold).sum()) == int(recipe.false_positive_rate * len(wrong))


@pytest.mark.parametrize(("rate", "warned"), [(0.0, True), (1.0, False)])
def test_a_filter_that_accepts_next_to_nothing_is_said_to_be_that(caplog, rate, warned):
    data = random_steps(200, 4, torch.Generator().manual_seed(0))
    recipe = Recipe(epochs=1, false_positive_rate=rate)
    made = train(UnmaskFilter, data, recipe, block_length=4, base_model="m")
    share = made.metrics["true_positive_rate"]
    assert (share < 0.05) is warned  # chance decides which predictions are right
    said = f"accepts next to nothing: {100 * share:.1f} % of the right predictions"
    assert [said in message for message in caplog.messages] == [True] * warned


def test_a_probability_at_the_threshold_does_not_exceed_it(make_step):
    neutral = UnmaskFilter(block_length=8, threshold=0.5, base_model="m")
    for weight in neutral.parameters():
        weight.data.zero_()  # every logit is 0, every probability one half
    step = make_step([[0.1] * 8])
    for threshold, taken in ((0.5, False), (0.4999, True), (0.5001, False)):
        policy = create_policy("learn2pd", threshold=threshold).use(neutral)
        policy.init_state(1, 8, torch.device("cpu"))
        assert policy.select(step, {}).tolist() == [[taken] * 8], threshold


def test_threshold_and_progress_come_from_the_filter_by_default(folder):
    policy = create_policy("learn2pd", filter=str(folder))
    assert (policy.threshold, policy.progress) == (0.6, "always_top1")
    assert create_policy("learn2pd", filter=str(folder), threshold=0.9).threshold == 0.9


def test_the_filter_of_the_model_is_found_in_its_folder(folder, tmp_path):
    (tmp_path / "model" / "policies").mkdir(parents=True)
    folder.rename(tmp_path / "model" / "policies" / "learn2pd")
    model = ModelContext("m", 8, 99, 100, path=str(tmp_path / "model"))
    unbound = create_policy("learn2pd", threshold=0.7)
    bound = unbound.for_model(model)
    assert bound.threshold == 0.7
    assert bound.describe() == f"learn2pd(filter={bound.filter}, threshold=0.7, fallback=none)"
    assert unbound.filter is None


def test_a_model_without_a_filter_is_named(tmp_path):
    with pytest.raises(L2PDError, match=r"no filter belongs to the model 'm'.*filter=FOLDER"):
        create_policy("learn2pd").for_model(ModelContext("m", 8, 99, 100, path=str(tmp_path)))


def test_another_block_length_is_refused(folder):
    policy = create_policy("learn2pd", filter=str(folder))
    with pytest.raises(L2PDError, match=r"blocks of 8 positions.*block_length=16"):
        policy.for_model(ModelContext("m", 16, 99, 100))
    with pytest.raises(L2PDError, match=r"blocks of 8 positions.*block_length=16"):
        policy.init_state(1, 16, torch.device("cpu"))


def test_copies_and_pickles_decide_equally(make_step, folder):
    policy = create_policy("learn2pd", filter=str(folder))
    step = make_step(torch.rand(2, 8).tolist())
    answers = []
    for twin in (policy, copy.deepcopy(policy), pickle.loads(pickle.dumps(policy))):
        twin.init_state(2, 8, torch.device("cpu"))
        answers.append(twin.select(step, {}))
    assert torch.equal(answers[0], answers[1])
    assert torch.equal(answers[0], answers[2])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"schema_version": 99}, "schema_version = 99: expected 1"),
        ({"block_length": 0}, "block_length = 0"),
        ({"threshold": 1.5}, "threshold = 1.5"),
        ({"progress": "never"}, "progress = 'never'"),
        ({"features": ["entropy"]}, "features"),
        ({"surprise": 1}, "surprise"),
        ({"threshold": ...}, "the field threshold is missing"),
        ({"block_length": 16}, "weights are"),
    ],
)
def test_a_broken_config_is_refused(folder, changes, words):
    rewrite(folder, **changes)
    with pytest.raises(L2PDError, match=words):
        load_filter(UnmaskFilter, folder)


def test_broken_weights_are_refused(folder):
    weights = load_file(folder / "model.safetensors")
    weights["fc1.bias"][3] = torch.nan
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(L2PDError, match=r"fc1\.bias.*not finite"):
        load_filter(UnmaskFilter, folder)
    (folder / "model.safetensors").write_bytes(b"no safetensors at all")
    with pytest.raises(L2PDError, match="cannot be read"):
        load_filter(UnmaskFilter, folder)
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(L2PDError, match=r"model\.safetensors missing"):
        load_filter(UnmaskFilter, folder)


def test_a_source_that_is_neither_a_folder_nor_a_hub_id_is_refused():
    for source in ("./nowhere", "plain-name", "a/b/c"):
        with pytest.raises(L2PDError, match="neither an existing folder nor a hub id"):
            load_filter(UnmaskFilter, source)
