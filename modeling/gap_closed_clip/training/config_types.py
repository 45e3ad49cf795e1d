"""Whether a value of a configuration file can be of the type that a field is declared with."""

import types
import typing
from typing import Any


def is_of_names(hint: Any) -> bool:
    """Whether a field holds a list of names, and a text alone is nothing that it could hold."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    return str not in options and any(
        typing.get_origin(option) is list and typing.get_args(option) == (str,) for option in options
    )


def fits(value: Any, hint: Any) -> bool:
    """Whether a YAML value can be of the type a field is declared with; declarations beyond plain types always fit."""
    if isinstance(value, str) and is_of_names(hint):
        return True
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, option) for option in typing.get_args(hint))
    if origin is typing.Literal:
        return value in typing.get_args(hint)
    hint = origin or hint
    if hint in (types.NoneType, None):
        return value is None
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint in (bool, str, list, dict):
        return isinstance(value, hint)
    if hint is tuple:
        return isinstance(value, list)
    return True


__all__ = ["fits", "is_of_names"]
