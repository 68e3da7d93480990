"""Selects the rules and kernel tables of a check, by provider and ONNX Runtime version."""

from __future__ import annotations

import re
from dataclasses import dataclass

import onnxruntime

from satchel.export.checking.installed_kernels import cpu_kernels
from satchel.graphs.providers.facts import VERSIONS, cuda_kernels
from satchel.graphs.providers.findings import Rule
from satchel.graphs.providers.kernels import KernelTable
from satchel.graphs.providers.rules import RULES
from satchel.runtime.errors import ProviderError

OPTION = "--ort-version"
OLDEST, NEWEST = VERSIONS[0], VERSIONS[-1]
VERSION = re.compile(r"(\d+)\.(\d+)(?:\.(\d+))?")


@dataclass(frozen=True)
class Provider:
    """A provider to check for.

    Attributes:
        name: Its name on the command line.
        tables: The ONNX Runtime version of rules and kernels, for people.
        rules: Its rules.
        kernels: Its kernels; None if it only takes whole graphs.
    """

    name: str
    tables: str
    rules: tuple[Rule, ...]
    kernels: KernelTable | None

    @property
    def whole_graphs(self) -> bool:
        """Whether it takes a graph only as a whole."""
        return self.kernels is None


def provider_of(name: str, version: str | None = None) -> Provider:
    """The provider of this name, in a version of ONNX Runtime.

    Args:
        name: "cann", "cuda" or "cpu".
        version: Such as "1.24.4" or "1.30"; the nearest version with a table is used, the older of two equally near.
            None: for cann that of the released wheel, for cuda the newest, for cpu the installed one.

    Raises:
        ProviderError: The provider or version is unknown.
    """
    if name not in RULES:
        raise ProviderError(f"--provider {name}: unknown: choose one of {', '.join(RULES)}")
    if name == "cpu":
        installed = onnxruntime.__version__
        if version is not None and version != installed:
            raise ProviderError(
                f"{OPTION} {version}: for cpu only the installed ONNX Runtime {installed} can be checked: leave it "
                "out, or install the other version"
            )
        return Provider(name, f"ONNX Runtime {installed}, installed", RULES[name], cpu_kernels())
    default = OLDEST if name == "cann" else NEWEST
    chosen = default if version is None else nearest(version)
    tables = f"ONNX Runtime {chosen}" + (f", nearest to {version}" if version not in (None, chosen) else "")
    return Provider(name, tables, RULES[name], cuda_kernels(chosen) if name == "cuda" else None)


def nearest(version: str) -> str:
    """The nearest version with a table. Raises ProviderError for an invalid version, or one before the oldest."""
    numbers, (oldest, newest) = _numbers(version), (_numbers(OLDEST), _numbers(NEWEST))
    if numbers is None or oldest is None or newest is None or numbers[0] != oldest[0] or numbers[1] < oldest[1]:
        raise ProviderError(
            f"{OPTION} {version}: unknown: choose one of {', '.join(VERSIONS)}, or a version between or after them"
        )
    return min(VERSIONS, key=lambda known: abs(numbers[1] - (_numbers(known) or (0, 0))[1]))


def _numbers(version: str) -> tuple[int, int] | None:
    match = VERSION.fullmatch(version)
    return (int(match[1]), int(match[2])) if match else None
