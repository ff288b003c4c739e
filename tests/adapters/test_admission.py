"""What requests to a server may set about their policies, for every engine."""

from __future__ import annotations

import gc
import math
import os
import pickle
import re
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from l2pd_adapters.admission import MIB, state_bytes
from l2pd_adapters.serving import PolicyServer, guarded
from l2pd_adapters.tiny_models import folder_of
from l2pd_plugins import ModelContext, create_policy
from l2pd_plugins.errors import L2PDError
from l2pd_plugins.plugins import find_policy
from l2pd_plugins.policy import UnmaskPolicy

MODEL = folder_of("tiny-sdar")
FILTER = MODEL / "policies" / "learn2pd"
BLOCK, MASK, VOCABULARY, CANVAS = 32, 39, 320, 512


def launched(
    policy: str = "confidence_threshold",
    *,
    vocabulary: int = VOCABULARY,
    rows: int = 4,
    **asked: Any,
) -> PolicyServer:
    return PolicyServer.at_launch(
        policy,
        asked,
        end_tokens=(38,),
        model=ModelContext("m", BLOCK, MASK, vocabulary, path=str(MODEL)),
        canvas=CANVAS,
        rows=rows,
    )


@pytest.fixture(scope="module")
def settings() -> PolicyServer:
    return launched()


