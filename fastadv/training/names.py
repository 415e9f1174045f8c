"""Parts that a configuration asks for by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from .. import checks

T = TypeVar("T")


def known(what: str, name: Any, table: Mapping[str, T]) -> T:
    """``table[name]``, or an error with the names that there are."""
    checks.one_of(what, name, table)
    return table[name]


def called(what: str, function: Callable[..., T], *arguments: Any, **named: Any) -> T:
    """``function(*arguments, **named)``, or an error that says which arguments there are."""
    signature = inspect.signature(function)
    try:
        signature.bind(*arguments, **named)
    except TypeError as error:
        raise ValueError(f"{what}: {error}; its arguments are {', '.join(signature.parameters) or 'none'}") from None
    return function(*arguments, **named)


def made(what: str, item: Any, table: Mapping[str, Callable[..., T]]) -> T:
    """What an entry of a configuration stands for: ``name``, ``{name: argument}`` or ``{name: {argument: value}}``."""
    if isinstance(item, Mapping) and len(item) == 1:
        ((name, value),) = item.items()
        arguments, named = ((), value) if isinstance(value, Mapping) else ((value,), {})
    else:
        name, arguments, named = item, (), {}
    return called(f"{what} {name!r}", known(what, name, table), *arguments, **named)
