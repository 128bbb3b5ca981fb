"""Values of configs as their fields declare them, from Python as from the command line.

There jsonargparse has read them; a dataclass takes anything, and a misspelt choice would quietly be another one.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from engine.errors import ConfigError


def take_declared(config: Any) -> None:
    """Gives each field of a frozen dataclass its value as declared: for its `__post_init__`.

    A path becomes text, a whole float an int where that is wanted, an int a float, a mapping the dataclass of a field.

    Raises:
        ConfigError: a value of another type, or none of a field's choices.
    """
    kinds = get_type_hints(type(config))
    for each in fields(config):
        given = getattr(config, each.name)
        object.__setattr__(config, each.name, _declared(given, kinds[each.name], each.name))


def _declared(value: Any, kind: Any, key: str) -> Any:
    origin = get_origin(kind)
    if origin in (Union, UnionType):
        return _one_of(value, get_args(kind), key)
    if origin is Literal:
        if not isinstance(value, str) or value not in get_args(kind):
            raise _refused(value, kind, key)
        return value
    if origin is list:
        if not isinstance(value, list | tuple):
            raise _refused(value, kind, key)
        return [_declared(item, get_args(kind)[0], f"{key}[{number}]") for number, item in enumerate(value)]
    if is_dataclass(kind):
        return _made(value, kind, key)
    return _simple(value, kind, key)


def _one_of(value: Any, kinds: tuple[Any, ...], key: str) -> Any:
    """The value as the first of the kinds that takes it."""
    if value is None and NoneType in kinds:
        return None
    others = [kind for kind in kinds if kind is not NoneType]
    if len(others) == 1:  # whose own message says more
        return _declared(value, others[0], key)
    for kind in others:
        try:
            return _declared(value, kind, key)
        except ConfigError:
            continue
    raise ConfigError(f"{key}: got {value!r}, want {' or '.join(map(_named, kinds))}")


def _made(value: Any, kind: Any, key: str) -> Any:
    if isinstance(value, kind):
        return value
    if not isinstance(value, Mapping):
        raise _refused(value, kind, key)
    try:
        return kind(**value)
    except TypeError as error:  # a key that it has not, or one that is missing
        known = ", ".join(each.name for each in fields(kind))
        raise ConfigError(f"{key}: got {dict(value)!r}, want keys of {known}: {error}") from error


def _simple(value: Any, kind: Any, key: str) -> Any:
    if kind is str and isinstance(value, str | os.PathLike):
        return os.fspath(value)
    if kind is bool and isinstance(value, bool):
        return value
    if kind is int and not isinstance(value, bool):
        if isinstance(value, float) and value.is_integer():
            return int(value)
        if hasattr(value, "__index__"):
            return operator.index(value)
    if kind is float and not isinstance(value, bool | str) and hasattr(value, "__float__"):
        return float(value)
    raise _refused(value, kind, key)


def _refused(value: Any, kind: Any, key: str) -> ConfigError:
    return ConfigError(f"{key}: got {value!r}, want {_named(kind)}")


def _named(kind: Any) -> str:
    origin = get_origin(kind)
    if origin is Literal:
        return f"one of {', '.join(map(repr, get_args(kind)))}"
    if origin is list:
        return f"a list, each of it {_named(get_args(kind)[0])}"
    if is_dataclass(kind):
        return f"a {getattr(kind, '__name__', kind)}, or a mapping of its keys"
    names = {str: "text", bool: "True or False", int: "a whole number", float: "a number", NoneType: "None"}
    return names.get(kind, str(kind))
