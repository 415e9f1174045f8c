"""Docstrings name other objects as :class:`PGD` or :meth:`perturb`: here these become links into the API, where they lead
somewhere, and code where not."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:class|func|meth|mod|data|attr):`~?([\w.]+)`")


class Roles(griffe.Extension):
    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        _rewrite(pkg)


def _rewrite(home: griffe.Object) -> None:
    if home.docstring is not None:
        home.docstring.value = ROLE.sub(lambda role: _link(home, role[1]), home.docstring.value)
    for member in home.members.values():
        if isinstance(member, griffe.Object):  # and no alias, whose docstring is that of its target
            _rewrite(member)


def _link(home: griffe.Object, name: str) -> str:
    return f'<autoref optional identifier="{_path(home, name)}"><code>{name}</code></autoref>'


def _path(home: griffe.Object, name: str) -> str:
    """The full path of what a docstring means: from here, from the class round it or one that it inherits from, or as it is."""
    for scope in (home, home.parent):
        if isinstance(scope, griffe.Class) and name in scope.all_members:
            return scope.all_members[name].canonical_path
    try:
        return home.resolve(name)
    except griffe.NameResolutionError:
        return name
