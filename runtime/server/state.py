"""What all endpoints share."""

from __future__ import annotations

from dataclasses import dataclass

from satchel.runtime.server.models import Models
from satchel.runtime.server.records import Metrics
from satchel.runtime.server.settings import Settings


@dataclass(frozen=True)
class State:
    """The models, the settings and the counts of one server."""

    models: Models
    settings: Settings
    metrics: Metrics
