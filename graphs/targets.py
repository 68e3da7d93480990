"""Which passes run for which target, in which order: data, checked by a test without running anything."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from satchel.graphs.passes.derive_positions import derive_positions
from satchel.graphs.passes.expand_attention import expand_attention
from satchel.graphs.passes.fold_constants import fold_constants
from satchel.graphs.passes.fuse_attention import fuse_attention
from satchel.graphs.passes.fuse_norms import fuse_norms
from satchel.graphs.passes.fuse_rotary import fuse_rotary
from satchel.graphs.passes.fuse_skip_norms import fuse_skip_norms
from satchel.graphs.passes.lower_experts import lower_experts
from satchel.graphs.passes.name_projections import name_projections
from satchel.graphs.passes.normalize_gemm import normalize_gemm
from satchel.graphs.passes.normalize_lookups import normalize_lookups
from satchel.graphs.passes.normalize_splits import normalize_splits
from satchel.graphs.passes.pack_gate_up import pack_gate_up
from satchel.graphs.passes.pack_qkv import pack_qkv
from satchel.graphs.passes.remove_dead import remove_dead
from satchel.graphs.passes.remove_duplicates import remove_duplicates
from satchel.graphs.passes.remove_identity import remove_identity
from satchel.graphs.passes.share_tied_head import share_tied_head
from satchel.graphs.passes.simplify_shapes import simplify_shapes
from satchel.graphs.passes.single_token import single_token
from satchel.graphs.passes.sink_transposes import sink_transposes
from satchel.graphs.passes.slice_last_logits import slice_last_logits
from satchel.graphs.passes.store_float16 import store_float16
from satchel.graphs.passes.stream_tied_head import stream_tied_head
from satchel.graphs.pipeline import Step

PHASES = ("prefill", "decode", "score")

NORMALISE = (
    Step(fold_constants),
    Step(simplify_shapes),
    Step(remove_identity, after=("simplify_shapes",)),  # a shape made constant shows whether a Reshape does anything
    Step(normalize_gemm, after=("remove_identity",)),
    Step(normalize_lookups, after=("remove_identity",)),  # the index comes through an Expand that changes nothing
    Step(normalize_splits, after=("fold_constants",)),
    Step(remove_duplicates),
    Step(remove_dead),
)
"""Spelling variants of the tracer end here: later passes see constants as initialisers and shapes as numbers."""

FUSE = (
    Step(name_projections, after=("fold_constants",)),
    Step(
        fuse_norms, after=("remove_duplicates",)
    ),  # the same norm traced twice would hide that its parts have one reader
    Step(sink_transposes, after=("fuse_norms",)),
    Step(fuse_rotary, after=("remove_duplicates",)),
    Step(fuse_attention, after=("fuse_rotary",), changes_signature=True),  # takes the rotation in
    Step(expand_attention, after=("fuse_attention",), changes_signature=True),  # what the fused operator refused
    Step(lower_experts),
    Step(
        derive_positions, after=("fuse_attention", "expand_attention"), changes_signature=True
    ),  # both look for the input
    Step(remove_identity, after=("fuse_attention",)),
    Step(pack_qkv, after=("fuse_attention", "name_projections")),
    Step(pack_gate_up, after=("name_projections",)),
    Step(share_tied_head, after=("fold_constants",)),
)

PHASE_STEPS: Mapping[str, tuple[Step, ...]] = {
    "prefill": (
        Step(slice_last_logits),
        Step(stream_tied_head, after=("slice_last_logits",)),
        Step(fuse_skip_norms, after=("slice_last_logits",)),  # the slice looks for the plain norm
    ),
    "decode": (Step(single_token), Step(stream_tied_head, after=("single_token",)), Step(fuse_skip_norms)),
    "score": (Step(fuse_skip_norms),),
}

FINISH = (Step(remove_duplicates), Step(remove_dead))


@dataclasses.dataclass(frozen=True)
class Session:
    """How the runner opens a graph.

    Attributes:
        config: Session configuration entries.
        of: The phase whose session runs this phase too, where their kernels and weights are the same; None for a
            session of its own.
    """

    config: Mapping[str, str] = dataclasses.field(default_factory=dict)
    of: str | None = None


@dataclasses.dataclass(frozen=True)
class Target:
    """The passes of one target.

    Attributes:
        normalise: Run first; what they leave is checked for soundness.
        fuse: Run once on the normalised graph.
        phases: Run on a copy for each phase.
        precisions: Run last on each phase, by name of the precision.
        sessions: How the runner opens each phase's graph.
    """

    normalise: tuple[Step, ...]
    fuse: tuple[Step, ...]
    phases: Mapping[str, tuple[Step, ...]]
    precisions: Mapping[str, tuple[Step, ...]]
    sessions: Mapping[str, Session]


TARGETS: Mapping[str, Target] = {
    "cpu": Target(
        normalise=NORMALISE,
        fuse=FUSE,
        phases=PHASE_STEPS,
        precisions={"fp32": FINISH, "fp16": (*FINISH, Step(store_float16, after=("remove_dead",)))},
        # In float both phases have the same kernels: one session packs the weights once for both. Scoring is rare, and
        # reads them as they are mapped.
        sessions={
            "prefill": Session(),
            "decode": Session(of="prefill"),
            "score": Session({"session.disable_prepacking": "1"}),
        },
    ),
}