class TestValues:
    @pytest.mark.parametrize(
        ("name", "options", "said"),
        [
            (None, "s", "options 's'"),
            (None, [1], "options"),
            (5, {}, "policy 5"),
            ("x" * 10**6, {}, "policy 'xxx"),
            ("oracle", {"reference": [[1, 2], [3]]}, "'reference'"),
            ("oracle", {"reference": [[]]}, "'reference'"),
            ("oracle", {"reference": []}, "'reference'"),
            ("oracle", {"reference": 2**63}, "'reference'"),
            ("oracle", {"reference": [2**63]}, "'reference'.*vocabulary"),
            ("oracle", {"reference": [2**64 - 1]}, "'reference'.*vocabulary"),
            ("oracle", {"reference": [VOCABULARY]}, "'reference'.*vocabulary"),
            ("oracle", {"reference": [-1]}, "'reference'"),
            ("oracle", {"reference": [1] * (CANVAS + 1)}, "'reference'.*at most 512"),
            ("oracle", {}, "needs a reference"),
            ("local_leap", {"radius": 10**18}, "'radius'.*block"),
            ("klass", {"history": BLOCK + 1}, "'history'.*block"),
            ("fixed_schedule", {"steps": CANVAS + 1}, "'steps'.*canvas"),
            ("confidence_threshold", {"threshold": [0.5] * 2_000_000}, "'threshold'"),
            ("confidence_threshold", {"threshold": {"a": {"b": 1}}}, "'threshold'"),
            ("confidence_threshold", {"threshold": float("nan")}, "'threshold'"),
            ("confidence_threshold", {"x" * 10**6: 1}, "short name"),
            ("confidence_threshold", {f"o{i}": 1 for i in range(100)}, "100 options"),
            ("confidence_threshold", {"thresholds": 1}, "no option 'thresholds'.*threshold"),
        ],
    )
    def test_invalid_values_are_refused_by_name_in_few_words(
        self, settings: PolicyServer, name: Any, options: Any, said: str
    ) -> None:
        with pytest.raises(L2PDError) as caught:
            settings.for_request(name, options)
        assert re.search(said, str(caught.value))
        assert len(str(caught.value)) < 600

    def test_values_within_the_bounds_are_accepted(self, settings: PolicyServer) -> None:
        for name, options in (
            ("oracle", {"reference": [0, VOCABULARY - 1] * (CANVAS // 2)}),
            ("local_leap", {"radius": BLOCK}),
            ("fixed_schedule", {"steps": CANVAS}),
            ("learn2pd", {"threshold": 0.5}),
        ):
            assert settings.for_request(name, options).name == name


class TestPaths:
    def test_a_request_may_not_name_a_path(self, settings: PolicyServer, tmp_path: Path) -> None:
        """The answer is the same whether or not the path exists."""
        fifo = tmp_path / "fifo"
        os.mkfifo(fifo)  # opening it would block forever
        answers = set()
        for name, option in (("learn2pd", "filter"), ("pc_sampler", "frequencies")):
            for path in (str(FILTER), str(fifo), "/nowhere", "owner/name"):
                with pytest.raises(L2PDError, match="request_paths") as caught:
                    settings.for_request(name, {option: path})
                answers.add(str(caught.value).replace(path, "PATH").replace(option, "OPTION"))
        assert len(answers) == 1

    def test_allowed_paths_are_read_at_launch(self, tmp_path: Path) -> None:
        folder = tmp_path / "filter"
        shutil.copytree(FILTER, folder)
        settings = launched(request_paths=[str(folder)])
        shutil.rmtree(folder)  # stands for a changed folder, or a hub that does not answer
        for each in (settings, pickle.loads(pickle.dumps(settings))):
            policy = each.for_request("learn2pd", {"filter": str(folder), "threshold": 0.5})
            policy.init_state(1, BLOCK, torch.device("cpu"))
            with pytest.raises(L2PDError, match="request_paths"):
                each.for_request("learn2pd", {"filter": f"{folder}/"})

    def test_request_options_may_list_paths_too(self) -> None:
        settings = launched(
            request_paths=[str(FILTER)], request_options={"learn2pd": ["threshold"]}
        )
        settings.for_request("learn2pd", {"threshold": 0.5})
        with pytest.raises(L2PDError, match="'filter' is not for requests to set"):
            settings.for_request("learn2pd", {"filter": str(FILTER)})

    def test_a_models_own_filters_are_read_at_launch(self, tmp_path: Path) -> None:
        model = tmp_path / "model"
        shutil.copytree(folder_of("tiny-llada") / "policies", model / "policies")
        settings = PolicyServer.at_launch(
            "confidence_threshold",
            {},
            end_tokens=(38,),
            model=ModelContext("m", BLOCK, MASK, VOCABULARY, path=str(model)),
        )
        shutil.rmtree(model)
        weights = {
            settings.for_request("learn2pd", options).fingerprint()
            for options in ({"threshold": 0.5}, {"variant": "monotone"})
        }
        assert len(weights - {""}) == 2

    def test_a_path_that_no_policy_can_use_is_refused_at_launch(self, tmp_path: Path) -> None:
        with pytest.raises(L2PDError, match=r"request_paths: .*neither an existing folder"):
            launched(request_paths=[str(tmp_path / "nowhere")])


class TestOperatorsChoice:
    def test_policies(self) -> None:
        settings = launched("learn2pd", request_policies=["Fixed-Schedule"])
        settings.for_request("fixed_schedule", {"steps": 4})
        settings.for_request("learn2pd", {"threshold": 0.5})  # the server's own
        with pytest.raises(L2PDError, match=r"'oracle' is not for requests.*fixed_schedule"):
            settings.for_request("oracle", {"reference": [1]})

    def test_options(self) -> None:
        settings = launched(request_options={"confidence_threshold": [], "klass": ["threshold"]})
        settings.for_request("klass", {"threshold": 0.5})
        settings.for_request("fixed_schedule", {"steps": 4})
        for name, options in (
            ("confidence_threshold", {"threshold": 0.5}),
            ("klass", {"history": 1}),
        ):
            with pytest.raises(L2PDError, match="not for requests to set"):
                settings.for_request(name, options)

    @pytest.mark.parametrize(
        ("asked", "said"),
        [
            ({"request_policies": "klass"}, "request_policies='klass': expected a list"),
            ({"request_policies": ["nope"]}, "no policy 'nope'"),
            ({"request_options": ["klass"]}, "request_options="),
            ({"request_options": {"klass": ["nope"]}}, "no option 'nope'"),
            ({"request_paths": [5]}, "request_paths"),
            ({"request_state_mib": "1"}, "request_state_mib='1'"),
            ({"request_body_mib": 0}, "request_body_mib=0: expected a whole number of MiB, 1"),
            ({"request_body_mib": 1.5}, "request_body_mib=1.5"),
        ],
    )
    def test_wrong_settings_are_refused_at_launch(self, asked: dict[str, Any], said: str) -> None:
        with pytest.raises(L2PDError, match=said.replace("(", r"\(")):
            launched(**asked)

    def test_the_settings_are_logged(self, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level("INFO"):
            launched(request_policies=["klass"], request_options={"klass": ["threshold"]})
        assert "request_policies=l2pd-plugins:klass" in caplog.text
        assert "l2pd-plugins:klass: threshold" in caplog.text
        assert "request_paths=none" in caplog.text
        assert "request_body_mib=4" in caplog.text


class TestMemory:
    def test_a_policy_lives_as_long_as_its_requests(self, settings: PolicyServer) -> None:
        options = {"reference": [5] * CANVAS}
        one, two = (settings.for_request("oracle", options) for _ in range(2))
        assert one is two
        kept = len(settings._made)
        del one, two
        gc.collect()
        assert len(settings._made) == kept - 1

    def test_the_servers_own_policy_is_kept(self, settings: PolicyServer) -> None:
        assert settings.for_request(None, {}) is settings.for_request("ConfidenceThreshold", {})

    def test_state_beyond_the_limit_is_refused(self) -> None:
        """klass keeps a float32 tensor (block, vocabulary) for each row."""
        wide = launched(vocabulary=1 << 16, rows=16, request_state_mib=129)
        assert wide.for_request("klass", {}).name == "klass"  # 16 times 8 MiB
        narrow = launched(vocabulary=1 << 16, rows=17, request_state_mib=129)
        with pytest.raises(L2PDError, match=r"klass.*9 MiB for each of 17 rows.*request_state_mib"):
            narrow.for_request("klass", {})

    def test_only_choices_that_cannot_share_a_state_are_counted(self) -> None:
        class Slots(PolicyServer):
            """Like vLLM's server, in which each kind of policy has a state for every row."""

            def _choices(self, policy: UnmaskPolicy, name: str | None) -> int:
                spec = find_policy(self.policy_name if name is None else name)
                return self.admission.kinds_of(spec, policy, self.rows)

        def server(**settings: object) -> Slots:
            return Slots.at_launch(
                "klass",
                {"request_state_mib": 129, **settings},
                end_tokens=(38,),
                model=ModelContext("m", BLOCK, MASK, 1 << 16, path=str(MODEL)),
                canvas=CANVAS,
                rows=16,
            )

        made = server()
        assert made.for_request("klass", {}) is made.for_request(None, {})
        assert made.for_request("klass", {"threshold": 0.5}).name == "klass"  # a row option
        assert made.for_request(None, {"history": 3, "kl_threshold": 0.5}).name == "klass"
        counts = {
            name: made.admission.kinds_of(find_policy(name), create_policy(name), 16)
            for name in ("klass", "confidence_threshold", "fixed_schedule", "credit", "oracle")
        }
        assert counts == {
            "klass": 1,
            "confidence_threshold": 1,
            "fixed_schedule": 4,  # with and without each of its two options
            "credit": 16,  # alpha is no row option
            "oracle": 16,
        }
        closed = server(request_options={"credit": ["threshold"]})
        assert closed.admission.kinds_of(find_policy("credit"), create_policy("credit"), 16) == 1

    def test_the_limit_applies_at_launch_too(self) -> None:
        with pytest.raises(L2PDError, match="request_state_mib=129"):
            launched("klass", vocabulary=1 << 16, rows=17, request_state_mib=129)


class TestGuard:
    def test_a_request_that_cannot_begin_continues_by_progress_and_is_logged_once(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        begun = []

        def fails() -> None:
            raise ValueError("raised on purpose in a guard")

        for _ in range(3):
            guarded(fails, lambda: begun.append(1))
        assert len(begun) == 3
        assert len(caplog.records) == 1
        assert "raised on purpose in a guard" in caplog.text


def test_a_request_that_names_no_policy_gets_the_servers(settings: PolicyServer) -> None:
    assert isinstance(settings.for_request(None, {}), UnmaskPolicy)


class ReadsItsState(UnmaskPolicy):
    """Its init_state reads tensor values and draws random numbers."""

    def __init__(self, shape: tuple[int, ...] = (), way: str = "item") -> None:
        self.shape, self.way = shape, way

    def init_state(self, batch_size, block_length, device):
        shape = (batch_size, block_length, *self.shape)
        if self.way == "generator":
            drawn = torch.Generator(device).manual_seed(0)
            return {"a": torch.randn(shape, generator=drawn, device=device)}
        if self.way == "repeated":
            one = torch.ones(batch_size, block_length, device=device)
            assert one.sum().item() > 0
            return {"a": one.view(*one.shape, *[1] * len(self.shape)).repeat(1, 1, *self.shape)}
        if self.way == "numpy":
            torch.ones(1, device=device).numpy()
        assert torch.ones(1, device=device).item() == 1
        return {"a": torch.zeros(shape, device=device), "n": torch.zeros(batch_size, dtype=bool)}

    def select(self, step, state):
        return step.masked


@pytest.mark.parametrize("way", ["item", "generator", "numpy", "repeated"])
def test_a_state_that_needs_its_values_is_counted(way: str) -> None:
    extra = way in ("item", "numpy")
    assert state_bytes(ReadsItsState((3,), way), BLOCK) == 4 * BLOCK * 3 + extra
    for shape, most in (((10**9,), MIB), ((1 << 15,), MIB), ((10**6, 10**6), 1024 * MIB)):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        wanted = 4 * BLOCK * math.prod(shape)
        assert state_bytes(ReadsItsState(shape, way), BLOCK, most) == wanted > most
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 32 * 2**10


def test_a_state_beyond_the_limit_is_refused_if_it_needs_its_values(settings) -> None:
    with pytest.raises(L2PDError, match=r"reads_its_state.* keeps 122071 MiB for each of 4 rows"):
        settings._check_state(ReadsItsState((10**9,)), choices=1)
    settings._check_state(ReadsItsState((3,)), choices=1)


def test_a_state_that_cannot_be_created_takes_no_memory() -> None:
    assert state_bytes(ReadsItsState((-5,)), BLOCK) == 0
