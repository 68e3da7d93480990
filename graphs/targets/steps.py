"""The passes in the order in which they run, stage by stage: data, checked by a test without running anything."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from satchel.graphs.ir.inputs import Lengths
from satchel.graphs.ir.pipeline import Step
from satchel.graphs.passes.adapt.attach_adapters import attach_adapters
from satchel.graphs.passes.cache.choose_rotary_rows import choose_rotary_rows
from satchel.graphs.passes.cache.derive_positions import derive_positions
from satchel.graphs.passes.cache.drop_inputs import drop_inputs
from satchel.graphs.passes.cache.full_length_mask import full_length_mask
from satchel.graphs.passes.cache.quantize_kv_cache import quantize_kv_cache
from satchel.graphs.passes.cache.single_token import single_token
from satchel.graphs.passes.float16.compute_float16 import compute_float16
from satchel.graphs.passes.float16.scale_products import scale_products
from satchel.graphs.passes.float16.store_float16 import store_float16
from satchel.graphs.passes.float16.store_linear_float16 import store_linear_float16
from satchel.graphs.passes.fuse.absorb_latent import absorb_latent
from satchel.graphs.passes.fuse.fuse_attention import fuse_attention
from satchel.graphs.passes.fuse.fuse_norms import fuse_norms
from satchel.graphs.passes.fuse.fuse_rotary import fuse_rotary
from satchel.graphs.passes.fuse.fuse_skip_norms import fuse_skip_norms
from satchel.graphs.passes.fuse.lower_convolution import lower_convolution
from satchel.graphs.passes.fuse.lower_experts import lower_experts
from satchel.graphs.passes.fuse.lower_recurrence import lower_recurrence
from satchel.graphs.passes.fuse.pack_gate_up import pack_gate_up
from satchel.graphs.passes.fuse.pack_qkv import pack_qkv
from satchel.graphs.passes.fuse.share_caches import share_caches
from satchel.graphs.passes.logits.add_top_k import add_top_k
from satchel.graphs.passes.logits.choose_output import choose_output
from satchel.graphs.passes.logits.share_tied_head import share_tied_head
from satchel.graphs.passes.logits.slice_final_logits import slice_final_logits
from satchel.graphs.passes.logits.slice_last_logits import slice_last_logits
from satchel.graphs.passes.logits.stream_tied_head import stream_tied_head
from satchel.graphs.passes.logits.take_last_token import take_last_token
from satchel.graphs.passes.normalize.decompose_norms import decompose_norms
from satchel.graphs.passes.normalize.fold_constants import fold_constants
from satchel.graphs.passes.normalize.import_opset import import_opset
from satchel.graphs.passes.normalize.lower_opset import lower_opset
from satchel.graphs.passes.normalize.name_projections import name_projections
from satchel.graphs.passes.normalize.normalize_gemm import normalize_gemm
from satchel.graphs.passes.normalize.normalize_lookups import normalize_lookups
from satchel.graphs.passes.normalize.normalize_slices import normalize_slices
from satchel.graphs.passes.normalize.normalize_splits import normalize_splits
from satchel.graphs.passes.normalize.remove_dead import remove_dead
from satchel.graphs.passes.normalize.remove_duplicates import remove_duplicates
from satchel.graphs.passes.normalize.remove_identity import remove_identity
from satchel.graphs.passes.normalize.sanitize_names import sanitize_names
from satchel.graphs.passes.normalize.simplify_shapes import simplify_shapes
from satchel.graphs.passes.normalize.sink_channels import sink_channels
from satchel.graphs.passes.normalize.sink_transposes import sink_transposes
from satchel.graphs.passes.normalize.unflatten_heads import unflatten_heads
from satchel.graphs.passes.normalize.unsqueeze_biases import unsqueeze_biases
from satchel.graphs.passes.quantize.equalize import equalize
from satchel.graphs.passes.quantize.insert_hadamard import insert_hadamard
from satchel.graphs.passes.quantize.insert_qdq import insert_qdq
from satchel.graphs.passes.quantize.order_inputs import order_inputs
from satchel.graphs.passes.quantize.quantize_embeddings import quantize_embeddings
from satchel.graphs.passes.quantize.quantize_experts import quantize_experts
from satchel.graphs.passes.quantize.quantize_folded import quantize_folded
from satchel.graphs.passes.quantize.quantize_linear import quantize_linear
from satchel.graphs.passes.quantize.rotate_residual import rotate_residual
from satchel.graphs.passes.quantize.rotate_values import rotate_values
from satchel.graphs.passes.static.expand_attention import expand_attention
from satchel.graphs.passes.static.fix_shapes import fix_shapes
from satchel.graphs.passes.static.hoist_position_gathers import hoist_position_gathers
from satchel.graphs.passes.static.lower_attention_static import lower_attention_static
from satchel.graphs.passes.static.transpose_tied_head import transpose_tied_head
from satchel.graphs.quant.quantized import Quantized
from satchel.graphs.quant.recipe import Recipe, Rule
from satchel.graphs.quant.stored import STORED
from satchel.graphs.targets.native import native_steps
from satchel.runtime.bundle.contract import (
    DECODE_BLOCKS,
    EMBED,
    HIDDEN_STATES,
    LOGITS,
    NATIVE,
    PHASES,
    PREFILL_INT8,
    Layout,
)

DECODE = (Step(single_token), Step(fuse_skip_norms))

NORMALIZE = (
    Step(fold_constants),
    Step(simplify_shapes),
    Step(remove_identity, after=("simplify_shapes",)),  # a shape made constant shows whether a Reshape does anything
    Step(normalize_gemm, after=("remove_identity",)),
    Step(normalize_lookups, after=("remove_identity",)),  # the index comes through an Expand that changes nothing
    Step(normalize_splits, after=("fold_constants",)),
    Step(normalize_slices, after=("fold_constants",)),
    Step(sink_channels, after=("normalize_splits",)),
    Step(unflatten_heads, after=("simplify_shapes",)),
    Step(remove_duplicates),
    Step(remove_dead),
)
"""Spelling variants of the tracer end here: later passes see constants as initializers and shapes as numbers."""

FUSE = (
    Step(name_projections, after=("fold_constants",)),
    Step(
        fuse_norms, after=("remove_duplicates",)
    ),  # the same norm traced twice would hide that its parts have one reader
    Step(sink_transposes, after=("fuse_norms",)),
    Step(fuse_rotary, after=("remove_duplicates",)),
    Step(share_caches, after=("remove_duplicates",)),
    Step(absorb_latent(), after=("fuse_rotary", "share_caches"), changes_signature=True),
    Step(
        fuse_attention, after=("fuse_rotary", "share_caches", "absorb_latent"), changes_signature=True
    ),  # takes the rotation in
    Step(expand_attention, after=("fuse_attention",), changes_signature=True),  # what the fused operator refused
    Step(lower_experts),
    Step(choose_rotary_rows, after=("fuse_attention",), changes_signature=True),  # which looks for what it replaces
    Step(lower_convolution, changes_signature=True),
    Step(lower_recurrence, changes_signature=True),
    Step(
        derive_positions, after=("absorb_latent", "fuse_attention", "expand_attention"), changes_signature=True
    ),  # which look for the input
    Step(remove_identity, after=("fuse_attention",)),
    Step(pack_qkv, after=("fuse_attention", "name_projections")),
    Step(pack_gate_up, after=("name_projections",)),
    Step(share_tied_head, after=("fold_constants",)),
)

FUSE_STANDARD = (
    Step(name_projections, after=("fold_constants",)),
    Step(fuse_norms, after=("remove_duplicates",)),
    Step(sink_transposes, after=("fuse_norms",)),
    Step(expand_attention, after=("fold_constants",), changes_signature=True),
    Step(choose_rotary_rows, changes_signature=True),
    Step(derive_positions, after=("expand_attention",), changes_signature=True),
    Step(remove_identity, after=("expand_attention",)),
    Step(share_tied_head, after=("fold_constants",)),
)
"""For a target that has standard operators only. Rotations stay arithmetic: their tables' rows are to be inputs."""
_CHOOSE = Step(choose_rotary_rows, changes_signature=True)
NOT_ON_CUDA = (
    "share_caches",
    "absorb_latent",
    "expand_attention",
    "choose_rotary_rows",
    "lower_convolution",
    "lower_recurrence",
)
FUSE_CUDA = tuple(
    each
    for step in FUSE
    if step.name not in NOT_ON_CUDA
    for each in ((_CHOOSE, step) if step.name == "fuse_attention" else (step,))
)
"""A layer that GroupQueryAttention does not take has no form here: TensorScatter came to this device's kernels late.
Neither have convolutions and recurrences. Rows of a rotary table are chosen early, so that such a rotation stays
outside: some versions of its attention ignore them."""

