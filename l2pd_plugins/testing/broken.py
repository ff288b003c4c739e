"""Policies that each break the contract in one way, to test that the kit catches it.

`CAUGHT_BY` names the check that must catch each policy.

Longer than 400 lines: it is one list of policies, each of a few lines.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from l2pd_plugins.options import policy_options
from l2pd_plugins.policy import DenoisingStep, ModelContext, UnmaskPolicy

State = dict[str, Tensor]


class Stuck(UnmaskPolicy):
    """Never selects anything."""

    def select(self, step: DenoisingStep, state: State) -> Tensor:
        return torch.zeros_like(step.masked)


class Overwriting(UnmaskPolicy):
    """Selects committed positions without saying that it edits."""

    def select(self, step: DenoisingStep, state: State) -> Tensor:
        return step.confidence > 0.5


class LeakingBetweenRows(UnmaskPolicy):
    """Takes the threshold from the mean of the whole batch."""

    def select(self, step: DenoisingStep, state: State) -> Tensor:
        return step.masked & (step.confidence >= step.confidence.mean())


class RememberingRequests(UnmaskPolicy):
    """Counts its calls on the object, and lowers its threshold with them."""

    def __init__(self) -> None:
        self.calls = 0

    def select(self, step: DenoisingStep, state: State) -> Tensor:
        self.calls += 1
        return step.masked & (step.confidence >= 0.9 - min(self.calls * 0.02, 0.8))


class ChangingItsInput(UnmaskPolicy):
    """Works in place on the step's confidences."""

    def select(self, step: DenoisingStep, state: State) -> Tensor:
        return step.masked & (step.confidence.mul_(0.9) > 0.5)


class ChangingItsInputUnseen(UnmaskPolicy):
    """Works in place on the step's confidences, in a way that torch does not count."""

    def select(self, step: DenoisingStep, state: State) -> Tensor:
        return step.masked & (step.confidence.data.mul_(0.9) > 0.5)


class NonDeterministic(UnmaskPolicy):
    """Draws from the global random numbers."""

    def select(self, step: DenoisingStep, state: State) -> Tensor:
        return step.masked & (torch.rand_like(step.confidence) < step.confidence)


class StateWithoutRows(UnmaskPolicy):
    """Keeps one number for all rows."""

    def init_state(self, batch_size: int, block_length: int, device: torch.device) -> State:
        return {"best": torch.zeros(1, device=device)}

    def select(self, step: DenoisingStep, state: State) -> Tensor:
        return step.masked & (step.confidence > 0.7)


class Unpicklable(UnmaskPolicy):
    """Holds a lambda."""

    def __init__(self) -> None:
        self.rule: Callable[[Tensor], Tensor] = lambda confidence: confidence > 0.7

    def select(self, step: DenoisingStep, state: State) -> Tensor:
        return step.masked & self.rule(step.confidence)


class ReadingBack(UnmaskPolicy):
    """Looks at the values on the host: a synchronisation at every step."""

    def select(self, step: DenoisingStep, state: State) -> Tensor:
        if bool((step.confidence > 0.9).any()):
            return step.masked & (step.confidence > 0.9)
        return step.masked & (step.confidence > 0.7)


class NotBool(UnmaskPolicy):
    """Returns scores."""

    def select(self, step: DenoisingStep, state: State) -> Tensor:
        return step.confidence


class _Threshold(UnmaskPolicy):
    """Keeps the contract; the policies below break it in one place."""

    def init_state(self, batch_size: int, block_length: int, device: torch.device) -> State:
        return {"best": torch.zeros(batch_size, block_length, device=device)}

    def select(self, step: DenoisingStep, state: State) -> Tensor:
        state["best"] = torch.maximum(state["best"], step.confidence)
        return step.masked & (state["best"] > 0.7)


class Nameless(_Threshold):
    """Its name raises."""

    @property
    def name(self) -> str:
        raise LookupError("no name yet")


class Unprintable(_Threshold):
    """Its name contains a terminal escape sequence."""

    @property
    def name(self) -> str:
        return "\x1b[31mred\ud800"


class NeedingUnknown(_Threshold):
    """Requires a statistic that does not exist."""

    requires = frozenset({"mood"})


class NeedingRaises(_Threshold):
    """Its requires raises."""

    @property
    def requires(self) -> frozenset[str]:  # type: ignore[override]
        raise LookupError("not known yet")


class UnknownProgress(_Threshold):
    """Names a progress rule that does not exist."""

    progress = "random_if_empty"


class Sparse(_Threshold):
    """Answers a sparse tensor."""

    def select(self, step: DenoisingStep, state: State) -> Tensor:
        return super().select(step, state).to_sparse()


class Elsewhere(_Threshold):
    """Answers on another device."""

    def select(self, step: DenoisingStep, state: State) -> Tensor:
        return super().select(step, state).to("meta")


class Exiting(_Threshold):
    """Ends the process, or tries to."""

    def select(self, step: DenoisingStep, state: State) -> Tensor:
        raise SystemExit(1)


