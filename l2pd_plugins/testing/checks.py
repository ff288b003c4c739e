"""The checks, each a function from a bench to nothing; a failed one raises AssertionError.

Longer than 400 lines: it is one list of checks, each of a few lines.

Users see a check's name, and the first line of its docstring, which says what it verifies.
"""

from __future__ import annotations

import copy
import inspect
import json
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from inspect import getattr_static
from pathlib import PurePath
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from l2pd_plugins.blocks import BlockBatch
from l2pd_plugins.errors import ANY_FAILURE, L2PDError, PolicyRuntimeError
from l2pd_plugins.plugins import option_parameters
from l2pd_plugins.policy import DenoisingStep, RemaskingPolicy, UnmaskPolicy
from l2pd_plugins.policy_attributes import TraitError, read_traits
from l2pd_plugins.testing.bench import MASK, VOCABULARY, Bench, generators, same, take_step


def can_be_made(bench: Bench) -> None:
    """The factory makes an UnmaskPolicy, and `for_model` returns one."""
    made: Any = bench.factory()
    assert isinstance(made, UnmaskPolicy), (
        f"the factory made a {type(made).__name__}; expected an UnmaskPolicy"
    )
    bound: Any = made.for_model(bench.model)
    assert isinstance(bound, UnmaskPolicy), (
        f"for_model returned a {type(bound).__name__}; expected an UnmaskPolicy"
    )


