"""Names and forms that all bundles share: graphs, what they take and give beside a model's own caches, types, modes."""

from __future__ import annotations

PHASES = ("prefill", "decode", "score")
FURTHER = {
    "prefill_int8": "its products are not in 4 bits",
    "decode_blocks": "its decode takes no int8 activations",
    "native": "it was exported without one for satchel's own kernels",
}
"""Graphs that not every bundle has, and why one has them not."""

CACHE_MODES = ("shared", "swapped")
DTYPE_BYTES = {"float32": 4, "float16": 2, "int64": 8, "int32": 4, "int8": 1, "uint8": 1, "bool": 1}
DTYPES = tuple(DTYPE_BYTES)

STATIC_INPUTS = frozenset({"input_ids", "cache_rows", "cache_index", "last_token"})
"""What a static graph may take besides caches, masks and rows of tables. `input_ids` [1, tokens] int64, padded with any
id; `cache_rows` [1, 1, capacity, 1] bool, the positions that the new tokens are written to; `cache_index` [capacity]
int64, which new token goes there, any elsewhere (where tokens > 1); `last_token` [1] int64, the index of the last token
that is no padding (where tokens > 1 and only its logits are wanted)."""

TOP_IDS, TOP_LOGITS = TOP_OUTPUTS = ("top_ids", "top_logits")
"""What a graph may give beside its logits, both or neither: its most likely tokens, the most likely first, as ids int64
and logits float32, both [batch, 1, k]."""

FULL_MASK = "capacity"
"""The length of an `attention_mask` that covers the whole cache, with ones for the tokens that are there and zeros
behind them; any other name stands for a mask that ends with the last token."""

TOKENIZER_KINDS = ("tokenizer.json", "sentencepiece")