class Unreadable(_Threshold):
    """Raises an error whose message raises."""

    class Error(Exception):
        """Its message cannot be read."""

        def __str__(self) -> str:
            raise LookupError("no message")

    def select(self, step: DenoisingStep, state: State) -> Tensor:
        raise self.Error


class UnboundForModel(_Threshold):
    """for_model forgets to return the policy."""

    def for_model(self, model: ModelContext) -> UnmaskPolicy:
        return None  # type: ignore[return-value]


class StateIsNoDict(_Threshold):
    """Keeps a list."""

    def init_state(self, batch_size: int, block_length: int, device: torch.device) -> State:
        return [torch.zeros(batch_size, block_length, device=device)]  # type: ignore[return-value]


class StateRequiresGrad(_Threshold):
    """Remembers the graph of every step."""

    def init_state(self, batch_size: int, block_length: int, device: torch.device) -> State:
        return {"best": torch.zeros(batch_size, block_length, device=device, requires_grad=True)}


class StateIsSparse(_Threshold):
    """Keeps a sparse tensor."""

    def init_state(self, batch_size: int, block_length: int, device: torch.device) -> State:
        return {"best": torch.zeros(batch_size, block_length, device=device).to_sparse()}


class StateChangesDtype(_Threshold):
    """Counts in whole numbers, until it adds a half."""

    def init_state(self, batch_size: int, block_length: int, device: torch.device) -> State:
        return {"count": torch.zeros(batch_size, dtype=torch.int64, device=device)}

    def select(self, step: DenoisingStep, state: State) -> Tensor:
        state["count"] = state["count"] + 0.5
        return step.masked & (step.confidence > 0.7)


class StateMoves(_Threshold):
    """Puts its state on another device."""

    def select(self, step: DenoisingStep, state: State) -> Tensor:
        answer = super().select(step, state)
        state["best"] = state["best"].to("meta")
        return answer


class StateBecomesNumber(_Threshold):
    """Replaces a tensor of its state by a number."""

    def select(self, step: DenoisingStep, state: State) -> Tensor:
        answer = super().select(step, state)
        state["best"] = 0.5  # type: ignore[assignment]
        return answer


class StateChangesNames(_Threshold):
    """Adds a tensor to its state in the middle of a block."""

    def select(self, step: DenoisingStep, state: State) -> Tensor:
        answer = super().select(step, state)
        state["more"] = state["best"]
        return answer


class StateChangesLater(_Threshold):
    """Begins later blocks with another dtype."""

    def __init__(self) -> None:
        self.begun = False

    def init_state(self, batch_size: int, block_length: int, device: torch.device) -> State:
        dtype = torch.float64 if self.begun else torch.float32
        self.begun = True
        return {"best": torch.zeros(batch_size, block_length, dtype=dtype, device=device)}

    def select(self, step: DenoisingStep, state: State) -> Tensor:
        state["best"] = torch.maximum(state["best"], step.confidence.to(state["best"].dtype))
        return step.masked & (state["best"] > 0.7)


class StateRenamedLater(UnmaskPolicy):
    """Begins later blocks with another name."""

    def __init__(self) -> None:
        self.name_of_state = "best"

    def init_state(self, batch_size: int, block_length: int, device: torch.device) -> State:
        made = {self.name_of_state: torch.zeros(batch_size, block_length, device=device)}
        self.name_of_state = "highest"
        return made

    def select(self, step: DenoisingStep, state: State) -> Tensor:
        return step.masked & (step.confidence > 0.7)


class StateReshapedLater(UnmaskPolicy):
    """Begins later blocks with another shape."""

    def __init__(self) -> None:
        self.more: tuple[int, ...] = ()

    def init_state(self, batch_size: int, block_length: int, device: torch.device) -> State:
        shape = (batch_size, block_length, *self.more)
        self.more = (2,)
        return {"best": torch.zeros(shape, device=device)}

    def select(self, step: DenoisingStep, state: State) -> Tensor:
        return step.masked & (step.confidence > 0.7)


class WritingToLogits(_Threshold):
    """Works in place on the model's own logits."""

    requires = frozenset({"confidence", "logits"})

    def select(self, step: DenoisingStep, state: State) -> Tensor:
        return step.masked & (step.logits.div_(2.0).softmax(-1).amax(-1) > 0.5)


class Undescribed(_Threshold):
    """Its `describe` raises."""

    def describe(self) -> str:
        raise RuntimeError("not a word")


class OddOptions(_Threshold):
    """Has an object among its options."""

    def options(self) -> dict[str, object]:
        return {"device": torch.device("cpu")}


class FingerprintOfNumbers(_Threshold):
    """Returns a number as its fingerprint."""

    def fingerprint(self) -> str:
        return 5  # type: ignore[return-value]


class UnknownRowOption(_Threshold):
    """Names an option for rows that it does not have."""

    row_options = frozenset({"treshold"})


