"""A traced graph in which tokens meet outside attention is refused, whatever the operator."""

from __future__ import annotations

import onnx_ir as ir
import pytest
from support.graphs import build, normal

from satchel.export.errors import ExportError
from satchel.export.tracing.soundness import check_sound

# x -> one attention layer -> BETWEEN -> head; q is [batch, heads, sequence, 4], mixed [batch, sequence, 8].
TEXT = """(int64[batch,sequence] input_ids, int64[batch,total] attention_mask)
    => (float[batch,sequence,9] logits)
    <int64[4] heads = {0, 0, 2, 4}, int64[3] flat = {0, 0, 8}, int64[1] last = {-1}, int64[1] two = {2},
     int64[1] zero = {0}, int64[1] one = {1}, int64[1] end = {9223372036854775807}, int64 index = {-1},
     int64[3] pairs = {0, -1, 16}, int64[3] whole = {0, 0, 8}, float half = {0.5},
     float[batch,sequence,2,4] attended, float[batch,sequence,2,4] r, float[batch,sequence,2,4] d,
     float[batch,sequence,8] v> {
    x = Gather(table, input_ids)
    spread = Reshape(x, heads)
    q = Transpose<perm = [0, 2, 1, 3]>(spread)
    attended = satchel.Attention<layer = 0, scale = 1.0, window = 0, softcap = 0.0>(q, q, q)
    mixed = Reshape(attended, flat)
    BETWEEN
    logits = MatMul(y, head)
}"""
SOUND = {
    "nothing": "y = Mul(mixed, half)",
    "channels halved and joined": "a, b = Split<axis = -1, num_outputs = 2>(mixed) y = Concat<axis = 2>(b, a)",
    "channels cut": "a = Slice(mixed, zero, two, last) b = Slice(mixed, two, end, last) y = Concat<axis = -1>(b, a)",
    "softmax over channels": "y = Softmax(mixed)",
    "a norm": "m = ReduceMean(mixed, last) y = Sub(mixed, m)",
    "streams summed": (
        "a = Unsqueeze(mixed, zero) b = Neg(a) c = Concat<axis = 0>(a, b, a) y = ReduceSum<keepdims = 0>(c, zero)"
    ),
    "streams of one token mixed by its own matrix": (
        "c = Reshape(mixed, heads) t = Transpose<perm = [0, 1, 3, 2]>(c) m = MatMul(c, t) n = MatMul(m, c)"
        " y = Reshape(n, flat)"
    ),
    "a causal convolution": "y = satchel.Convolution<layer = 0, silu = 1>(mixed, taps)",
    "a linear recurrence": (
        "c = Reshape(mixed, heads) r = satchel.Recurrence<layer = 0, scale = 1.0>(c, c, c) y = Reshape(r, flat)"
    ),
    "the batch size of the mask": "n = Shape<start = 0, end = 1>(attention_mask) m = Cast<to = 1>(n) y = Mul(mixed, m)",
}
UNSOUND = {
    "the token before": ("a = Slice(mixed, one, end, one) y = Concat<axis = 1>(a, a)", "Slice is along the token axis"),
    "tokens of one head": (
        "a = Slice(q, one, end, two) b = Transpose<perm = [0, 2, 1, 3]>(a) c = Reshape(b, flat) y = Add(mixed, c)",
        "Slice is along the token axis",
    ),
    "the last token": ("a = Gather<axis = 1>(mixed, last) y = Add(mixed, a)", "Gather is along the token axis"),
    "shifted ids": (
        "a = Slice(input_ids, zero, last, one) b = Gather(table, a) y = Add(mixed, b)",
        "Slice is along the token axis",
    ),
    "tokens joined": ("y = Concat<axis = 1>(mixed, mixed)", "Concat is along the token axis"),
    "two tokens as one": ("a = Reshape(mixed, pairs) b = Neg(a) y = Reshape(b, whole)", "Reshape"),
    "the mean of all tokens": ("m = ReduceMean(mixed, one) y = Sub(mixed, m)", "along an axis"),
    "softmax over tokens": ("y = Softmax<axis = 1>(mixed)", "along an axis"),
    "softmax over tokens moved last": (
        "a = Transpose<perm = [0, 2, 1]>(mixed) b = Softmax(a) y = Transpose<perm = [0, 2, 1]>(b)",
        "along an axis",
    ),
    "attention by hand": (
        "t = Transpose<perm = [0, 2, 1]>(mixed) s = MatMul(mixed, t) y = MatMul(s, mixed)",
        "MatMul multiplies two computed tensors",
    ),
    "a running sum": ("y = CumSum(mixed, index)", "the operator CumSum may work across tokens"),
    "the padding mask": (
        "f = Cast<to = 1>(attention_mask) m = ReduceSum(f, last) n = Unsqueeze(m, last) y = Mul(mixed, n)",
        "the padding mask outside its attention",
    ),
    "a length as a number": (
        "n = Shape<start = 1, end = 2>(mixed) m = Cast<to = 1>(n) y = Mul(mixed, m)",
        "sequence length",
    ),
    "the length of the mask": (
        "n = Shape<start = 1, end = 2>(attention_mask) m = Cast<to = 1>(n) y = Mul(mixed, m)",
        "the padding mask outside its attention",
    ),
}


