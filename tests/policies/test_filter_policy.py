"""Policies with a filter: where the filter comes from, and what the policy itself decides."""

from __future__ import annotations

import re

import pytest
import torch

from l2pd_plugins import L2PDError, ModelContext, create_policy
from l2pd_plugins.blocks import BlockBatch
from l2pd_plugins.denoising import denoising_step
from l2pd_plugins.end_of_text import EndOfText
from l2pd_plugins.options import PolicyOptionError
from l2pd_plugins.trajectories import fingerprint
from l2pd_policies.learn2pd import UnmaskFilter
from l2pd_policies.settled import Settled, SignalFilter
from l2pd_policies.settled.signals import SIGNALS, STOOD_LIMIT

LENGTH, VOCABULARY, MASK = 8, 12, 11
CPU = torch.device("cpu")


def filter_of(name):
    kind = {"learn2pd": UnmaskFilter, "settled": SignalFilter}[name]
    torch.manual_seed(0)
    made = kind(block_length=LENGTH if name == "learn2pd" else None, base_model="m")
    return made.eval().requires_grad_(False)


def model_in(folder):
    return ModelContext("m", LENGTH, MASK, VOCABULARY, path=None if folder is None else str(folder))


@pytest.mark.parametrize("name", ["learn2pd", "settled"])
def test_the_filter_in_the_folder_of_the_model_is_used(name, tmp_path):
    made = filter_of(name)
    made.save_pretrained(tmp_path / "policies" / name)
    bound = create_policy(name).for_model(model_in(tmp_path))
    assert bound.filter == f"m/policies/{name}"
    assert bound.threshold == made.threshold
    assert bound.fingerprint() == fingerprint(made.state_dict()) != ""


@pytest.mark.parametrize("name", ["learn2pd", "settled"])
def test_a_missing_filter_is_named_with_the_folder_that_was_searched(name, tmp_path):
    policy = create_policy(name)
    with pytest.raises(L2PDError) as got:
        policy.for_model(model_in(tmp_path))
    assert f"({tmp_path / 'policies' / name})" in str(got.value)
    with pytest.raises(L2PDError, match=r"model 'm' \(it has no folder\)"):
        policy.for_model(model_in(None))


@pytest.mark.parametrize(
    ("base", "name", "warned"),
    [
        ("GSAI-ML/LLaDA-8B-Instruct", "Dream-org/Dream-v0-Instruct-7B", True),
        ("tiny-llada", "tiny-sdar", True),
        ("GSAI-ML/LLaDA-8B-Instruct", "/models/llada-8b-instruct", False),
        (
            "GSAI-ML/LLaDA-8B-Instruct",
            "/hub/models--GSAI-ML--LLaDA-8B-Instruct/snapshots/1f",
            False,
        ),
        ("tiny-llada with the adapter x", "tiny-llada", False),
        ("", "tiny-sdar", False),
    ],
)
def test_a_filter_of_another_model_is_said_to_be_that(tmp_path, caplog, base, name, warned):
    made = filter_of("settled")
    made.base_model = base
    made.save_pretrained(tmp_path / "filter")
    policy = create_policy("settled", filter=str(tmp_path / "filter"))
    for _ in range(2):
        policy.for_model(ModelContext(name, LENGTH, MASK, VOCABULARY))
    said = f"was trained on decodes of the model {base!r}, this model is {name!r}"
    told = [message for message in caplog.messages if "trained on decodes" in message]
    assert len(told) == warned and all(said in message for message in told)


def test_a_filter_of_another_policy_is_said_to_be_that(tmp_path):
    class Unnamed(SignalFilter):
        POLICY = ""
        FEATURES = ("smell",)

    filter_of("settled").save_pretrained(tmp_path / "settled")
    Unnamed().save_pretrained(tmp_path / "unnamed")
    words = "it is a filter of the policy settled; expected one of learn2pd$"
    with pytest.raises(L2PDError, match=words):
        create_policy("learn2pd", filter=str(tmp_path / "settled"))
    with pytest.raises(L2PDError, match=r"features = \['smell'\]: expected \['confidence'\]"):
        create_policy("learn2pd", filter=str(tmp_path / "unnamed"))


