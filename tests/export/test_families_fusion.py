"""What the passes do to each family is pinned: a fusion that stops firing, or starts, shows here."""

from __future__ import annotations

import onnx_ir as ir
import pytest
from support.exported import exported
from support.families import by_family

COMMON_PASSES = (
    "fuse_attention", "fuse_norms", "fuse_rotary", "pack_qkv", "pack_gate_up", "lower_experts", "share_tied_head",
)  # fmt: skip
ROTATION_OUTSIDE = (
    "its rotation stays outside: GroupQueryAttention rotates heads and parts of heads of multiples of 16 channels, "
    "not 8 of 16"
)

# Two layers each. attention: of these, all. norms: those spelt as arithmetic; a centered one counts twice. qkv: 2 where
# only the products are joined or the checkpoint has them joined, 4 where the attention also reads them as one tensor.
# rotations outside: RotaryEmbedding nodes that are left. skip norms: in the decode graph.
#                          attention norms rotary qkv gate_up experts tied_head | rotations outside, skip norms
EXPECTED: dict[str, tuple[tuple[int, ...], int, int]] = {
    "llama":             ((2,        5,    4,     4,  2,      0,      0),          0,                 4),
    "llama_llama3_rope": ((2,        5,    4,     4,  2,      0,      0),          0,                 4),
    "mistral":           ((2,        5,    4,     4,  2,      0,      0),          0,                 4),
    "qwen2":             ((2,        5,    4,     4,  2,      0,      0),          0,                 4),
    "qwen3":             ((2,        9,    4,     2,  2,      0,      0),          0,                 4),
    "gemma2":            ((2,        9,    4,     4,  2,      0,      0),          0,                 4),
    "gemma3_text":       ((2,        13,   4,     2,  2,      0,      0),          0,                 4),
    "phi3_short":        ((2,        5,    4,     2,  0,      0,      0),          0,                 4),
    "phi3_long":         ((2,        5,    4,     2,  0,      0,      0),          0,                 4),
    "smollm3":           ((2,        5,    2,     4,  2,      0,      1),          0,                 4),
    "olmo2":             ((2,        9,    4,     2,  2,      0,      0),          0,                 1),
    "granite":           ((2,        5,    4,     4,  2,      0,      0),          0,                 4),
    "cohere":            ((2,        14,   4,     2,  2,      0,      1),          0,                 2),
    "gpt2":              ((2,        0,    0,     2,  0,      0,      1),          0,                 5),
    "gpt_neox":          ((2,        0,    4,     0,  0,      0,      0),          0,                 2),
    "starcoder2":        ((2,        0,    4,     4,  0,      0,      1),          0,                 4),
    "stablelm":          ((2,        0,    4,     0,  2,      0,      0),          4,                 4),
    "stablelm_wide":     ((2,        0,    4,     4,  2,      0,      0),          0,                 2),
    "mixtral":           ((2,        5,    4,     4,  0,      2,      0),          0,                 4),
    "qwen3_moe":         ((2,        9,    4,     2,  0,      2,      0),          0,                 4),
}  # fmt: skip
REFUSALS = {"stablelm": [("fuse_attention", ROTATION_OUTSIDE)] * 2}


@pytest.mark.parametrize("name", by_family(EXPECTED))
def test_the_passes_do_to_a_family_what_the_table_says(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    bundle = exported(name, tmp_path_factory)
    counts = {(entry["graph"], entry["pass"]): entry["count"] for entry in bundle.manifest.passes}
    refusals = [(entry["pass"], refusal["reason"]) for entry in bundle.manifest.passes for refusal in entry["refusals"]]
    operators = [node.op_type for node in ir.load(bundle.folder / "decode.onnx").graph]
    found = tuple(counts["common", step] for step in COMMON_PASSES)
    assert (found, operators.count("RotaryEmbedding"), counts["decode", "fuse_skip_norms"]) == EXPECTED[name]
    assert refusals == REFUSALS.get(name, [])
    assert counts["common", "expand_attention"] == 0
    assert operators.count("GroupQueryAttention") == 2
    assert counts["prefill", "slice_last_logits"] == counts["decode", "single_token"] == 1
