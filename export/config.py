"""The options of an export: all defaults and checks."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path
from typing import Any

from satchel.export.errors import ExportError

STORED = "stored"
"""The precision that keeps the quantized values of the checkpoint."""

PRECISIONS = ("int8", "int4", "a8w8", "a16w8", "a16w4", "fp16", "fp32", STORED)
FLOAT_PRECISIONS = ("fp32", "fp16")
QUICK_PRECISIONS = ("int8", "a8w8", "a16w8", STORED)
"""Precisions that lose little without calibration; their default effort is quick."""

BUDGET_PRECISION = "int4"
"""The precision whose recipe a mixture within a budget starts from."""

EFFORTS = ("quick", "normal")
KV_CACHES = ("float", "int8")
LATENT_CACHES = ("compressed", "expanded")
POOLINGS = ("mean", "last")
ADAPTER_FORMS = ("merged", "separate")
TARGETS = ("cpu", "cuda", "cann")
TARGET_PRECISIONS = {
    "cpu": PRECISIONS,
    "cuda": ("fp16", "int8", "int4", "a16w8", "a16w4"),
    "cann": ("fp16", "a16w8"),
}
"""What each target supports; the first is the default."""

STATIC_TARGETS = ("cann",)
"""Targets whose graphs have static shapes."""

PREFILL_LENGTHS = (32, 128, 512)
"""Chunk lengths in tokens for which a static target has a prefill graph, as far as the context allows."""

NOT_POSSIBLE = {
    ("cuda", "fp32"): "its attention (GroupQueryAttention) has no float32 kernel",
    ("cuda", "a8w8"): "it has no kernel that multiplies int8 by int8",
    ("cuda", STORED): "its kernels have float16 scales, to which those of a checkpoint would be rounded",
    ("cann", STORED): "it has no operator for quantized values, which are folded into float16 weights",
}
"""Why a target does not support a precision, where there is more to say."""

DEFAULT_CONTEXT = 4096
"""The largest context that is chosen by default, in positions."""


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    """Options of an export.

    Attributes:
        output: The bundle's folder.
        append_precision: Whether `-PRECISION` is added to the folder's name once the precision is known.
        precision: fp32; fp16, which the CPU computes in float32; or a quantized form, by the recipe of that name.
            Empty for the default: stored if the checkpoint has quantized values that the target's kernels read,
            otherwise the first of TARGET_PRECISIONS.
        max_context: Positions that the bundle allows; None for the model's own, at most DEFAULT_CONTEXT.
        target: What the graphs are made for.
        force: Replace an existing bundle at `output`.
        tokenizer: A tokenizer to use instead of the checkpoint's own.
        kv_cache: How the KV cache is stored: float or int8, whose scales come from the calibration text.
        latent_cache: What layers of latent attention keep of a token: compressed, the latent that all heads share, or
            expanded, each head's keys and values. None for what is smaller, where the target has operators for it.
        effort: How weights are rounded. normal does what the recipe says: GPTQ and smoothing on a calibration text.
            quick needs no text: it searches for the scales with the least error, and layers with more outputs than
            inputs run GPTQ on a few random token ids. None for the default: quick for 8 bits, normal for 4 bits and
            wherever a recipe or a calibration text is given. It stays None in float.
        recipe: A recipe to use instead of the precision's own: a TOML file, or the name of a shipped one.
        bits: Find the recipe: the mixture of precisions that loses least with at most so many bits for each of the
            model's parameters, all of the weight file included.
        size: The same with at most so many megabytes (1e6 bytes) of weights.
        calibrate: A text to calibrate on instead of the shipped one.
        certificate: Measure the bundle against the float model, and write the figures into its manifest.
        eval_text: A text to measure on instead of the shipped one.
        passes: User graph passes: each a `module:function`, a `file.py:function`, or the function itself.
        custom_ops: Shared libraries with the operators that these passes put into the graphs.
        adapters: Folders of LoRA adapters in PEFT's format to merge, in this order: each a path, or FOLDER=SHARE. To
            keep apart, each is NAME=FOLDER.
        adapter_form: merged into the weights, or separate: inputs of the graphs, of which each request chooses one.
        embeddings: Add a graph of hidden states, from which the runner makes one vector of a text: the mean over its
            tokens, or those of the last one. None for no such graph.
        layout: The model_type to read the checkpoint as, where transformers does not know its own.
        weights: For file.py:factory, a file of tensors (torch.save, safetensors) to load into the module.
        prefill_lengths: For a static target, the numbers of tokens that have a prefill graph, in ascending order;
            empty for PREFILL_LENGTHS as far as the context allows.
        resume: Go on with an export to `output` that was interrupted while it rounded, and keep what is rounded if this
            one is interrupted. An export of effort normal keeps that anyway.
        keep_stored: Whether quantized values of the checkpoint are kept in place of what `precision` says; None for
            where neither a precision nor a recipe is given.

    Raises:
        ExportError: A value is not allowed, or two options contradict each other.
    """

    output: Path
    precision: str = ""
    max_context: int | None = None
    target: str = "cpu"
    force: bool = False
    tokenizer: Path | None = None
    kv_cache: str = "float"
    latent_cache: str | None = None
    effort: str | None = None
    recipe: str | Path | None = None
    bits: float | None = None
    size: float | None = None
    calibrate: Path | None = None
    certificate: bool = True
    eval_text: Path | None = None
    passes: tuple[Any, ...] = ()
    custom_ops: tuple[Path, ...] = ()
    prefill_lengths: tuple[int, ...] = ()
    keep_stored: bool | None = None
    adapters: tuple[str | Path, ...] = ()
    adapter_form: str = ADAPTER_FORMS[0]
    layout: str | None = None
    weights: Path | None = None
    append_precision: bool = False
    embeddings: str | None = None
    resume: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "output", Path(self.output))
        self._check_budget()
        if self.keep_stored is None:
            object.__setattr__(self, "keep_stored", not self.precision and self.recipe is None)
        if not self.precision and self.target in TARGETS:
            object.__setattr__(self, "precision", TARGET_PRECISIONS[self.target][0])
        for option, value, allowed in (
            ("target", self.target, TARGETS),
            ("precision", self.precision, PRECISIONS),
            ("kv-cache", self.kv_cache, KV_CACHES),
            ("latent-cache", self.latent_cache or LATENT_CACHES[0], LATENT_CACHES),
            ("effort", self.effort or EFFORTS[0], EFFORTS),
            ("adapters", self.adapter_form, ADAPTER_FORMS),
            ("embeddings", self.embeddings or POOLINGS[0], POOLINGS),
        ):
            if value not in allowed:
                raise ExportError(f"--{option} {value}: unknown value; choose {' or '.join(allowed)}")
        self._check_target()
        self._check_quantization()
        if self.eval_text is not None and not self.certificate:
            raise ExportError("--eval-text and --no-certificate are mutually exclusive: leave one of them out")
        if self.custom_ops and self.static:
            raise ExportError(
                f"--custom-ops does not go with --target {self.target}, which supports standard operators only: "
                "leave it out, or choose another target"
            )
        if self.embeddings is not None and self.passes:
            raise ExportError("--embeddings and --pass are mutually exclusive: leave one of them out")
        if self.custom_ops and not self.passes:
            raise ExportError("--custom-ops requires --pass: without one, no graph uses the library's operators")
        if self.separate_adapters and not self.adapters:
            raise ExportError(f"--adapters {self.adapter_form} requires adapters: give --adapter NAME=FOLDER")
        if self.max_context is not None and self.max_context < 1:
            raise ExportError(f"--max-context {self.max_context}: give at least 1 position")

    def _check_budget(self) -> None:
        """Check --bits and --size, and set the precision that their mixtures start from. Raises ExportError."""
        for option, value, unit in (("--bits", self.bits, "bits per weight"), ("--size", self.size, "megabytes")):
            if value is None:
                continue
            if not (math.isfinite(value) and value > 0):
                raise ExportError(f"{option} {value:g}: give a number of {unit} above 0")
            if self.precision not in ("", BUDGET_PRECISION):
                raise ExportError(
                    f"{option} {value:g} chooses the precision of each layer: leave out --precision {self.precision}"
                )
            for other, given in (
                ("--recipe", self.recipe),
                ("--effort", self.effort if self.effort == "quick" else None),
            ):
                if given is not None:
                    raise ExportError(
                        f"{option} {value:g} and {other} {given} are mutually exclusive: leave one of them out"
                    )
            object.__setattr__(self, "precision", BUDGET_PRECISION)
        if self.bits is not None and self.size is not None:
            raise ExportError("--bits and --size are mutually exclusive: leave one of them out")

    def _check_target(self) -> None:
        """Check what depends on the target. Raises ExportError."""
        possible = TARGET_PRECISIONS[self.target]
        if self.precision not in possible:
            reason = NOT_POSSIBLE.get((self.target, self.precision))
            raise ExportError(
                f"--precision {self.precision} is not supported by --target {self.target}"
                f"{f': {reason}' if reason else ''}; choose {' or '.join(possible)}"
            )
        if self.separate_adapters and self.target != "cpu":
            raise ExportError(
                f"--adapters {self.adapter_form} is not supported by --target {self.target}, whose graphs have no "
                "optional inputs: merge one adapter, or choose --target cpu"
            )
        if self.latent_cache == LATENT_CACHES[0] and self.target != "cpu":
            raise ExportError(
                f"--latent-cache {self.latent_cache} is not supported by --target {self.target}: leave it out, or "
                "choose --target cpu"
            )
        if self.embeddings is not None and self.target != "cpu":
            raise ExportError(f"--embeddings is not supported by --target {self.target}: choose --target cpu")
        lengths = self.prefill_lengths
        if not self.static:
            if lengths:
                raise ExportError(f"--prefill-lengths does not go with --target {self.target}, which takes any length")
            return
        if self.int8_cache:
            raise ExportError(f"--kv-cache int8 is not supported by --target {self.target}: choose float")
        if any(length < 1 for length in lengths) or any(a >= b for a, b in itertools.pairwise(lengths)):
            given = ",".join(map(str, lengths))
            raise ExportError(f"--prefill-lengths {given}: give numbers of tokens in ascending order")

    def _check_quantization(self) -> None:
        """Set the default effort, and check the options that only a quantized bundle has. Raises ExportError."""
        if not self.quantized:
            for option, value in (("effort", self.effort), ("recipe", self.recipe)):
                if value is not None:
                    quantized = " or ".join(p for p in PRECISIONS if p not in FLOAT_PRECISIONS)
                    raise ExportError(
                        f"--{option} {value} does not go with --precision {self.precision}, which rounds no weights: "
                        f"leave it out, or choose {quantized}"
                    )
        elif self.effort is None:
            quick = self.precision in QUICK_PRECISIONS and self.recipe is None and self.calibrate is None
            object.__setattr__(self, "effort", "quick" if quick else "normal")
        if self.resume and not self.quantized:
            raise ExportError(f"--resume does not go with --precision {self.precision}, which rounds no weights")
        if self.calibrate is not None and not self.reads_calibration_text:
            chosen = f"--effort {self.effort}" if self.quantized else f"--precision {self.precision}"
            raise ExportError(f"--calibrate does not go with {chosen}, which needs no calibration text: leave it out")

    @property
    def budgeted(self) -> bool:
        """Whether the recipe is found, within a budget."""
        return self.bits is not None or self.size is not None

    @property
    def named_output(self) -> Path:
        """The bundle's folder, with the precision in its name if it is added."""
        return Path(f"{self.output}-{self.precision}") if self.append_precision else self.output

    @property
    def static(self) -> bool:
        """Whether each graph is for one number of tokens."""
        return self.target in STATIC_TARGETS

    @property
    def separate_adapters(self) -> bool:
        """Whether adapters are inputs of the graphs."""
        return self.adapter_form == "separate"

    @property
    def quantized(self) -> bool:
        """Whether weights are stored in 8 or 4 bits."""
        return self.precision not in FLOAT_PRECISIONS

    @property
    def reads_calibration_text(self) -> bool:
        """Whether calibration needs a text; a quick one takes random token ids."""
        return self.effort == "normal" or self.int8_cache

    @property
    def resumable(self) -> bool:
        """Whether what is rounded is kept when the export is interrupted."""
        return self.quantized and (self.resume or self.effort == "normal")

    @property
    def int8_cache(self) -> bool:
        """Whether keys and values are stored in 8 bits."""
        return self.kv_cache == "int8"

    def lengths(self, context: int) -> tuple[int, ...]:
        """The numbers of tokens that have a prefill graph in a bundle of `context` positions.

        Raises:
            ExportError: One that was asked for exceeds the bundle's context.
        """
        if not self.prefill_lengths:
            return tuple(n for n in PREFILL_LENGTHS if n <= context) or (context,)
        if self.prefill_lengths[-1] > context:
            raise ExportError(
                f"--prefill-lengths {self.prefill_lengths[-1]} exceeds the bundle's {context} positions: "
                "leave it out or raise --max-context"
            )
        return self.prefill_lengths

    def context(self, model_limit: int) -> int:
        """The bundle's context for a model that supports `model_limit` positions.

        Raises:
            ExportError: More was asked for than the model supports.
        """
        if self.max_context is None:
            return min(model_limit, DEFAULT_CONTEXT)
        if self.max_context > model_limit:
            raise ExportError(
                f"--max-context {self.max_context} exceeds the model's {model_limit} positions: "
                f"give at most {model_limit}"
            )
        return self.max_context
