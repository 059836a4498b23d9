"""Strategy specs: `pdr(widths=[8], drafts=first_finish(samples=4))` as data. Parsed, never evaluated."""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ValidationError

from orchestra.budget import Budget
from orchestra.errors import SpecError, one_of

if TYPE_CHECKING:
    from orchestra.strategies.base import Strategy

M = TypeVar("M", bound=BaseModel)

_MAX_CHARS = 10_000
_CONSTANTS = {"true": True, "false": False, "null": None, "none": None}


def parse_strategy(spec: str | dict[str, Any] | Strategy) -> Strategy:
    """A strategy from any of its three forms: an instance, a spec string, or `{"strategy": name, ...}`.

    Raises:
        SpecError: it does not parse, or names an unknown strategy or parameter; lists the right ones.
    """
    from orchestra.strategies import registry
    from orchestra.strategies.base import Strategy

    if isinstance(spec, Strategy):
        return spec
    if isinstance(spec, str):
        spec = _parse(spec)
    if not isinstance(spec, dict) or not isinstance(spec.get("strategy"), str):
        raise SpecError(f"a strategy spec is like 'self_consistency(samples=8)', not {spec!r:.80}")
    parameters = dict(spec)
    name = parameters.pop("strategy")
    known = registry()
    if name not in known:
        raise SpecError(one_of("strategy", name, known))
    return _validate(known[name], name, parameters)


def parse_budget(spec: str) -> Budget:
    """A budget from `sampled_tokens=4096,wall_seconds=10`.

    Raises:
        SpecError: it does not parse, or names an unknown limit.
    """
    parameters = _parse(f"budget({spec})")
    parameters.pop("strategy")
    return _validate(Budget, "budget", parameters)


def _validate(model: type[M], name: str, parameters: dict[str, Any]) -> M:
    fields = model.model_fields
    for key in parameters:
        if key not in fields:
            raise SpecError(f"{name}: {one_of('parameter', str(key), fields)}")
    try:
        return model(**parameters)
    except ValidationError as error:
        first = error.errors()[0]
        where = f"{'.'.join(map(str, first['loc']))} = {first.get('input')!r:.60}: " if first["loc"] else ""
        raise SpecError(f"{name}: {where}{first['msg'].removeprefix('Value error, ')}") from None


def _parse(text: str) -> dict[str, Any]:
    if len(text) > _MAX_CHARS:
        raise SpecError(f"a spec has at most {_MAX_CHARS} characters, this one {len(text)}")
    try:
        value = _value(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, RecursionError, MemoryError, ValueError) as error:
        if isinstance(error, SpecError):
            raise
        raise SpecError(f"spec does not parse: {text!r:.80} (it is like 'self_consistency(samples=8)')") from None
    if not isinstance(value, dict) or "strategy" not in value:
        raise SpecError(f"a strategy spec is like 'self_consistency(samples=8)', not {text!r:.80}")
    return value


def _value(node: ast.expr) -> Any:
    """The value that a syntax tree of literals and calls by keyword stands for."""
    match node:
        case ast.Constant(value=bool() | int() | float() | str() | None as value):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)) if value is not True:
            return -value
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [_value(item) for item in items]
        case ast.Name(id=name):
            return _CONSTANTS.get(name, {"strategy": name})
        case ast.Call(func=ast.Name(id=name), args=[], keywords=keywords):
            parameters: dict[str, Any] = {"strategy": name}
            for keyword in keywords:
                if keyword.arg is None or keyword.arg in parameters:
                    raise SpecError(f"{name}: parameter {keyword.arg or '**'!r} given twice, or not allowed")
                parameters[keyword.arg] = _value(keyword.value)
            return parameters
        case ast.Call(func=ast.Name(id=name)):
            raise SpecError(f"{name}: parameters are given by name, as in 'self_consistency(samples=8)'")
    raise SpecError(f"a spec holds names, numbers, strings, lists and calls, not {ast.unparse(node)!r:.60}")


def render(value: Any) -> str:
    """The spec text of a parsed value: the inverse of parsing."""
    if isinstance(value, dict) and "strategy" in value:
        inner = ", ".join(f"{key}={render(item)}" for key, item in value.items() if key != "strategy")
        return f"{value['strategy']}({inner})" if inner else str(value["strategy"])
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(render, value))}]"
    return repr(value)
