"""What an export is asked for; all defaults and checks of its options."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from satchel.export.errors import ExportError

PRECISIONS = ("fp32", "fp16")
TARGETS = ("cpu",)
DEFAULT_CONTEXT = 4096
"""The largest context that is chosen without being asked for, in positions."""


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    """Options of an export.

    Attributes:
        output: The bundle's folder.
        precision: How weights are stored: fp32, or fp16 computed with in float32.
        max_context: Positions that the bundle allows; None for the smaller of the model's own and 4,096.
        target: What the graphs are made for.
        force: Replace a bundle that is at `output` already.
        tokenizer: A tokenizer to use in place of the checkpoint's own.

    Raises:
        ExportError: A value is not allowed.
    """

    output: Path
    precision: str = "fp32"
    max_context: int | None = None
    target: str = "cpu"
    force: bool = False
    tokenizer: Path | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "output", Path(self.output))
        for option, value, allowed in (("precision", self.precision, PRECISIONS), ("target", self.target, TARGETS)):
            if value not in allowed:
                raise ExportError(f"--{option} {value} is not known: choose {' or '.join(allowed)}")
        if self.max_context is not None and self.max_context < 1:
            raise ExportError(f"--max-context {self.max_context}: give at least 1 position")

    def context(self, model_limit: int) -> int:
        """The bundle's context for a model that was made for `model_limit` positions.

        Raises:
            ExportError: More was asked for than the model can do.
        """
        if self.max_context is None:
            return min(model_limit, DEFAULT_CONTEXT)
        if self.max_context > model_limit:
            raise ExportError(
                f"--max-context {self.max_context} is more than the {model_limit} positions "
                f"that the model was made for: give at most {model_limit}"
            )
        return self.max_context
