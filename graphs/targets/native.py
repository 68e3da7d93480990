"""The graph of satchel's own operators, which serves prefill and decode: what it is made by, and for which models."""

from __future__ import annotations

from collections.abc import Mapping

from satchel.graphs.ir.pipeline import Step
from satchel.graphs.passes.cache.quantize_kv_cache import quantize_kv_cache
from satchel.graphs.passes.float16.store_linear_float16 import store_linear_float16
from satchel.graphs.passes.fuse.fuse_skip_norms import fuse_skip_norms
from satchel.graphs.passes.native.advance_last_token import advance_last_token
from satchel.graphs.passes.native.fold_biases import fold_biases
from satchel.graphs.passes.native.fold_gates import fold_gates
from satchel.graphs.passes.native.fold_hadamards import fold_hadamards
from satchel.graphs.passes.native.fold_key_norms import fold_key_norms
from satchel.graphs.passes.native.fold_norms import fold_norms
from satchel.graphs.passes.native.fold_residuals import fold_residuals
from satchel.graphs.passes.native.insert_linear import insert_linear
from satchel.graphs.passes.native.insert_linear_float import insert_linear_float
from satchel.graphs.passes.native.lower_attention_native import lower_attention_native
from satchel.graphs.passes.native.lower_embedding_matmul import lower_embedding_matmul
from satchel.graphs.passes.native.lower_states_native import lower_states_native
from satchel.graphs.passes.native.store_cache_float16 import store_cache_float16
from satchel.graphs.passes.native.take_rows import take_rows
from satchel.graphs.passes.quantize.insert_qdq import insert_qdq
from satchel.graphs.passes.quantize.quantize_embeddings import quantize_embeddings
from satchel.graphs.passes.quantize.quantize_experts import quantize_experts
from satchel.graphs.quant.quantized import Quantized, quantized_products


def native_steps(quantized: Quantized, activations: Mapping[str, str]) -> tuple[Step, ...]:
    """The passes that put satchel's own operators into the graph. A linear layer takes in what stands around it, from
    the inside out.

    Args:
        quantized: The model's weights, and the scales of an int8 KV cache.
        activations: By the name of a weight, how the linear layers that the operator refuses take their
            input: the names of insert_qdq's forms.
    """
    weights = quantized.weights
    return (
        Step(quantize_embeddings(weights), after=("slice_last_logits",)),
        Step(lower_embedding_matmul(weights), after=("quantize_embeddings",)),
        Step(quantize_experts(weights)),
        Step(insert_linear(weights)),
        Step(insert_qdq(weights, activations), after=("insert_linear",)),  # what the operator does not take
        Step(fold_biases, after=("insert_linear",)),
        Step(fold_gates, after=("insert_linear", "fold_biases")),
        Step(fold_hadamards, after=("insert_linear",)),
        Step(
            fold_norms, after=("insert_linear", "lower_embedding_matmul", "fold_hadamards")
        ),  # a norm comes before the matrix
        Step(fold_residuals, after=("fold_biases", "fold_gates")),  # added last
        *((Step(quantize_kv_cache(quantized.kv_scales, "decode")),) if quantized.kv_scales else ()),
        Step(lower_attention_native, after=("quantize_kv_cache",)),
        Step(lower_states_native),
        Step(fold_key_norms, after=("lower_states_native",)),
        Step(fuse_skip_norms, after=("fold_norms", "fold_residuals")),  # what linear layers have not taken in
        Step(store_linear_float16),
        Step(take_rows, after=("lower_attention_native", "insert_linear", "slice_last_logits"), changes_signature=True),
        Step(advance_last_token, after=("take_rows", "fold_residuals", "fuse_skip_norms")),
        Step(store_cache_float16, after=("lower_attention_native", "take_rows")),
    )


def native_float_steps() -> tuple[Step, ...]:
    """The same for weights in float16, which are stored as such last."""
    return (
        Step(insert_linear_float, after=("slice_last_logits",)),  # it looks for the plain head
        Step(fold_biases, after=("insert_linear_float",)),
        Step(fold_gates, after=("insert_linear_float", "fold_biases")),
        Step(fold_norms, after=("insert_linear_float",)),
        Step(fold_residuals, after=("fold_biases", "fold_gates")),  # added last
        Step(lower_attention_native),
        Step(lower_states_native),
        Step(fold_key_norms, after=("lower_states_native",)),
        Step(fuse_skip_norms, after=("fold_norms", "fold_residuals")),  # what linear layers have not taken in
        Step(take_rows, after=("lower_attention_native", "slice_last_logits"), changes_signature=True),
        Step(advance_last_token, after=("take_rows", "fold_residuals", "fuse_skip_norms")),
        Step(store_cache_float16, after=("lower_attention_native", "take_rows")),
    )


def has_linear(quantized: Quantized) -> bool:
    """Whether one of the model's linear layers is with quantized weights that satchel's own operator takes."""
    return any(weight.fits_panels() for _, weight in quantized_products(quantized.model, quantized.weights))