KINDS = {
    "nothing": "y = Mul(mixed, half)",
    "conv": "y = satchel.Convolution<layer = 1, silu = 0>(mixed, taps)",
    "linear_attention": (
        "c = Reshape(mixed, heads) r = satchel.Recurrence<layer = 1, scale = 1.0>(c, c, c) y = Reshape(r, flat)"
    ),
    "a convolution and a recurrence": (
        "v = satchel.Convolution<layer = 1, silu = 0>(mixed, taps) d = Reshape(v, heads)"
        " r = satchel.Recurrence<layer = 1, scale = 1.0>(d, d, d) y = Reshape(r, flat)"
    ),
    "two recurrences": (
        "c = Reshape(mixed, heads) r = satchel.Recurrence<layer = 1, scale = 1.0>(c, c, c)"
        " d = satchel.Recurrence<layer = 1, scale = 1.0>(r, r, r) y = Reshape(d, flat)"
    ),
}
"""What the second layer does."""


def graph(between: str) -> ir.Model:
    weights = {"table": normal(1, 9, 8), "head": normal(2, 8, 9), "taps": normal(3, 8, 4)}
    return build(TEXT.replace("BETWEEN", between), **weights)


@pytest.mark.parametrize("between", SOUND.values(), ids=SOUND)
def test_what_each_token_does_alone_is_sound(between: str) -> None:
    check_sound(graph(between), "tiny", 1)


@pytest.mark.parametrize(("between", "reason"), UNSOUND.values(), ids=UNSOUND)
def test_tokens_that_meet_outside_attention_are_refused(between: str, reason: str) -> None:
    with pytest.raises(ExportError) as caught:
        check_sound(graph(between), "tiny", 1)
    assert str(caught.value).startswith("tiny: ")
    assert reason in str(caught.value)


@pytest.mark.parametrize("layers", [0, 2])
def test_another_number_of_attention_layers_than_promised_is_refused(layers: int) -> None:
    with pytest.raises(ExportError, match=rf"tiny: 1 .* {layers} "):
        check_sound(graph(SOUND["nothing"]), "tiny", layers)


@pytest.mark.parametrize(
    ("second", "kinds"),
    [
        ("conv", ()),
        ("linear_attention", ()),
        ("conv", ("full_attention", "conv")),
        ("linear_attention", ("full_attention", "linear_attention")),
        ("a convolution and a recurrence", ("full_attention", "linear_attention")),
        ("nothing", ("full_attention", "moe")),
    ],
)
def test_layers_of_the_kinds_that_the_config_has_are_sound(second: str, kinds: tuple[str, ...]) -> None:
    check_sound(graph(KINDS[second]), "tiny", 2, kinds)


@pytest.mark.parametrize(
    ("second", "kinds", "fact"),
    [
        ("nothing", (), "1 attention layers were traced (indices [0]) where 2"),
        ("nothing", ("full_attention", "linear_attention"), "0 recurrence layers were traced (indices []) where 1"),
        ("nothing", ("full_attention", "conv"), "0 convolution layers"),
        ("conv", ("full_attention", "full_attention"), "(indices [0, 1])"),
        ("conv", ("full_attention", "linear_attention"), "0 recurrence layers"),
        ("linear_attention", ("linear_attention", "full_attention"), "(indices [1])"),
        ("two recurrences", ("full_attention", "linear_attention"), "2 recurrence layers were traced (indices [1, 1])"),
        ("two recurrences", (), "2 recurrence layers were traced (indices [1, 1])"),
    ],
)
def test_layers_of_other_kinds_than_the_config_has_are_refused(second: str, kinds: tuple[str, ...], fact: str) -> None:
    with pytest.raises(ExportError) as caught:
        check_sound(graph(KINDS[second]), "tiny", 2, kinds)
    assert fact in str(caught.value)