def test_a_link_out_of_the_models_folder_is_not_followed(tmp_path):
    filter_of("learn2pd").save_pretrained(tmp_path / "elsewhere")
    (tmp_path / "model" / "policies").mkdir(parents=True)
    (tmp_path / "model" / "policies" / "learn2pd").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(L2PDError, match="leads out of the folder"):
        create_policy("learn2pd").for_model(model_in(tmp_path / "model"))


def test_without_a_filter_there_is_no_fingerprint():
    assert create_policy("learn2pd").fingerprint() == ""


def test_the_loaded_filter_is_no_option_and_is_not_shown():
    with pytest.raises(PolicyOptionError, match="_loaded"):
        create_policy("learn2pd", _loaded=filter_of("learn2pd"))
    shown = repr(create_policy("learn2pd").use(filter_of("learn2pd")))
    options = (
        r"filter=None, threshold=0\.\d+, fallback='none', fallback_threshold=None, "
        r"fallback_gamma=None, variant=None"
    )
    assert re.fullmatch(rf"\w+\({options}\)", shown)


def test_a_filter_stays_on_its_device_when_another_one_uses_it():
    made = filter_of("learn2pd")
    policy = create_policy("learn2pd").use(made)
    policy.init_state(1, LENGTH, torch.device("meta"))
    assert {weight.device for weight in made.parameters()} == {CPU}
    policy.init_state(1, LENGTH, CPU)
    assert policy._on_device.keys() == {torch.device("meta"), CPU}


def test_a_gpu_without_a_number_is_the_current_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    policy = create_policy("learn2pd").use(filter_of("learn2pd"))
    there = {number: filter_of("learn2pd") for number in (1, 3)}
    policy._on_device = {torch.device("cuda", number): each for number, each in there.items()}
    assert policy._filter_on(torch.device("cuda")) is there[3]
    assert policy._filter_on(torch.device("cuda", 1)) is there[1]
    meta = policy._filter_on(torch.device("meta"))
    assert {weight.device.type for weight in meta.parameters()} == {"meta"}


# Settled


def test_the_state_is_made_on_the_device_of_the_block():
    policy = create_policy("settled").use(filter_of("settled"))
    state = policy.init_state(2, 5, torch.device("meta"))
    assert {each.device.type for each in state.values()} == {"meta"}
    assert {each.shape for each in state.values()} == {(2, 5)}


def test_steps_of_an_unchanged_prediction_are_counted():
    class Watched(Settled):
        def inputs(self, step, state):
            made = super().inputs(step, state)
            stood.append(made[0, -1, SIGNALS.index("stood")].item() * STOOD_LIMIT)
            return made

    stood: list[float] = []
    policy = Watched(threshold=0.999, risk=0.0).use(filter_of("settled"))
    batch = BlockBatch.start(torch.full((1, LENGTH), MASK), [policy], mask_token_id=MASK)
    logits = torch.zeros(1, LENGTH, VOCABULARY)
    logits[0, :, 3] = torch.arange(LENGTH, 0, -1) / 4  # the last position is selected last
    for step in range(LENGTH):
        if step == 6:
            logits[0, -1, 5] = 9.0  # a new prediction of the same position
        denoising_step(batch, logits, end_of_text=EndOfText("off", ()))
    assert stood == [0, 1, 2, 3, 4, 4, 0, 1]


def test_the_default_risk_is_a_tenth():
    assert create_policy("settled").risk == 0.1


@pytest.mark.parametrize("doubt", [0.125, 0.25, 0.5, 0.75])
def test_doubts_whose_sum_equals_the_risk_are_within_it(doubt):
    masked = torch.ones(1, 2, dtype=torch.bool)
    probability = torch.tensor([[1 - doubt, 0.01]])
    assert Settled(threshold=0.95, risk=doubt).accepts(probability, masked).tolist() == [
        [True, False]
    ]
    less = Settled(threshold=0.95, risk=doubt * 0.999)
    assert not less.accepts(probability, masked).any()


def test_the_leftmost_of_equal_doubts_are_taken():
    masked = torch.ones(1, 40, dtype=torch.bool)
    taken = Settled(threshold=0.95, risk=0.5).accepts(torch.full((1, 40), 0.9), masked)
    count = int(taken.sum())
    assert 1 < count < 10
    assert taken[0, :count].all()
