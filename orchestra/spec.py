"""Specs: `pdr(widths=[8], drafts=first_finish(samples=4))` as data. Parsed, never evaluated.

A spec names a strategy. Its parameters may name other strategies, or parts of other kinds (scorers). What a name stands
for is said by the place where it stands: text and JSON are read by the field that holds them.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from orchestra.budget import Budget
from orchestra.errors import SpecError, UsageError, one_of
from orchestra.runtime.engine import Capability

if TYPE_CHECKING:
    from orchestra.strategies.base import Strategy

M = TypeVar("M", bound=BaseModel)

_MAX_CHARS = 10_000
_CONSTANTS = {"true": True, "false": False, "null": None, "none": None}
_REGISTRY: dict[str, dict[str, Any]] = {}  # classes by kind and name
_ALIAS = object()

EngineAlias = Annotated[str, _ALIAS]
"""A parameter that names an engine of `connect(..., engines={...})`; empty: the run's own."""
OptionalEngineAlias = Annotated[str | None, _ALIAS]
"""The same, or None."""


class Call(dict[str, Any]):
    """A name with parameters, as a spec string holds it: `{"strategy": name, ...}`, whatever the name stands for."""

    KEY = "strategy"

    def __repr__(self) -> str:
        return _written(self[self.KEY], {key: value for key, value in self.items() if key != self.KEY})


class Named(BaseModel):
    """What specs can name: parameters as fields, registered under the class name in snake case.

    A direct subclass is a kind of its own; one that sets `abstract = True` for itself is not registered.

    Attributes:
        kind: what it is; in the JSON form the key of its name.
        example: a spec of its kind, for error messages.
        name: its name in specs.
        needs: what the engine must be able to do.
        paper: where it comes from.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: ClassVar[str]
    example: ClassVar[str]
    name: ClassVar[str]
    abstract: ClassVar[bool] = False
    needs: ClassVar[frozenset[Capability]] = frozenset()
    paper: ClassVar[str] = ""

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        if cls.__dict__.get("abstract", False):
            return
        cls.name = cls.__dict__.get("name") or re.sub(r"(?<!^)(?=[A-Z])", "_", cls.__name__).lower()
        if taken := cls.model_fields.keys() & {cls.kind, Call.KEY}:
            raise UsageError(f"{cls.name}: a parameter cannot be called {', '.join(taken)}: specs keep the name there")
        known = _REGISTRY.setdefault(cls.kind, {})
        built_in = known.get(cls.name)
        if built_in and built_in.__module__.startswith("orchestra.") and built_in.__module__ != cls.__module__:
            raise UsageError(f"there is a built-in {cls.kind} {cls.name!r}; give yours another name")
        known[cls.name] = cls

    @classmethod
    def known(cls) -> dict[str, type[Self]]:
        """All of this kind by name."""
        return dict(sorted(_REGISTRY.get(cls.kind, {}).items()))

    @classmethod
    def parse(cls, spec: Any) -> Self:
        """One of this kind from any of its three forms: an instance, a spec string, or `{kind: name, ...}`.

        Raises:
            SpecError: it does not parse, or names what is unknown; lists the right names.
        """
        if isinstance(spec, cls):
            return spec
        parsed = _parse(spec, cls.kind, cls.example) if isinstance(spec, str) else spec
        key = Call.KEY if isinstance(parsed, Call) else cls.kind
        if not isinstance(parsed, Mapping) or not isinstance(parsed.get(key), str):
            raise SpecError(f"a {cls.kind} spec is like {cls.example!r}, not {spec!r:.80}")
        parameters = dict(parsed)
        name = parameters.pop(key)
        known = cls.known()
        if name not in known:
            raise SpecError(one_of(cls.kind, name, known))
        return _validate(known[name], name, parameters)

    def inner(self) -> Iterable[Named]:
        """The named parts among its parameters."""
        return (value for field in type(self).model_fields if isinstance(value := getattr(self, field), Named))

    def requirements(self) -> frozenset[Capability]:
        """What it and those inside it need of the engine."""
        return self.needs.union(*(part.requirements() for part in self.inner()))

    def aliases(self) -> frozenset[str]:
        """The engines that it and those inside it name."""
        fields = type(self).model_fields.items()
        own = {getattr(self, name) for name, info in fields if _ALIAS in info.metadata}
        return frozenset(own - {None}).union(*(part.aliases() for part in self.inner()))

    def to_dict(self) -> dict[str, Any]:
        """The JSON form: `{kind: name, ...}` with the parameters that differ from their defaults."""
        values = {key: value.to_dict() if isinstance(value, Named) else value for key, value in self._set().items()}
        return {self.kind: self.name} | values

    def to_spec(self) -> str:
        """The spec string, which `parse` reads back to an equal one."""
        return _written(self.name, self._set())

    def _set(self) -> dict[str, Any]:
        values = {name: (getattr(self, name), info) for name, info in type(self).model_fields.items()}
        return {
            name: value
            for name, (value, info) in values.items()
            if not info.exclude and value != info.get_default(call_default_factory=True)
        }


def parse_strategy(spec: str | dict[str, Any] | Strategy) -> Strategy:
    """A strategy from any of its three forms: an instance, a spec string, or `{"strategy": name, ...}`.

    Raises:
        SpecError: it does not parse, or names an unknown strategy or parameter; lists the right ones.
    """
    from orchestra.strategies.base import Strategy

    return Strategy.parse(spec)


def parse_budget(spec: str) -> Budget:
    """A budget from `sampled_tokens=4096,wall_seconds=10`.

    Raises:
        SpecError: it does not parse, or names an unknown limit.
    """
    parameters = dict(_parse(f"budget({spec})", "budget", "sampled_tokens=4096,wall_seconds=10"))
    parameters.pop(Call.KEY)
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


def _parse(text: str, kind: str, example: str) -> Call:
    if len(text) > _MAX_CHARS:
        raise SpecError(f"a spec has at most {_MAX_CHARS} characters, this one {len(text)}")
    try:
        value = _value(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, RecursionError, MemoryError, ValueError) as error:
        if isinstance(error, SpecError):
            raise
        raise SpecError(f"spec does not parse: {text!r:.80} (it is like {example!r})") from None
    if not isinstance(value, Call):
        raise SpecError(f"a {kind} spec is like {example!r}, not {text!r:.80}")
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
            return _CONSTANTS.get(name, Call({Call.KEY: name}))
        case ast.Call(func=ast.Name(id=name), args=[], keywords=keywords):
            parameters = Call({Call.KEY: name})
            for keyword in keywords:
                if keyword.arg is None or keyword.arg in parameters:
                    raise SpecError(f"{name}: parameter {keyword.arg or '**'!r} given twice, or not allowed")
                parameters[keyword.arg] = _value(keyword.value)
            return parameters
        case ast.Call(func=ast.Name(id=name)):
            raise SpecError(f"{name}: parameters are given by name, as in 'self_consistency(samples=8)'")
    raise SpecError(f"a spec holds names, numbers, strings, lists and calls, not {ast.unparse(node)!r:.60}")


def render(value: Any) -> str:
    """The spec text of a value: the inverse of parsing."""
    if isinstance(value, Named):
        return value.to_spec()
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(render, value))}]"
    return repr(value)


def _written(name: str, parameters: Mapping[str, Any]) -> str:
    inner = ", ".join(f"{key}={render(value)}" for key, value in parameters.items())
    return f"{name}({inner})" if inner else name