PREFILL = (
    Step(slice_last_logits),
    Step(fuse_skip_norms, after=("slice_last_logits",)),  # the slice looks for the plain norm
)

ADAPT = Step(attach_adapters, changes_signature=True)
"""Before weights are quantized: what adapters add is in float, and looks for the weights that passes have changed."""

PHASE_STEPS: Mapping[str, tuple[Step, ...]] = {
    "prefill": (*PREFILL, ADAPT),
    PREFILL_INT8: (*PREFILL, ADAPT),
    "decode": (*DECODE, ADAPT),
    DECODE_BLOCKS: (*DECODE, ADAPT),
    NATIVE: (Step(slice_last_logits), ADAPT),
    "score": (Step(fuse_skip_norms), ADAPT),
    EMBED: (Step(fuse_skip_norms), ADAPT),
}


def output_step(phase: str) -> Step:
    """The pass that runs before those of a phase, where the phases share a graph with hidden states."""
    return Step(choose_output(HIDDEN_STATES if phase == EMBED else LOGITS), changes_signature=True)


PREFILL_CUDA = (Step(slice_final_logits), Step(fuse_skip_norms, after=("slice_final_logits",)))
DECODE_CUDA = (*DECODE, Step(full_length_mask))
"""In steps of static shapes that wait for nothing on the host: such as a CUDA graph can replay."""

