"""A cocktail: an ordered mix of regularizers, and its text.

`repr` is the configuration language of the command line, logs and run folders: `parse(repr(c)) == c`. It is read through
`ast` as literals and known names; nothing is ever evaluated.
"""

from __future__ import annotations

import ast
import inspect
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

from goodfit import factors, groups, schedules, stop, where
from goodfit.errors import GoodfitError, nearest
from goodfit.hyper import hypers
from goodfit.phases import Regularizer, phases_of
from goodfit.regularizers import catalogue

__all__ = ["Cocktail", "as_cocktail", "parse"]

_VALUES: dict[str, Any] = {
    name: getattr(home, name)
    for home, kind in ((where, where.Where), (groups, groups.Groups))
    for name in home.__all__
    if isinstance(getattr(home, name), kind)
}
_CRITERIA = {kind.__name__: kind for kind in stop.CRITERIA}
_CALLS: dict[str, Callable[..., Any]] = {
    "named": where.named,
    **schedules.BY_NAME,
    "heads": groups.heads,
    "custom": groups.custom,
    "adaptive": factors.adaptive,
    "given": factors.given,
    **_CRITERIA,
}
_NUMBERS = {"inf": math.inf}
_WORDS = {"true": "True", "false": "False", "none": "None"}


class Cocktail(tuple[Regularizer, ...]):
    """An ordered, frozen mix: `Cocktail(L2(1e-4), Dropout(0.2), EarlyStopping(10))`.

    The order counts within a phase; the phases themselves have theirs.

    >>> from goodfit import L2, Dropout
    >>> print(Cocktail(L2(1e-4), Dropout(0.2)))
    L2(0.0001), Dropout(0.2)
    """

    __slots__ = ()

    def __new__(cls, *regularizers: Any) -> Cocktail:
        for one in regularizers:
            if isinstance(one, stop.Criterion):
                raise _misplaced(repr(one))
            if not isinstance(one, Regularizer):
                shown = f"the class {one.__name__}: add its numbers" if isinstance(one, type) else repr(one)
                raise GoodfitError(f"Cocktail holds regularizers such as L2(1e-4), got {shown}.")
            if not phases_of(type(one)):
                raise GoodfitError(f"{type(one).__name__} has no phase: let it inherit from one, as in class Mine(Penalty).")
        return super().__new__(cls, regularizers)

    def __add__(self, other: Any) -> Cocktail:
        return Cocktail(*self, *other)

    def __getnewargs__(self) -> tuple[Regularizer, ...]:
        return tuple(self)

    def of(self, phase: type[Any]) -> Iterator[Any]:
        """The regularizers of one phase that are switched on, in written order."""
        return (one for one in self if isinstance(one, phase) and not one.off)

    def in_steps(self, steps_per_epoch: int | None) -> Cocktail:
        """The same, with all schedules in steps."""
        return Cocktail(*(_in_steps(one, steps_per_epoch) for one in self))

    def __repr__(self) -> str:
        return f"Cocktail({', '.join(map(repr, self))})"

    def __str__(self) -> str:
        return ", ".join(map(str, self)) or "no regularizer"


def _in_steps(one: Regularizer, steps: int | None) -> Regularizer:
    moving = {name: getattr(one, name) for name, _ in hypers(one) if isinstance(getattr(one, name), schedules.Schedule)}
    return replace(one, **{name: schedule.in_steps(steps) for name, schedule in moving.items()}) if moving else one


def as_cocktail(given: Any) -> Cocktail:
    """A cocktail, one regularizer, a list of them or a text, as a cocktail."""
    if isinstance(given, str):
        return parse(given)
    if isinstance(given, Regularizer | stop.Criterion):
        return Cocktail(given)
    if isinstance(given, tuple | list):
        return Cocktail(*given)
    shown = f"the class {given.__name__}: add its numbers" if isinstance(given, type) else f"a {type(given).__name__}"
    raise GoodfitError(f"A cocktail is written Cocktail(L2(1e-4), Dropout(0.2)), got {shown}.")


