"""The contract of a bundle's graphs between exporter and runner: names, and names and dimensions of inputs and outputs.

Most names are the defaults of onnxruntime-genai's configuration, so that other runners can run the graphs too.
"""

from __future__ import annotations

import enum

PHASES = ("prefill", "decode", "score")
"""The graphs of every bundle."""

EMBED = "embed"
"""A graph of bundles that were exported for embeddings: the hidden states of every position."""

PREFILL_INT8 = "prefill_int8"
"""A variant for bundles with 4-bit linear layers: prefill over int8 weights, which are made from the 4-bit weights when
the bundle is specialized. Prefill is compute-bound, and int8 matmuls are the fastest."""

DECODE_BLOCKS = "decode_blocks"
"""A variant for bundles with int8 activations in decode: decode over the same weights in groups, made when the bundle
is specialized. Some processors multiply a single row faster by groups."""

NATIVE = "native"
"""A variant for satchel's own kernels, for prefill and decode."""


class Layout(enum.Enum):
    """Memory layouts of weights that are made from the stored weights when a bundle is specialized."""

    INT8 = "int8"
    """Int8 with per-channel scales, made from 4-bit or 8-bit groups, as DequantizeLinear reads it."""

    GROUPS = "groups"
    """Int8 in groups of inputs, made from per-channel int8: the same numbers, as MatMulNBits reads them."""

    PANELS = "panels"
    """Panels of 16 outputs: the same numbers, as satchel's own kernels read them."""


INPUT_IDS, ATTENTION_MASK, POSITION_IDS = "input_ids", "attention_mask", "position_ids"
"""`input_ids` [batch, sequence] int64 and `attention_mask` [batch, total or capacity] int64. `position_ids` exists only
while a graph is traced: the exported graphs derive positions from the mask."""

TEXT_LENGTH = "text_length"
"""[batch, 1] int64, where the rotary table depends on the length of the text (`model.rotary_border`): the number of
tokens of the whole prompt, of which a run may be one chunk. It may be left out, and is 0 then: a run's mask decides."""

ROW_OFFSETS, BLOCK_TABLE = RAGGED_INPUTS = ("row_offsets", "block_table")
"""Optional inputs of the variant for satchel's own kernels, both or neither. `row_offsets` [sequences + 1] int32: where
the new tokens of each sequence begin in `input_ids`, which is [1, tokens] then, and their number; `block_table`
[sequences, blocks] int32: which block of the cache has each of a sequence's runs of positions. Left out, both are
empty, and a run is as in the other graphs."""

LOGITS = "logits"
"""[batch, 1, vocabulary] float32 of the last token, or [batch, sequence, vocabulary] of a score graph."""

HIDDEN_STATES = "hidden_states"
"""[batch, sequence, hidden] float32, those of the model's last norm: the output of the graph `EMBED`, which has no
logits."""

POOLINGS = ("mean", "last")
"""How the hidden states of a text become one vector: their mean, or those of the last token."""

TOP_IDS, TOP_LOGITS = TOP_OUTPUTS = ("top_ids", "top_logits")
"""Optional outputs, both or neither: the most likely tokens, the most likely first, as ids int64 and logits float32,
both [batch, 1, k]."""

BATCH, SEQUENCE, TOTAL, CAPACITY = "batch", "sequence", "total", "capacity"
"""Names of dynamic dimensions: sequences, new tokens, all tokens including the new ones, and positions of the cache. An
`attention_mask` of length `CAPACITY` covers the whole cache, with ones for the tokens so far and zeros after them; one
of length `TOTAL` ends with the last token."""

CACHE_MODES = ("shared", "swapped")

CONV, RECURRENT = STATE_KINDS = ("conv", "recurrent")
"""States of a layer, of the same size after any number of tokens: the last inputs of a causal convolution, [batch,
width - 1, channels] or with these two swapped, and the state of a linear recurrence, [batch, heads, key_dim,
value_dim]. Before the first token they are zeros. Unlike keys and values, they cannot go back to an earlier token."""

CACHE_ROWS, CACHE_INDEX, LAST_TOKEN = "cache_rows", "cache_index", "last_token"
STATIC_INPUTS = frozenset({INPUT_IDS, CACHE_ROWS, CACHE_INDEX, LAST_TOKEN})
"""Inputs of a static graph besides caches, masks and rows of lookup tables. `input_ids` [1, tokens] int64, padded
with any id; `cache_rows` [1, 1, capacity, 1] bool, the cache positions to write; `cache_index`
[capacity] int64, which new token goes there, any elsewhere (where tokens > 1); `last_token` [1] int64, the index of the
last token that is not padding (where tokens > 1 and only its logits are wanted)."""

TOKENIZER_KINDS = ("tokenizer.json", "sentencepiece")

WEIGHTS_NAME = "weights.bin"
"""The file that holds the weights of a bundle's graphs."""


def past_names(layer: int) -> tuple[str, str]:
    """Names of one layer's KV cache inputs: key, value; [batch, kv_heads, capacity, head_dim].

    Layers are numbered through the whole model, with those that do not attend.
    """
    return f"past_key_values.{layer}.key", f"past_key_values.{layer}.value"


def present_names(layer: int) -> tuple[str, str]:
    """Names of one layer's KV cache outputs: key, value; shaped like the inputs."""
    return f"present.{layer}.key", f"present.{layer}.value"


def past_state_name(layer: int, kind: str) -> str:
    """Name of the input for one layer's state of one of `STATE_KINDS`; [batch, ...]."""
    return f"past.{layer}.{kind}"


def present_state_name(layer: int, kind: str) -> str:
    """Name of the output for one layer's state; shaped like the input."""
    return f"present.{layer}.{kind}"


def lora_names(layer: str) -> tuple[str, str, str, str]:
    """Names of the optional inputs for an adapter's change of a linear layer, gain * (x @ W) + x @ A @ B + bias: those
    of A [inputs, rank], B [rank, outputs], bias [1, outputs] and gain [1, outputs]. Each has a default without effect.
    """
    return f"{layer}.lora_A.weight", f"{layer}.lora_B.weight", f"{layer}.lora_B.bias", f"{layer}.lora_gain"
