"""Packages that satchel requires, those that are missing, and the command that installs them.

The source is the metadata of the installed satchel. Standard library only.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import metadata

EXTRAS = ("export", "serve", "grammar", "plot", "sign", "mpi")
"""The user-facing extras of satchel, by their names in pyproject.toml."""

_REQUIREMENT = re.compile(r"""([A-Za-z0-9._-]+)\s*([^;]*?)\s*(?:;.*\bextra\s*==\s*["']([\w-]+)["'].*)?""")


@dataclass(frozen=True)
class Requirement:
    """A package by its name and version bounds, and the extra that requires it; None for satchel itself."""

    name: str
    bounds: str
    extra: str | None

    @property
    def installed(self) -> bool:
        """Whether some version of it is installed."""
        try:
            metadata.version(self.name)
        except metadata.PackageNotFoundError:
            return False
        return True

    def __str__(self) -> str:
        text = self.name + self.bounds
        return f"'{text}'" if self.bounds else text


@cache
def requirements() -> tuple[Requirement, ...]:
    """The requirements in satchel's metadata, extras included; empty if satchel is not installed."""
    try:
        lines = metadata.requires("satchel") or []
    except metadata.PackageNotFoundError:
        return ()
    found = map(_REQUIREMENT.fullmatch, lines)
    return tuple(Requirement(match[1], match[2], match[3]) for match in found if match)


def missing(extra: str | None) -> list[Requirement]:
    """The packages of an extra, or of satchel itself for None, that are not installed."""
    return [each for each in requirements() if each.extra == extra and not each.installed]


def install_command(extra: str) -> str:
    """The command that installs the missing packages of an extra."""
    return _command(missing(extra) or [each for each in requirements() if each.extra == extra])


def not_installed(module: str) -> str | None:
    """The message about a module that cannot be imported: what is missing and the command that installs it.

    None for a module of any other package: its absence is a bug.
    """
    package = module.split(".")[0]
    users = [each for each in requirements() if each.name.replace("-", "_").lower() == package.lower()]
    wanted = [each for each in users if each.extra is None] or [each for each in users if each.extra in EXTRAS]
    if not wanted:
        return None
    extra = wanted[0].extra  # some bundles do not need all of satchel's own packages
    others = [] if extra is None else [each for each in missing(extra) if each.name != wanted[0].name]
    return f"{package} is not installed: {_command([wanted[0], *others])}"


def _command(packages: Sequence[Requirement]) -> str:
    return " ".join(("pip install", *map(str, packages)))
