"""`skip if`: which combinations of axis values are left out, as expressions over the axes.

    attention = "x" and ep > 1
    graph in ["off", "decode"] or not (moe = "auto")

An expression rather than a table of values, because a constraint often orders (`ep > 1`) or excludes ("all
but"), and because it reads aloud. Python's syntax, of which only and, or, not, comparisons, `in`, axis names
and constants exist; `=` is `==`. The tree is walked here; nothing is ever given to eval.
"""

from __future__ import annotations

import ast
import io
import operator
import tokenize
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from firebox.errors import ConfigError
from firebox.matrix._tables import meant

COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda value, of: value in of,
    ast.NotIn: lambda value, of: value not in of,
}
EQUALITIES = (ast.Eq, ast.NotEq, ast.In, ast.NotIn)
Values = Mapping[str, Any]


class Skip:
    """One constraint. `holds(values)`: is this combination left out?"""

    def __init__(self, text: str, axes: Mapping[str, tuple[Any, ...]]) -> None:
        """Raises ConfigError for what is not an expression over these axes and values of theirs."""
        self.text = text
        try:
            self._tree = ast.parse(_with_double_equals(text).strip(), mode="eval").body
        except (SyntaxError, tokenize.TokenError) as error:
            raise ConfigError(f"skip {text!r} is no expression", hint='attention = "x" and ep > 1') from error
        self._check(self._tree, axes)

    def holds(self, values: Values) -> bool:
        """True: leave this combination out. Raises ConfigError where the values cannot be compared."""
        try:
            return bool(_evaluate(self._tree, values))
        except TypeError as error:
            shown = ", ".join(f"{name} = {value!r}" for name, value in values.items())
            raise ConfigError(f"skip {self.text!r} cannot be judged for {shown}", hint=str(error)) from error

    def _check(self, node: ast.expr, axes: Mapping[str, tuple[Any, ...]]) -> None:
        match node:
            case ast.BoolOp(values=parts):
                for part in parts:
                    self._check(part, axes)
            case ast.UnaryOp(op=ast.Not(), operand=inner):
                self._check(inner, axes)
            case ast.Compare(left=left, ops=ops, comparators=others) if all(
                type(o) in COMPARISONS for o in ops
            ):
                for part in (left, *others):
                    self._check_term(part, axes)
                self._check_values(node, axes)
            case _:
                raise ConfigError(
                    f"skip {self.text!r} has {ast.unparse(node)!r}",
                    hint="and, or, not, and comparisons of an axis with values",
                )

    def _check_term(self, node: ast.expr, axes: Mapping[str, tuple[Any, ...]]) -> None:
        match node:
            case ast.Name(id=name) if name not in axes:
                raise ConfigError(f"skip {self.text!r} names no axis {name!r}", hint=meant(name, axes))
            case ast.Name() | ast.Constant():
                return
            case ast.List(elts=parts) | ast.Tuple(elts=parts) if all(
                isinstance(p, ast.Constant) for p in parts
            ):
                return
            case _:
                raise ConfigError(
                    f"skip {self.text!r} has {ast.unparse(node)!r}", hint="an axis, a value or a list"
                )

    def _check_values(self, node: ast.Compare, axes: Mapping[str, tuple[Any, ...]]) -> None:
        """An axis that is compared for equality with something it never is: a slip of the pen."""
        terms = (node.left, *node.comparators)
        named = [axes[term.id] for term in terms if isinstance(term, ast.Name)]
        if len(named) != 1 or not all(isinstance(op, EQUALITIES) for op in node.ops):
            return
        inner = (part for term in terms for part in ast.walk(term))
        for constant in (part for part in inner if isinstance(part, ast.Constant)):
            if constant.value not in named[0]:
                raise ConfigError(
                    f"skip {self.text!r}: no value of the axis is {constant.value!r}",
                    hint=meant(str(constant.value), map(str, named[0])),
                )


def _evaluate(node: ast.expr, values: Values) -> Any:
    match node:
        case ast.BoolOp(op=ast.And(), values=parts):
            return all(_evaluate(part, values) for part in parts)
        case ast.BoolOp(values=parts):
            return any(_evaluate(part, values) for part in parts)
        case ast.UnaryOp(operand=inner):
            return not _evaluate(inner, values)
        case ast.Compare(left=left, ops=ops, comparators=others):
            terms = [_evaluate(term, values) for term in (left, *others)]
            return all(COMPARISONS[type(op)](a, b) for op, a, b in zip(ops, terms, terms[1:], strict=False))
        case ast.Name(id=name):
            return values[name]
        case ast.List(elts=parts) | ast.Tuple(elts=parts):
            return [_evaluate(part, values) for part in parts]
    assert isinstance(node, ast.Constant), ast.dump(node)
    return node.value


def _known(ops: Sequence[ast.cmpop]) -> bool:
    return all(type(op) in COMPARISONS for op in ops)


def _with_double_equals(text: str) -> str:
    """A lone `=` becomes `==`; strings stay as they are."""
    tokens = tokenize.generate_tokens(io.StringIO(text.strip()).readline)
    return " ".join("==" if token.string == "=" else token.string for token in tokens)
