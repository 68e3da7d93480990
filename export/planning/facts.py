"""Reads settings of a config.json that may have several names, and refuses what cannot be."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from satchel.export.errors import ExportError
from satchel.export.planning.families import NAMES, Family

LARGEST = 1 << 24
"""No width and no number of layers, heads or experts of a model is larger."""


@dataclasses.dataclass(frozen=True)
class Facts:
    """The settings of a config: `table` as in the file, what the family leaves out by default, `source` for errors."""

    table: Mapping[str, Any]
    family: Family
    source: str

    def get(self, name: str, default: Any = None) -> Any:
        """A setting under any of its names; null counts as left out."""
        for each in (name, *NAMES.get(name, ())):
            if self.table.get(each) is not None:
                return self.table[each]
        for each in (name, *NAMES.get(name, ())):
            if self.family.defaults.get(each) is not None:
                return self.family.defaults[each]
        return default

    def count(self, name: str, default: int | None = None, least: int = 1) -> int:
        """A whole number. Raises ExportError: it is missing, no whole number, too small or too large."""
        value = self.get(name, default)
        if value is None:
            raise ExportError(f"{self.source}: has no {name}: use the config.json of the original model")
        if type(value) is not int or not least <= value <= LARGEST:
            raise ExportError(
                f"{self.source}: {name} is {value!r}: it must be a whole number from {least} to {LARGEST}"
            )
        return value

    def flag(self, name: str) -> bool:
        """Whether a setting is on."""
        return bool(self.get(name, False))

    def has(self, name: str) -> bool:
        """Whether a setting is there."""
        return self.get(name) is not None

    def of_layer(self, index: int) -> Facts:
        """The settings of one layer, where the config has some of its own for it (`per_layer_config`)."""
        own = self.table.get("per_layer_config")
        own = own.get(str(index)) if isinstance(own, dict) else None
        return dataclasses.replace(self, table={**self.table, **own}) if isinstance(own, dict) else self