STREAM = (Step(stream_tied_head, after=("slice_last_logits", "single_token")),)
"""For a head that is the embedding table in float; a score graph has too many tokens for it."""

FINISH = (Step(remove_duplicates), Step(remove_dead))

FIT_FLOAT16 = (Step(scale_products),)
"""For a target that computes in float16, once the values that it does not hold are known."""

CUDA_OPSET = 23
"""The newest version for which ONNX Runtime 1.24 to 1.31 have a CUDA kernel of all that graphs here consist of. TopK,
Unsqueeze and Squeeze have none for 24 in 1.24."""


FINISH_CUDA = (*FINISH, Step(compute_float16), Step(import_opset(CUDA_OPSET)))

ROTATE = (Step(rotate_residual), Step(rotate_values))
"""Outliers are spread over all channels of the residual stream and of each value head."""


def equalize_steps(recipe: Recipe, statistics: Mapping[str, NDArray[np.float32]]) -> tuple[Step, ...]:
    """The passes that a recipe wants in front of down projections; `statistics` are those of the pass equalize."""
    smooth = (Step(equalize(statistics)),) if "smooth" in recipe.transforms else ()
    if "hadamard" not in recipe.transforms:
        return smooth
    # The Hadamard matrix hides what smoothing looks for.
    return (*smooth, Step(insert_hadamard(recipe.hadamard_block), after=("equalize",)))


def order_steps(orders: Mapping[str, NDArray[np.int64]]) -> tuple[Step, ...]:
    """The pass that brings scattered groups together, where there are any; `orders` are those of order_inputs."""
    return (Step(order_inputs(orders), after=("assign",)),) if orders else ()


def quantize_steps(phase: str, quantized: Quantized) -> tuple[Step, ...]:
    """The passes that put quantized weights and caches into the graph of a phase."""
    if phase == NATIVE:
        return native_steps(quantized, {name: rule.prefill for name, rule in quantized.rules.items()})
    weights = quantized.weights
    activations = {name: ACTIVATIONS[phase](rule) for name, rule in quantized.rules.items()}
    kept = {name for name, rule in quantized.rules.items() if rule.rounding == STORED and activations[name] == "float"}
    exact = kept if phase in (*PHASES, EMBED) else set()
    if not only_kept_fours(quantized):
        activations |= dict.fromkeys(exact, "twice")
    steps = (
        Step(quantize_embeddings(weights, exact=exact), after=("slice_last_logits",)),  # it looks for the plain head
        Step(quantize_experts(weights, exact)),
        Step(insert_qdq(weights, activations)),
        Step(store_linear_float16),
    )
    if quantized.kv_scales:
        return (*steps, Step(quantize_kv_cache(quantized.kv_scales, "decode" if phase == DECODE_BLOCKS else phase)))
    return steps


