"""The mutations of a module: one small change at a time.

The operators are those of mutmut 3, with these exceptions. Operators whose mutants nearly always
fail at once (a value or an argument becomes None, a positional argument is dropped) or duplicate
others (a string in capitals) are left out, since they would only raise the score; so is `+1` for
`-1`, which is the same dimension of a matrix. Two are added, since many rules here are masks joined
by `&` and `|`: an operand is dropped, and a statement that works in place is dropped.

mutmut's own runner is not used: it leaves out every decorated function (class methods, compiled
kernels) and all code outside of functions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import libcst as cst
from libcst.metadata import MetadataWrapper, ParentNodeProvider, PositionProvider
from mutmut.mutation import mutators


@dataclass(frozen=True)
class Mutation:
    """One mutation of one module."""

    line: int
    """The line of the mutated node, from 1."""
    lines: tuple[int, int]
    """The first and last line of its statement (for a block, of the header)."""
    imported: bool
    """Whether importing the module runs it, since it is outside of functions."""
    before: str
    """The code of the node."""
    after: str
    source: str
    """The source of the whole mutated module."""
    number: int = 1
    """Its number, from 1, among mutations with the same line, old code and new code."""

    def key(self, source: str) -> str:
        """Identifies the mutation by the text of its line, so that other lines may change."""
        line = source.splitlines()[self.line - 1].strip()
        number = f"  ({self.number})" if self.number > 1 else ""
        return f"{line}  ::  {self.before}  ->  {self.after}{number}"


def _drop_operand(node: cst.BinaryOperation | cst.BooleanOperation) -> Iterable[cst.CSTNode]:
    """`a & b` becomes `a`, and `b`; the same for `|`, `and`, `or`."""
    if isinstance(node.operator, cst.BitAnd | cst.BitOr | cst.And | cst.Or):
        yield node.left
        yield node.right


def _drop_statement(node: cst.SimpleStatementLine) -> Iterable[cst.CSTNode]:
    """A call whose value is not used, or an assignment like `a &= b`, becomes `pass`."""
    (only,) = node.body if len(node.body) == 1 else (None,)
    call = isinstance(only, cst.Expr) and isinstance(only.value, cst.Call)
    if call or isinstance(only, cst.AugAssign):
        yield node.with_changes(body=[cst.Pass()])


def _drop_keyword_argument(node: cst.Call) -> Iterable[cst.CSTNode]:
    for i, argument in enumerate(node.args):
        if argument.keyword is not None:
            yield node.with_changes(args=[*node.args[:i], *node.args[i + 1 :]])


def _other_string(node: cst.BaseString) -> Iterable[cst.CSTNode]:
    yield from list(mutators.operator_string(node))[:1]


def _swap_operator(node: cst.CSTNode) -> Iterable[cst.CSTNode]:
    if not isinstance(node, cst.UnaryOperation):
        yield from mutators.operator_swap_op(node)


_REPLACED = (
    mutators.operator_arg_removal,
    mutators.operator_assignment,
    mutators.operator_dict_arguments,
    mutators.operator_string,
    mutators.operator_swap_op,
)
_OPERATORS = [
    *(each for each in mutators.mutation_operators if each[1] not in _REPLACED),
    (cst.Call, _drop_keyword_argument),
    (cst.BaseString, _other_string),
    (cst.CSTNode, _swap_operator),
    (cst.BinaryOperation, _drop_operand),
    (cst.BooleanOperation, _drop_operand),
    (cst.SimpleStatementLine, _drop_statement),
]


class _Visitor(cst.CSTVisitor):
    METADATA_DEPENDENCIES = (PositionProvider, ParentNodeProvider)

    def __init__(self) -> None:
        self.found: list[tuple[cst.CSTNode, cst.CSTNode]] = []

    def on_visit(self, node: cst.CSTNode) -> bool:
        # Annotations and decorators have no effect that a test could observe; asserts serve the
        # type checker.
        if isinstance(
            node, cst.Annotation | cst.Decorator | cst.Assert | cst.Import | cst.ImportFrom
        ):
            return False
        if isinstance(node, cst.Call) and _name(node.func) in ("len", "isinstance"):
            return False
        if isinstance(node, cst.Subscript) and _name(node.value) == "Literal":
            return False
        for kind, operator in _OPERATORS:
            if isinstance(node, kind) and not (
                isinstance(node, cst.BaseString) and self._wording(node)
            ):
                self.found += [(node, mutated) for mutated in operator(node)]
        return True

    def _wording(self, node: cst.CSTNode) -> bool:
        """Whether a string is part of a message: of an exception, a log line, or an f-string."""
        while not isinstance(node, cst.BaseSmallStatement | cst.BaseCompoundStatement):
            if isinstance(node, cst.ConcatenatedString | cst.FormattedString):
                return True
            if isinstance(node, cst.Call) and _name(node.func) in ("logger", "warnings"):
                return True
            parent = self.get_metadata(ParentNodeProvider, node, None)
            if parent is None:
                return False
            node = parent
        return isinstance(node, cst.Raise)


def _name(node: cst.BaseExpression) -> str | None:
    while isinstance(node, cst.Attribute):
        node = node.value
    return node.value if isinstance(node, cst.Name) else None


def mutations_of(source: str) -> Iterator[Mutation]:
    """All mutations of a module's source that compile, without duplicates, from top to bottom."""
    wrapper = MetadataWrapper(cst.parse_module(source))
    module = wrapper.module
    visitor = _Visitor()
    wrapper.visit(visitor)
    positions = wrapper.resolve(PositionProvider)
    parents = wrapper.resolve(ParentNodeProvider)
    seen = {source}
    lines = source.splitlines()
    same: Counter[tuple[str, str, str]] = Counter()
    top = {part: i for i, part in enumerate(module.body)}
    parts = [module.code_for_node(part) for part in module.body]
    header = "".join(module.code_for_node(line) for line in module.header)
    footer = "".join(module.code_for_node(line) for line in module.footer)
    assert header + "".join(parts) + footer == source

    def code_with(node: cst.CSTNode, mutated: cst.CSTNode) -> str:
        part = node
        while part not in top:
            part = parents[part]
        made = mutated if part is node else part.deep_replace(node, mutated)
        at = top[part]
        new = module.code_for_node(made)
        return header + "".join([*parts[:at], new, *parts[at + 1 :]]) + footer

    for node, mutated in visitor.found:
        code = code_with(node, mutated)
        if code in seen:
            continue
        seen.add(code)
        try:
            compile(code, "<mutation>", "exec")
        except SyntaxError:
            continue
        statement = node
        while not isinstance(statement, cst.SimpleStatementLine | cst.BaseCompoundStatement):
            statement = parents[statement]
        holder = statement
        while holder is not module and not isinstance(holder, cst.FunctionDef):
            holder = parents[holder]
        where = positions[statement]
        last = where.end.line
        if isinstance(statement, cst.BaseCompoundStatement):
            last = positions[statement.body].start.line
        line = positions[node].start.line
        before, after = _code(module, node), _code(module, mutated)
        alike = (lines[line - 1].strip(), before, after)
        same[alike] += 1
        yield Mutation(
            line,
            (where.start.line, last),
            holder is module,
            before,
            after,
            code,
            same[alike],
        )


def _code(module: cst.Module, node: cst.CSTNode) -> str:
    return " ".join(module.code_for_node(node).split())