class ThresholdInItsState(_Threshold):
    """Its first state depends on an option that may have one value per row."""

    row_options = frozenset({"threshold"})

    def __init__(self) -> None:
        self.threshold = 0.9

    def init_state(self, batch_size: int, block_length: int, device: torch.device) -> State:
        return {"limit": torch.full((batch_size, 1), self.threshold, device=device)}

    def select(self, step: DenoisingStep, state: State) -> Tensor:
        return step.masked & (step.confidence >= state["limit"])


class BranchingOnThreshold(_Threshold):
    """Reads an option on the host that may have one value per row."""

    row_options = frozenset({"threshold"})

    def __init__(self) -> None:
        self.threshold = 0.9

    def select(self, step: DenoisingStep, state: State) -> Tensor:
        limit = self.threshold if self.threshold > 0.5 else 0.5
        return step.masked & (step.confidence >= limit)


class Misspelt(_Threshold):
    """Reads an attribute that a step does not have."""

    def select(self, step: DenoisingStep, state: State) -> Tensor:
        return step.masked & (step.confidnce > 0.7)  # type: ignore[attr-defined, no-any-return]


class NeedingUnsaid(_Threshold):
    """Reads a statistic that it does not require."""

    requires = frozenset({"margin"})

    def select(self, step: DenoisingStep, state: State) -> Tensor:
        return step.masked & (step.entropy < 0.5) & (step.margin > 0.1)


class NeedingMisspelt(_Threshold):
    """Misspells what it requires."""

    requires = frozenset({"entropie"})


class NeedingText(_Threshold):
    """Requires a text instead of a set."""

    requires = "entropy"  # type: ignore[assignment]


class NeedingAGenerator(_Threshold):
    """Expects that every row has a generator."""

    def select(self, step: DenoisingStep, state: State) -> Tensor:
        length = step.masked.shape[1]
        drawn = [torch.rand(length, generator=each) for each in step.generator]  # type: ignore[union-attr]
        return step.masked & (torch.stack(drawn) < step.confidence)


class LoopingOverRows(_Threshold):
    """Decides about one row after the other."""

    def select(self, step: DenoisingStep, state: State) -> Tensor:
        rows = [masked & (c > 0.7) for masked, c in zip(step.masked, step.confidence, strict=True)]
        return torch.stack(rows)


class UntypedOption(_Threshold):
    """Its option has no type."""

    def __init__(self, limit=0.7) -> None:  # type: ignore[no-untyped-def]
        self.limit = limit


@policy_options
class UnannotatedOption(_Threshold):
    """The number in its body looks like an option, but is none."""

    limit = 0.7


class NeverMade(_Threshold):
    """Cannot be created."""

    def __init__(self) -> None:
        raise FileNotFoundError("weights.safetensors")


class FailingLater(_Threshold):
    """Fails at its third step."""

    def select(self, step: DenoisingStep, state: State) -> Tensor:
        if int(step.step_index[0]) > 1:
            raise IndexError("no third step")
        return torch.zeros_like(step.masked)


CAUGHT_BY: dict[type[UnmaskPolicy], str] = {
    Stuck: "makes_progress",
    Overwriting: "selects_only_masked",
    LeakingBetweenRows: "keeps_rows_apart",
    RememberingRequests: "forgets_requests",
    ChangingItsInput: "takes_a_step",
    WritingToLogits: "takes_a_step",
    ChangingItsInputUnseen: "leaves_its_input",
    Undescribed: "describes_itself",
    OddOptions: "describes_itself",
    FingerprintOfNumbers: "describes_itself",
    NonDeterministic: "is_deterministic",
    StateWithoutRows: "state_is_per_row",
    ThresholdInItsState: "takes_row_options",
    BranchingOnThreshold: "takes_row_options",
    UnknownRowOption: "says_what_it_needs",
    Unpicklable: "can_be_copied",
    ReadingBack: "reads_nothing_back",
    NotBool: "takes_a_step",
    Nameless: "names_itself",
    Unprintable: "names_itself",
    NeedingUnknown: "says_what_it_needs",
    NeedingRaises: "says_what_it_needs",
    UnknownProgress: "says_what_it_needs",
    Sparse: "takes_a_step",
    Elsewhere: "takes_a_step",
    Exiting: "takes_a_step",
    Unreadable: "takes_a_step",
    UnboundForModel: "can_be_made",
    StateIsNoDict: "state_is_per_row",
    StateRequiresGrad: "state_is_per_row",
    StateIsSparse: "state_is_per_row",
    StateChangesDtype: "takes_a_step",
    StateMoves: "takes_a_step",
    StateBecomesNumber: "takes_a_step",
    StateChangesNames: "takes_a_step",
    StateChangesLater: "state_keeps_its_form",
    StateRenamedLater: "state_keeps_its_form",
    StateReshapedLater: "state_keeps_its_form",
    Misspelt: "takes_a_step",
    NeedingUnsaid: "takes_a_step",
    NeedingMisspelt: "says_what_it_needs",
    NeedingText: "says_what_it_needs",
    NeedingAGenerator: "bears_no_generator",
    LoopingOverRows: "decides_all_rows_at_once",
    UntypedOption: "declares_its_options",
    UnannotatedOption: "declares_its_options",
    NeverMade: "can_be_made",
    FailingLater: "ends",
}