def selects_only_masked(bench: Bench) -> None:
    """A selection names masked positions (and committed ones only if the policy edits)."""
    policy = bench.policy()
    if policy.edits:
        assert "committed" in policy.requires, 'edits = True needs "committed" in requires'
        return
    with _watched(policy) as calls:
        bench.decode(policy, masks=-(-bench.length // 2))
    for step, answer in calls:
        rows, places = (answer & ~step.masked).nonzero(as_tuple=True)
        assert not len(rows), (
            f"select chose position {int(places[0])}, which is committed; "
            "and the answer with step.masked, or set edits = True"
        )


def ends(bench: Bench) -> None:
    """Every block ends in at most as many steps as it has masks, and no step overruns it."""
    last = bench.decode(bench.policy())[-1]
    assert (last != MASK).all(), "masks are left after as many steps as there were masks"


def makes_progress(bench: Bench) -> None:
    """On predictions that grow certain, the policy selects by itself: it is not stuck."""
    policy = bench.policy()
    batch = bench.start(policy, 4)
    with _watched(policy) as calls:
        for step in range(bench.length):
            logits = torch.zeros(4, bench.length, VOCABULARY)
            logits[..., 0] = 5.0 * (step + 1)
            take_step(batch, logits)
    assert any(bool(answer.any()) for _, answer in calls), (
        "no position was selected although every prediction stays the same and becomes certain; "
        "only the progress rule committed tokens"
    )


def leaves_its_input(bench: Bench) -> None:
    """No tensor of the step is changed by the policy."""
    policy = bench.policy()
    batch = bench.start(policy, 4)
    changed: set[str] = set()
    for method in _methods(policy):
        _wrap(policy, method, lambda call, step, state: _noting_changes(call, step, state, changed))
    for index in range(min(bench.length, 3)):
        take_step(batch, bench.logits(4, index))
    assert not changed, f"the policy changed step.{', step.'.join(sorted(changed))} in place"


def is_deterministic(bench: Bench) -> None:
    """The same seed gives the same commits; random numbers come only from step.generator."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        first = bench.decode(bench.policy())
        torch.manual_seed(2)
        second = bench.decode(bench.policy())
    assert same(first, second), (
        "two decodes with the same seed differ; draw random numbers only from step.generator"
    )


def keeps_rows_apart(bench: Bench) -> None:
    """A row's result does not depend on the rows beside it, finished ones included."""
    together, alone = bench.policy(), bench.policy()
    batch = bench.start(together, 4)
    # Row 1 has ended before the first step.
    batch.masked = batch.masked & (torch.arange(4) != 1).unsqueeze(-1)
    singles = []
    for row in range(4):
        single = bench.start(alone, 4)
        single.masked = batch.masked.clone()
        single.keep([row])
        singles.append(single)
    _decode_as_alone(bench, batch, singles, "beside other rows")


def _decode_as_alone(
    bench: Bench, batch: BlockBatch, singles: list[BlockBatch], where: str, advice: str = ""
) -> None:
    """Each row of the batch decodes as its own batch in `singles` does."""
    for step in range(bench.length):
        logits = bench.logits(len(singles), step)
        take_step(batch, logits)
        for row, single in enumerate(singles):
            take_step(single, logits[row : row + 1])
            assert torch.equal(batch.tokens[row], single.tokens[0]), (
                f"row {row} decodes differently {where} (step {step}){advice}"
            )


def survives_reordering(bench: Bench) -> None:
    """Its state can be gathered: rows are dropped and reordered in the middle of a block."""
    policy, order = bench.policy(), [3, 0, 2]
    straight, moved = bench.start(policy, 4), bench.start(policy, 4)
    for step in range(bench.length):
        logits = bench.logits(4, step)
        take_step(straight, logits)
        if step == 2:
            moved.keep(order)
        take_step(moved, logits if step < 2 else logits[order])
        if step >= 2:
            assert torch.equal(moved.tokens, straight.tokens[order]), (
                f"rows decode differently after they were reordered (step {step}); keep all "
                "values of a row in the state, with the batch as the first dimension"
            )


def takes_row_options(bench: Bench) -> None:
    """With one value per row of its `row_options`, each row decodes as it does alone."""
    policy = bench.policy()
    if not policy.row_options:
        return
    policies = [_varied(policy, row) for row in range(4)]
    names = ", ".join(sorted(policy.row_options))
    batch = bench.start(policies, 4)
    if len({group.runner.kind for group in batch._groups}) > 1:
        raise AssertionError(f"policies that differ in {names} differ in other attributes, too")
    singles = []
    for row in range(4):
        single = bench.start(policies[row], 4)
        single.keep([row])
        singles.append(single)
    _decode_as_alone(
        bench,
        batch,
        singles,
        f"where {names} has one value per row",
        "; use these options only in select and remask, as numbers or as tensors (rows, 1)",
    )


def _varied(policy: UnmaskPolicy, times: int) -> UnmaskPolicy:
    """A copy with other values of its row options; what is derived from them is computed anew."""
    made = copy.copy(policy)
    for name in policy.row_options:
        if isinstance(getattr_static(type(policy), name, None), cached_property):
            vars(made).pop(name, None)
            continue
        value: Any = getattr(policy, name)
        if isinstance(value, bool):
            value = bool(times % 2)
        elif isinstance(value, int):
            value += times
        elif isinstance(value, float):
            value *= 0.8**times
        object.__setattr__(made, name, value)
    return made


def state_is_per_row(bench: Bench) -> None:
    """init_state gives a dict of dense tensors that have the batch as their first dimension."""
    state: Any = bench.policy().init_state(3, bench.length, torch.device("cpu"))
    assert isinstance(state, dict), f"init_state returned {type(state).__name__}; expected a dict"
    for name, value in state.items():
        assert type(value) is Tensor, (
            f"state {name!r} is a {type(value).__name__}; expected a tensor of 3 rows, (3, ...)"
        )
        plain = value.layout is torch.strided and value.device.type == "cpu"
        assert plain, f"state {name!r} is {value.layout} on {value.device}; expected dense on cpu"
        assert not value.requires_grad, f"state {name!r} requires grad; expected a plain tensor"
        assert value.shape[:1] == (3,), (
            f"state {name!r} has the shape {tuple(value.shape)} for 3 rows; expected (3, ...)"
        )


def forgets_requests(bench: Bench) -> None:
    """Earlier requests that a policy object has decoded do not affect the next request."""
    fresh, used = bench.policy(), bench.policy()
    for seed in (5, 6):
        bench.decode(used, seed=seed)
    assert same(bench.decode(fresh), bench.decode(used)), (
        "a policy that has decoded other requests decides differently; the object remembers"
    )


def forgets_blocks(bench: Bench) -> None:
    """The next block of a row starts from a new state, except for what the policy `carries`."""
    policy = bench.policy()
    batch = bench.start(policy, 2)
    for step in range(bench.length):
        take_step(batch, bench.logits(2, step, seed=5))
    batch.advance([0, 1], torch.full((2, bench.length), MASK), reference=batch.reference)
    fresh = bench.start(policy, 2)
    for name in policy.carries:
        fresh.states[0][name] = batch.states[0][name].clone()
    fresh.block_index, fresh.canvas_length = batch.block_index, batch.canvas_length
    batch.generators, fresh.generators = [*generators(2, seed=0)], [*generators(2, seed=0)]
    for step in range(bench.length):
        take_step(batch, bench.logits(2, step))
        take_step(fresh, bench.logits(2, step))
        assert torch.equal(batch.tokens, fresh.tokens), "a block depends on the one before it"


def names_itself(bench: Bench) -> None:
    """Its name is printable text, also on a terminal and in a log."""
    for policy in (bench.factory(), bench.policy()):
        name: Any = policy.name
        assert isinstance(name, str), f"its name is a {type(name).__name__}; expected text"
        assert name.isprintable(), f"its name {name!r} cannot be printed"
        assert 0 < len(name) <= 100, f"its name has {len(name)} characters; expected 1 to 100"


def describes_itself(bench: Bench) -> None:
    """`describe` and `fingerprint` give printable text, `options` a dict that JSON can hold."""
    for policy in (bench.factory(), bench.policy()):
        for method in ("describe", "fingerprint"):
            text: Any = getattr(policy, method)()
            assert isinstance(text, str), f"{method} returned {type(text).__name__}; expected text"
            assert text.isprintable(), f"{method} returned {text!r}, which cannot be printed"
        given: Any = policy.options()
        assert isinstance(given, dict), f"options returned {type(given).__name__}; expected a dict"
        try:
            json.dumps(
                {name: str(v) if isinstance(v, PurePath) else v for name, v in given.items()}
            )
        except (TypeError, ValueError) as error:
            raise AssertionError(f"options: a value cannot be stored as JSON: {error}") from error


def says_what_it_needs(bench: Bench) -> None:
    """`requires`, `progress` and `edits` can be read, and hold what the contract knows."""
    try:
        read_traits(bench.factory())
    except TraitError as error:
        said = error.problem
        named = said if said.startswith(error.attribute) else f"{error.attribute}: {said}"
        raise AssertionError(named) from error


def state_keeps_its_form(bench: Bench) -> None:
    """Its state has the same names, shapes, dtypes and device at every block and after a step."""
    policy, device = bench.policy(), torch.device("cpu")
    batch = bench.start(policy, 3)
    (group,) = batch._groups
    for block in range(3):
        for step in range(min(2, bench.length)):
            take_step(batch, bench.logits(3, step, seed=block))
        tokens = torch.full((3, bench.length), MASK)
        batch.advance([0, 1, 2], tokens, reference=batch.reference)
    for rows in (1, 3):
        state = policy.init_state(rows, bench.length, device)
        like = torch.zeros(rows, 1, dtype=torch.int64)
        assert group.runner.keeps_form(state, like), (
            f"init_state gives another state at a later block; it began with {group.runner.told}"
        )


def takes_a_step(bench: Bench) -> None:
    """A first step works: the answer is a dense bool tensor (B, L), the state keeps its form."""
    first_step(bench, bench.policy(), 3)  # the core checks the answer and the state


def declares_its_options(bench: Bench) -> None:
    """Every option has an annotation, from which `policy_options` and servers take its type."""
    policy = type(bench.factory())
    if hasattr(policy, "__pydantic_fields__"):
        for owner in policy.__mro__:
            for name, value in _unannotated(owner, policy):
                kind = type(value).__name__
                raise AssertionError(
                    f"{name} = {value!r} has no annotation, so it is no option; "
                    f"write {name}: {kind} = {value!r}, or ClassVar[{kind}] for a constant"
                )
        return
    for parameter in option_parameters(policy) or ():
        assert parameter.annotation is not parameter.empty, (
            f"option {parameter.name!r} has no annotation, so a server cannot check its values; "
            f"write its type: {parameter.replace(annotation=_type_of(parameter))}"
        )


def _type_of(parameter: inspect.Parameter) -> type:
    return type(parameter.default) if parameter.default not in (parameter.empty, None) else float


def _unannotated(owner: type, policy: type) -> Iterator[tuple[str, Any]]:
    """Public numbers and texts in a class's body that no class annotates."""
    for name, value in vars(owner).items():
        declared = any(name in vars(each).get("__annotations__", {}) for each in policy.__mro__)
        plain = type(value) in (bool, int, float, str)
        if plain and not declared and name.islower() and not name.startswith("_"):
            yield name, value


def bears_no_generator(bench: Bench) -> None:
    """It decides where step.generator is None, or asks for a seed with an L2PDError."""
    try:
        bench.decode(bench.policy(), seed=None)
    except PolicyRuntimeError as error:
        if isinstance(error.__cause__, L2PDError):
            return
        raise AssertionError(
            "step.generator is None where no seed was given, and the policy ignores that: "
            f"{error.__cause__ or error}"
        ) from error


def decides_all_rows_at_once(bench: Bench) -> None:
    """select and remask run as many tensor operations for many rows as for few: no loop over rows.

    Drawing from the generators of the rows is not counted.
    """
    policy = bench.policy()
    counts = {}
    for rows in (2, 6):
        step = first_step(bench, policy, rows)
        state = policy.init_state(rows, bench.length, torch.device("cpu"))
        for method in _methods(policy):
            with _Operations() as operations:
                getattr(policy, method)(step, dict(state))
            counts[method, rows] = operations.count
    for method in _methods(policy):
        few, many = counts[method, 2], counts[method, 6]
        assert many <= few, (
            f"{method} runs {few} tensor operations for 2 rows and {many} for 6; "
            "decide about all rows with the same operations, without a loop over rows"
        )


class _Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts tensor operations, except random draws."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        draws = any(argument.name == "generator" for argument in func._schema.arguments)
        self.count += not draws
        return func(*args, **(kwargs or {}))


def bears_bad_logits(bench: Bench) -> None:
    """With NaN or -inf in the logits, nothing raises, blocks end, and other rows are unchanged."""
    for bad in (torch.nan, -torch.inf):
        policy = bench.policy()
        clean, spoilt = bench.start(policy, 2), bench.start(policy, 2)
        for step in range(bench.length):
            logits = bench.logits(2, step)
            take_step(clean, logits)
            broken = logits.clone()
            broken[0, ::2] = bad
            take_step(spoilt, broken)
            assert torch.equal(clean.tokens[1], spoilt.tokens[1]), (
                f"logits of {bad} in one row change another row"
            )
        assert not spoilt.masked.any(), f"logits of {bad}: the block does not end"


def bears_few_masks(bench: Bench) -> None:
    """One mask left is committed; a block without masks is not changed."""
    for masks in (1, 0):
        policy = bench.policy()
        batch = bench.start(policy, 3, masks)
        before = batch.tokens
        take_step(batch, bench.logits(3, 0))
        assert not batch.masked.any(), "the last mask was not committed"
        if not masks:
            assert torch.equal(batch.tokens, before), "a block without masks was changed"


def can_be_copied(bench: Bench) -> None:
    """Deep copy and pickle give a policy that decides the same (engines spawn processes)."""
    for policy in (bench.factory(), bench.policy()):
        twins: dict[str, Callable[[UnmaskPolicy], UnmaskPolicy]] = {
            "deepcopy": copy.deepcopy,
            "pickle": lambda p: pickle.loads(pickle.dumps(p)),
        }
        for way, twin in twins.items():
            try:
                made = twin(policy)
            except Exception as error:
                raise AssertionError(f"{way} failed: {type(error).__name__}: {error}") from error
            assert made.describe() == policy.describe(), f"{way} loses options"
    policy = bench.policy()
    made = pickle.loads(pickle.dumps(policy))
    assert same(bench.decode(made), bench.decode(policy)), "a copy decides differently"


def reads_nothing_back(bench: Bench) -> None:
    """select runs on tensors without values: no .item(), no `if tensor`, no shapes from data."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    policy = bench.policy()
    if any(isinstance(v, (Tensor, torch.nn.Module)) for v in _deep_values(policy)):
        return  # its weights are real tensors, which cannot be combined with fake ones
    # Generators cannot draw fake numbers. A policy that does not decide without them is left to
    # `bears_no_generator`.
    step = first_step(bench, policy, 2).changed(generator=None)
    state = policy.init_state(2, bench.length, torch.device("cpu"))
    try:
        policy.select(step, dict(state))
    except KeyboardInterrupt:
        raise
    except ANY_FAILURE:
        return
    mode: Any = FakeTensorMode()
    faked = step.changed(
        **{
            name: mode.from_tensor(value)
            for name, value in vars(step).items()
            if isinstance(value, Tensor)
        },
    )
    kept: dict[str, Tensor] = {name: mode.from_tensor(value) for name, value in state.items()}
    with mode:
        try:
            policy.select(faked, kept)
        except Exception as error:
            raise AssertionError(
                f"select needs the values on the host ({type(error).__name__}: {error})"
            ) from error


CHECKS: dict[str, Callable[[Bench], None]] = {
    check.__name__: check
    for check in (
        can_be_made,
        says_what_it_needs,
        names_itself,
        describes_itself,
        declares_its_options,
        state_is_per_row,
        takes_a_step,
        state_keeps_its_form,
        ends,
        is_deterministic,
        selects_only_masked,
        leaves_its_input,
        bears_no_generator,
        makes_progress,
        keeps_rows_apart,
        decides_all_rows_at_once,
        survives_reordering,
        takes_row_options,
        forgets_requests,
        forgets_blocks,
        bears_bad_logits,
        bears_few_masks,
        can_be_copied,
        reads_nothing_back,
    )
}
"""By name, in the order in which they run."""

ESSENTIAL = (
    "can_be_made",
    "says_what_it_needs",
    "state_is_per_row",
    "takes_a_step",
    "state_keeps_its_form",
    "ends",
    "is_deterministic",
)
"""If a policy fails one of these, the checks after it would fail for the same reason."""


def first_step(bench: Bench, policy: UnmaskPolicy, rows: int) -> DenoisingStep:
    """A first step, as this policy would receive it."""
    step = take_step(bench.start(policy, rows), bench.logits(rows, 0)).step
    return step.changed(generator=generators(rows, seed=0))  # the outcome's step has none


def _methods(policy: UnmaskPolicy) -> list[str]:
    return ["select", "remask"] if isinstance(policy, RemaskingPolicy) else ["select"]


def _wrap(policy: UnmaskPolicy, method: str, around: Callable[..., Tensor]) -> None:
    call = getattr(policy, method)
    object.__setattr__(policy, method, lambda step, state: around(call, step, state))


@contextmanager
def _watched(policy: UnmaskPolicy) -> Iterator[list[tuple[DenoisingStep, Tensor]]]:
    """Record the inputs and answers of `select` in a list."""
    calls: list[tuple[DenoisingStep, Tensor]] = []

    def noting(
        call: Callable[..., Tensor], step: DenoisingStep, state: dict[str, Tensor]
    ) -> Tensor:
        answer = call(step, state)
        calls.append((step, answer))
        return answer

    _wrap(policy, "select", noting)
    yield calls


def _noting_changes(
    call: Callable[..., Tensor],
    step: DenoisingStep,
    state: dict[str, Tensor],
    changed: set[str],
) -> Tensor:
    tensors = vars(step)
    before = {k: v.clone() for k, v in tensors.items() if isinstance(v, Tensor)}
    answer = call(step, state)
    for name, value in before.items():
        if not torch.equal(value.nan_to_num(), tensors[name].nan_to_num()):
            changed.add(name)
    return answer


def _deep_values(policy: UnmaskPolicy) -> Iterator[Any]:
    for value in vars(policy).values():
        yield value
        if isinstance(value, dict):
            yield from value.values()