def parse(text: str, own: Iterable[type[Regularizer]] = ()) -> Cocktail:
    """Read a cocktail from its text, bare or wrapped: `L2(1e-4), Dropout(0.2)` or `Cocktail(L2(lam=0.0001))`.

    own: regularizers of yours that stand in no package; those of installed packages are known by their entry points.

    >>> parse("EarlyStopping(inf), L2(1e-3, where=kernels & ~named('head.*'))")[1].where
    (kernels & ~named('head.*'))
    """
    try:
        tree = ast.parse(f"[{text}\n]", mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        raise GoodfitError(f"A cocktail reads like 'L2(1e-4), Dropout(0.2)', got {text!r}{_joined(text)}.") from None
    assert isinstance(tree, ast.List)
    nodes = tree.elts
    if len(nodes) == 1 and isinstance(nodes[0], ast.Call) and _name(nodes[0].func) == "Cocktail":
        nodes = nodes[0].args
    known = {**catalogue(), **{kind.__name__: kind for kind in own}}
    return Cocktail(*(_regularizer(node, known) for node in nodes))


def _joined(text: str) -> str:
    return "; join criteria with | or &" if "||" in text or "&&" in text else ""


def _misplaced(criterion: str) -> GoodfitError:
    return GoodfitError(f"A criterion goes into EarlyStopping, got {criterion}; write EarlyStopping({criterion}).")


def _is_criterion(node: ast.expr) -> bool:
    """Whether a text means a criterion, also one that is joined otherwise than it must be."""
    match node:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name in _CRITERIA
        case ast.Call(func=inner) | ast.BinOp(left=inner) | ast.BoolOp(values=[inner, *_]):
            return _is_criterion(inner)
    return False


def _name(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else ast.unparse(node)


def _regularizer(node: ast.expr, known: dict[str, type[Regularizer]]) -> Regularizer:
    name = _name(node.func) if isinstance(node, ast.Call) else _name(node)
    if name not in known:
        if _is_criterion(node):
            raise _misplaced(ast.unparse(node) + ("(...)" if isinstance(node, ast.Name) else ""))
        raise GoodfitError(f"A cocktail knows no regularizer {name!r}; {nearest(name, known)}")
    if not isinstance(node, ast.Call):
        raise GoodfitError(f"A regularizer is written with its numbers, got {name!r}; write {name}().")
    one = _call(node, name, known[name])
    assert isinstance(one, Regularizer)
    return one


def _call(node: ast.Call, name: str, target: Callable[..., Any]) -> Any:
    arguments = [_value(a) for a in node.args]
    keywords: dict[str, Any] = {}
    signature = inspect.signature(target)
    for k in node.keywords:
        if k.arg is None or k.arg not in signature.parameters:
            raise GoodfitError(f"{name} has no number {k.arg!r}; {nearest(str(k.arg), signature.parameters)}")
        if k.arg in keywords:
            raise GoodfitError(f"{name} has {k.arg} twice, got {ast.unparse(node)!r}; give it once.")
        keywords[k.arg] = _value(k.value, signature.parameters[k.arg])
    try:
        signature.bind(*arguments, **keywords)
    except TypeError as wrong:
        raise GoodfitError(f"{name} takes {signature}, got {ast.unparse(node)}: {wrong}.") from None
    return target(*arguments, **keywords)


def _value(node: ast.expr, parameter: inspect.Parameter | None = None) -> Any:
    match node:
        case ast.Constant(value=bool() | int() | float() | str() | None as value):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
            return -value
        case ast.UnaryOp(op=ast.USub(), operand=ast.Name(id=name)) if name in _NUMBERS:
            return -_NUMBERS[name]
        case ast.Name(id=name) if name in _NUMBERS:
            return _NUMBERS[name]
        case ast.Name(id=name) if name in _VALUES:
            return _VALUES[name]
        case ast.List(elts=items):
            return [_value(item) for item in items]
        case ast.Dict(keys=keys, values=values) if all(isinstance(key, ast.Constant) for key in keys):
            return {_value(key): _value(value) for key, value in zip(keys, values, strict=True) if key is not None}
        case ast.UnaryOp(op=ast.Invert(), operand=inner):
            return ~_operands(where.Where, inner)[0]
        case ast.BinOp(left=left, op=ast.BitAnd() | ast.BitOr() as op, right=right):
            one, other = _operands(where.Where | stop.Criterion, left, right)
            return one & other if isinstance(op, ast.BitAnd) else one | other
        case ast.Call(func=ast.Name(id=name)) if name in _CALLS:
            return _call(node, name, _CALLS[name])
    kinds = "numbers, schedules, selectors, groups, factors and criteria"
    raise GoodfitError(f"A cocktail holds {kinds}, got {ast.unparse(node)!r}; {_hint(node, parameter)}")


def _hint(node: ast.expr, parameter: inspect.Parameter | None) -> str:
    """What was meant, where that can be told."""
    keyword = "" if parameter is None else f"{parameter.name}="
    match node:
        case ast.Name(id=name) if name.lower() in _WORDS:
            return f"write {keyword}{_WORDS[name.lower()]}."
        case ast.Name(id=name) if parameter is not None and isinstance(parameter.default, str):
            return f"write {keyword}{name!r}."
        case ast.BoolOp():
            return "join criteria with | or &."
        case ast.Call(func=ast.Attribute(attr=name)) if name in _CALLS:
            return f"write {name}(...) without what stands before it."
    return nearest(_name(node), [*_NUMBERS, *_VALUES, *_CALLS])


def _operands(kind: Any, *nodes: ast.expr) -> list[Any]:
    """The values that an operator joins, all of one kind."""
    values = [_value(node) for node in nodes]
    for node, value in zip(nodes, values, strict=True):
        if not isinstance(value, kind) or isinstance(value, where.Where) != isinstance(values[0], where.Where):
            raise GoodfitError(
                f"& | ~ combine selectors such as kernels, and & | criteria such as Patience(10), got {ast.unparse(node)!r}."
            )
    return values
