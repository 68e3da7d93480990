"""What an export is asked for; all defaults and checks of its options."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

from satchel.export.errors import ExportError

FLOAT_PRECISIONS = ("fp32", "fp16")
PRECISIONS = (*FLOAT_PRECISIONS, "a16w8", "a16w4", "a8w8", "int8", "int4")
KV_CACHES = ("float", "int8")
TARGETS = ("cpu", "cuda", "cann")
TARGET_PRECISIONS = {
    "cpu": PRECISIONS,
    "cuda": ("fp16", "a16w8", "a16w4", "int8", "int4"),
    "cann": ("fp16", "a16w8"),
}
"""What each target's operators can express; the first is the default."""

STATIC_TARGETS = ("cann",)
"""Targets whose graphs are for fixed numbers of tokens."""

PREFILL_LENGTHS = (32, 128, 512)
"""Tokens of a chunk for which a static target has a prefill graph, as far as the context allows."""

NOT_POSSIBLE = {
    ("cuda", "fp32"): "its attention (GroupQueryAttention) has no float32 kernel",
    ("cuda", "a8w8"): "it has no kernel that multiplies int8 by int8",
}
"""Why a precision is not among those of a target, where there is more to say."""

DEFAULT_CONTEXT = 4096
"""The largest context that is chosen without being asked for, in positions."""


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    """Options of an export.

    Attributes:
        output: The bundle's folder.
        precision: fp32; fp16, which the CPU computes with in float32; or a quantized form, by the recipe of that name.
            Empty for the target's own, the first of TARGET_PRECISIONS.
        kv_cache: How the KV cache is stored: float or int8.
        recipe: A recipe in place of the precision's own: a TOML file, or the name of one that ships.
        calibrate: A text to calibrate on in place of the one that ships.
        certificate: Measure the bundle against the float model, and write the figures into it.
        certificate_text: A text to measure on in place of the one that ships.
        max_context: Positions that the bundle allows; None for the smaller of the model's own and 4,096.
        target: What the graphs are made for.
        force: Replace a bundle that is at `output` already.
        tokenizer: A tokenizer to use in place of the checkpoint's own.
        passes: Graph passes of the user's own: each a `module:function`, a `file.py:function`, or the function itself.
        custom_ops: Shared libraries with operators that these passes put into the graphs.
        prefill_lengths: For a static target, the numbers of tokens that have a prefill graph, the smallest first;
            empty for `PREFILL_LENGTHS` as far as the context allows.

    Raises:
        ExportError: A value is not allowed.
    """

    output: Path
    precision: str = ""
    max_context: int | None = None
    target: str = "cpu"
    force: bool = False
    tokenizer: Path | None = None
    kv_cache: str = "float"
    recipe: str | Path | None = None
    calibrate: Path | None = None
    certificate: bool = True
    certificate_text: Path | None = None
    passes: tuple[Any, ...] = ()
    custom_ops: tuple[Path, ...] = ()
    prefill_lengths: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "output", Path(self.output))
        if not self.precision and self.target in TARGETS:
            object.__setattr__(self, "precision", TARGET_PRECISIONS[self.target][0])
        for option, value, allowed in (
            ("target", self.target, TARGETS),
            ("precision", self.precision, PRECISIONS),
            ("kv-cache", self.kv_cache, KV_CACHES),
        ):
            if value not in allowed:
                raise ExportError(f"--{option} {value} is not known: choose {' or '.join(allowed)}")
        self._check_target()
        if self.recipe is not None and not self.quantized:
            quantized = ", ".join(p for p in PRECISIONS if p not in FLOAT_PRECISIONS)
            raise ExportError(f"--recipe does not go with --precision {self.precision}: choose one of {quantized}")
        if self.calibrate is not None and not self.quantized and self.kv_cache == "float":
            raise ExportError(
                f"--calibrate: there is nothing to calibrate with --precision {self.precision}: leave it out"
            )
        if self.certificate_text is not None and not self.certificate:
            raise ExportError("--certificate-text does not go with --no-certificate: leave one of them out")
        if self.custom_ops and self.static:
            raise ExportError(
                f"--custom-ops does not go with --target {self.target}, whose device knows standard operators alone: "
                "leave it out, or choose another target"
            )
        if self.custom_ops and not self.passes:
            raise ExportError("--custom-ops without --pass: no graph has an operator of it: give a pass that adds one")
        if self.max_context is not None and self.max_context < 1:
            raise ExportError(f"--max-context {self.max_context}: give at least 1 position")

    def _check_target(self) -> None:
        """Check what depends on the target. Raises ExportError."""
        possible = TARGET_PRECISIONS[self.target]
        if self.precision not in possible:
            reason = NOT_POSSIBLE.get((self.target, self.precision))
            raise ExportError(
                f"--precision {self.precision} has no form on --target {self.target}"
                f"{f', as {reason}' if reason else ''}: choose {' or '.join(possible)}"
            )
        lengths = self.prefill_lengths
        if not self.static:
            if lengths:
                raise ExportError(f"--prefill-lengths does not go with --target {self.target}, which takes any length")
            return
        if self.int8_cache:
            raise ExportError(f"--kv-cache int8 has no form on --target {self.target}: choose float")
        if any(length < 1 for length in lengths) or any(a >= b for a, b in itertools.pairwise(lengths)):
            given = ",".join(map(str, lengths))
            raise ExportError(f"--prefill-lengths {given}: give numbers of tokens, each larger than the one before")

    @property
    def static(self) -> bool:
        """Whether each graph is for one number of tokens."""
        return self.target in STATIC_TARGETS

    def lengths(self, context: int) -> tuple[int, ...]:
        """The numbers of tokens that have a prefill graph in a bundle of so many positions.

        Raises:
            ExportError: One that was asked for is more than the bundle allows.
        """
        if not self.prefill_lengths:
            return tuple(n for n in PREFILL_LENGTHS if n <= context) or (context,)
        if self.prefill_lengths[-1] > context:
            raise ExportError(
                f"--prefill-lengths {self.prefill_lengths[-1]} is more than the bundle's {context} positions: "
                "leave it out or raise --max-context"
            )
        return self.prefill_lengths

    @property
    def quantized(self) -> bool:
        """Whether weights are stored in 8 or 4 bits."""
        return self.precision not in FLOAT_PRECISIONS

    @property
    def int8_cache(self) -> bool:
        """Whether keys and values are stored in 8 bits."""
        return self.kv_cache == "int8"

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