def quantize_cuda(phase: str, quantized: Quantized) -> tuple[Step, ...]:
    """The same for a device that multiplies float16 with quantized weights, and whose attention reads and writes an
    int8 cache in all phases.
    """
    weights = quantized.weights
    steps = (
        Step(quantize_embeddings(weights, accuracy_level=0), after=("slice_final_logits",)),
        Step(quantize_linear(weights, quantized.rules), after=("quantize_embeddings",)),
    )
    return (*steps, Step(quantize_kv_cache(quantized.kv_scales, "decode"))) if quantized.kv_scales else steps


def finish_cpu(phase: str, precision: str) -> tuple[Step, ...]:
    """What runs last on the graph of a phase: weights in float16 are cast in front of their readers."""
    return (*FINISH, Step(store_float16, after=("remove_dead",))) if precision == "fp16" else FINISH


def finish_cuda(phase: str, precision: str) -> tuple[Step, ...]:
    """The same for a device that computes in float16 whatever the weights are."""
    top = (Step(add_top_k, after=("compute_float16",), changes_signature=True),) if phase != "score" else ()
    return (*FINISH_CUDA, *top)


def only_kept_fours(quantized: Quantized) -> bool:
    """Whether all quantized values are the checkpoint's own, of 4 bits."""
    rules = quantized.rules.values()
    return bool(rules) and all(rule.rounding == STORED and rule.bits == 4 for rule in rules)


def gains_by_int8(rule: Rule) -> bool:
    """Whether a rule's linear layers gain by int8 weights: a head sees one token at a time, and has its own rule."""
    return rule.prefill == "float" and "linear" in rule.kinds


ACTIVATIONS: Mapping[str, Callable[[Rule], str]] = {
    "prefill": lambda rule: rule.prefill,
    "decode": lambda rule: rule.decode,
    "score": lambda rule: rule.prefill,
    EMBED: lambda rule: rule.prefill,
    PREFILL_INT8: lambda rule: Layout.INT8.value if gains_by_int8(rule) else rule.prefill,
    DECODE_BLOCKS: lambda rule: "float" if rule.decode == "float" else Layout.GROUPS.value,
}
"""How a rule's linear layers take their input in a phase: the names of insert_qdq's forms."""


def cann_steps(lengths: Lengths, quantized: Quantized | None, custom: tuple[Step, ...] = ()) -> tuple[Step, ...]:
    """From the graph of a phase to one of operator set 17 in float16 for these lengths.

    User passes see what is in set 17, and in float32: what they add is turned to float16 with the rest.
    """
    codes = () if quantized is None else (Step(quantize_folded(quantized.weights, quantized.rules)),)
    return (
        Step(fix_shapes(lengths), changes_signature=True),
        Step(lower_attention_static, after=("fix_shapes",), changes_signature=True),
        Step(hoist_position_gathers, after=("fix_shapes",), changes_signature=True),
        Step(take_last_token, after=("fix_shapes", "slice_last_logits"), changes_signature=True),
        Step(
            drop_inputs,
            after=("lower_attention_static", "hoist_position_gathers", "take_last_token"),
            changes_signature=True,
        ),
        Step(transpose_tied_head, after=("fix_shapes",)),
        Step(decompose_norms),
        Step(unsqueeze_biases, after=("fix_shapes",)),
        Step(lower_opset, after=("lower_attention_static", "transpose_tied_head", "decompose_norms")),
        *custom,
        Step(compute_float16, after=("decompose_norms", "lower_opset"), changes_signature=True),  # sees what norms sum
        *codes,  # quantized values stand for float16 weights
        *FINISH,
        Step(sanitize_names, changes_signature=True),
    )
