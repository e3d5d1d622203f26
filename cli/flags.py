"""Turns the fields of a dataclass into flags of a command, so that each flag is declared once."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Annotated, Any, get_origin, get_type_hints


def flags_from_dataclasses(command: Callable[..., None]) -> Callable[..., None]:
    """Replaces every parameter of `command` that is a dataclass by one flag per field.

    A field is a flag if its type is `Annotated[T, typer.Option(...)]`. Every other field keeps its
    default. Raises ValueError if two parameters declare the same flag.
    """
    parameters: list[inspect.Parameter] = []
    names_by_group: dict[str, tuple[type, list[str]]] = {}
    for parameter in inspect.signature(command, eval_str=True).parameters.values():
        cls = parameter.annotation
        if isinstance(cls, type) and is_dataclass(cls):
            group = _parameters_of(cls)
            names_by_group[parameter.name] = (cls, [flag.name for flag in group])
            parameters += group
        else:
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))

    @functools.wraps(command)
    def run(**values: Any) -> None:
        groups = {
            name: cls(**{flag: values.pop(flag) for flag in flags})
            for name, (cls, flags) in names_by_group.items()
        }
        command(**groups, **values)

    # typer reads these two.
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _parameters_of(cls: type) -> list[inspect.Parameter]:
    hints = get_type_hints(cls, include_extras=True)
    return [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=_default_of(field),
            annotation=hints[field.name],
        )
        for field in fields(cls)
        if get_origin(hints[field.name]) is Annotated
    ]


def _default_of(field: Field[Any]) -> Any:
    if field.default_factory is not MISSING:
        return field.default_factory()
    return inspect.Parameter.empty if field.default is MISSING else field.default
