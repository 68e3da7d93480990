"""Which passes run for which target, in which order: data, checked by a test without running anything."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from satchel.graphs.ir.inputs import Lengths
from satchel.graphs.ir.pipeline import Step
from satchel.graphs.passes.fuse.fuse_skip_norms import fuse_skip_norms
from satchel.graphs.passes.logits.slice_last_logits import slice_last_logits
from satchel.graphs.quant.quantized import Quantized
from satchel.graphs.targets.native import has_linear, native_float_steps
from satchel.graphs.targets.sessions import Session, cann_sessions, cpu_sessions, cuda_sessions
from satchel.graphs.targets.steps import (
    DECODE_CUDA,
    FUSE,
    FUSE_CUDA,
    FUSE_STANDARD,
    NORMALIZE,
    PHASE_STEPS,
    PREFILL_CUDA,
    STREAM,
    cann_steps,
    finish_cpu,
    finish_cuda,
    gains_by_int8,
    quantize_cuda,
    quantize_steps,
)
from satchel.runtime.bundle.contract import DECODE_BLOCKS, NATIVE, PHASES, PREFILL_INT8

PLAIN = "plain_"
"""Graphs without user passes are called by this and their phase."""


@dataclasses.dataclass(frozen=True)
class Target:
    """The passes of one target.

    Attributes:
        normalize: Run first; what they leave is checked for soundness.
        fuse: Run once on the normalized graph.
        phases: Run on a copy for each phase.
        sessions: How the runner opens each phase's graph.
        stream: Run on a float graph whose head takes one row.
        quantize: What puts quantized weights and caches into the graph of a phase.
        finish: What runs last on the graph of a phase in a precision.
        static: For a device that compiles each shape anew: what runs after the phase's own steps to make a graph for
            these lengths, with user passes in their place. None where shapes vary.
        float16: Whether the graphs compute in float16, and store weights that are not quantized in it, whatever the
            precision.
    """

    normalize: tuple[Step, ...]
    fuse: tuple[Step, ...]
    phases: Mapping[str, tuple[Step, ...]]
    sessions: Callable[[Quantized | None], Mapping[str, Session]]
    stream: tuple[Step, ...] = STREAM
    quantize: Callable[[str, Quantized], tuple[Step, ...]] = quantize_steps
    finish: Callable[[str, str], tuple[Step, ...]] = finish_cpu
    static: Callable[[Lengths, Quantized | None, tuple[Step, ...]], tuple[Step, ...]] | None = None
    float16: bool = False

    def static_steps(
        self, phase: str, lengths: Lengths, quantized: Quantized | None, custom: tuple[Step, ...] = ()
    ) -> tuple[Step, ...]:
        """All passes for one static graph, after those that the phases share; `custom` are those of a user's own.

        Raises:
            ValueError: The target's graphs are not static.
        """
        if self.static is None:
            raise ValueError("this target's graphs have dynamic dimensions")
        return (*self.phases[phase], *self.static(lengths, quantized, custom))

    def graphs(self, precision: str, quantized: Quantized | None) -> tuple[str, ...]:
        """The names of a bundle's graphs."""
        rules = {} if quantized is None else quantized.rules
        products = [name for name, rule in rules.items() if gains_by_int8(rule)]
        small = quantized is not None and any(quantized.weights[name].grid.scheme.bits == 4 for name in products)
        whole = any(rule.decode != "float" for rule in rules.values())
        native = precision == "fp16" if quantized is None else has_linear(quantized)
        further = {PREFILL_INT8: small, DECODE_BLOCKS: whole, NATIVE: native}
        return (*PHASES, *(name for name, there in further.items() if there and name in self.phases))

    def steps(
        self, phase: str, precision: str, quantized: Quantized | None, custom: tuple[Step, ...] = ()
    ) -> tuple[Step, ...]:
        """All passes for one phase, after those that the phases share; `custom` are those of a user's own."""
        rounded = quantized is not None and bool(quantized.weights)
        if quantized is None:
            quantize = native_float_steps() if phase == NATIVE else ()
        else:
            quantize = self.quantize(phase, quantized)
        stream = self.stream if phase not in ("score", NATIVE) and not rounded else ()
        return (*self.phases[phase], *stream, *quantize, *custom, *self.finish(phase, precision))


TARGETS: Mapping[str, Target] = {
    "cpu": Target(normalize=NORMALIZE, fuse=FUSE, phases=PHASE_STEPS, sessions=cpu_sessions),
    "cuda": Target(
        normalize=NORMALIZE,
        fuse=FUSE_CUDA,
        phases={"prefill": PREFILL_CUDA, "decode": DECODE_CUDA, "score": (Step(fuse_skip_norms),)},
        sessions=cuda_sessions,
        stream=(),
        quantize=quantize_cuda,
        finish=finish_cuda,
        float16=True,
    ),
    "cann": Target(
        normalize=NORMALIZE,
        fuse=FUSE_STANDARD,
        phases={"prefill": (Step(slice_last_logits),), "decode": (), "score": ()},
        sessions=cann_sessions,
        static=cann_steps,
        float16=True,
    ),
}
