"""The matrices, caches and states of one layer's parts: attention, recurrences, convolutions and feed-forward parts."""

from __future__ import annotations

import dataclasses

from satchel.export.planning.facts import Facts
from satchel.export.planning.shape import Cache, Cut, Matrix, State

BIAS_WIDTH = 8
"""Numbers that a bias for distance adds to a head's key and value, as satchel.export.tracing.own_attention does."""


@dataclasses.dataclass(frozen=True)
class Part:
    """What one part adds to a layer; the fields are those of `shape.Layer`."""

    matrices: tuple[Matrix, ...] = ()
    vectors: int = 0
    cache: Cache | None = None
    states: tuple[State, ...] = ()


def biases(facts: Facts) -> frozenset[str]:
    """Which parts of the model have biases."""
    on = [words for name, words in facts.family.switches.items() if facts.flag(name)]
    return facts.family.biases.union(*on)


def attention(
    facts: Facts,
    heads: int,
    kv_heads: int,
    head_dim: int,
    window: int | None,
    *,
    keys: bool = True,
    values: bool = True,
    biased: bool = False,
) -> Part:
    """Grouped attention; without `keys` it reads those of an earlier layer, without `values` keys are values too.

    Where scores are `biased` for distance, each head has keys of its own in the cache, with the bias in them.
    """
    hidden = facts.count("hidden_size")
    cut = kept = None
    if heads % kv_heads == 0:
        cut, kept = Cut(kv_heads, heads), Cut(kv_heads, heads, keyed=True)
    doubled = 2 if facts.family.doubled_query else 1
    made = [Matrix("self_attn.q_proj", doubled * heads * head_dim, hidden, cut=cut)]
    if keys:
        made.append(Matrix("self_attn.k_proj", kv_heads * head_dim, hidden, cut=kept))
        if values:
            made.append(Matrix("self_attn.v_proj", kv_heads * head_dim, hidden, cut=kept))
    on, vectors = biases(facts), 0
    if "qkv" in on:
        vectors += sum(matrix.outputs for matrix in made)
    norms = facts.family.head_norms
    if norms in ("head", "use_qk_norm") and (norms == "head" or facts.flag("use_qk_norm")):
        vectors += head_dim * (2 if keys else 1)
    if norms == "all" or (facts.flag("use_qk_norm") and norms != "use_qk_norm") or facts.flag("qk_layernorm"):
        vectors += (heads + kv_heads) * head_dim
    if "o" in on:
        vectors += hidden
    vectors += heads if facts.family.experts_bias else 0  # sinks
    made.append(Matrix("self_attn.o_proj", hidden, heads * head_dim, cut=cut))
    sinks = facts.family.experts_bias
    cache = Cache(kv_heads, head_dim, head_dim, window, kept, native=not sinks) if keys else None
    if biased:
        cache = Cache(heads, head_dim + BIAS_WIDTH, head_dim + BIAS_WIDTH, window, Cut(heads))
    return Part(tuple(made), vectors, cache)


def latent(facts: Facts) -> Part:
    """Attention over a latent that all heads share (DeepSeek-V2, arXiv 2405.04434, section 2.1).

    Its cache is the latent with the rotated channels where that is smaller than the keys and values of all heads.
    """
    hidden, heads = facts.count("hidden_size"), facts.count("num_attention_heads")
    rank, rotated = facts.count("kv_lora_rank"), facts.count("qk_rope_head_dim")
    plain, value = facts.count("qk_nope_head_dim"), facts.count("v_head_dim")
    cut = Cut(heads)
    made, vectors = [], rank
    if facts.has("q_lora_rank"):
        low = facts.count("q_lora_rank")
        made += [
            Matrix("self_attn.q_a_proj", low, hidden),
            Matrix("self_attn.q_b_proj", heads * (plain + rotated), low, cut=cut),
        ]
        vectors += low
    else:
        made.append(Matrix("self_attn.q_proj", heads * (plain + rotated), hidden, cut=cut))
    expanded = heads * (plain + rotated + value)
    compressed = rank + rotated < expanded
    made += [
        Matrix("self_attn.kv_a_proj_with_mqa", rank + rotated, hidden),
        # Compressed, attention multiplies by its halves, which stay in float.
        Matrix("self_attn.kv_b_proj", heads * (plain + value), rank, "float" if compressed else "linear", cut),
        Matrix("self_attn.o_proj", hidden, heads * value, cut=cut),
    ]
    if compressed:
        return Part(tuple(made), vectors, Cache(1, rank + rotated, 0, native=False))
    cache = Cache(heads, plain + rotated, value, cut=cut, native=plain + rotated == value)
    return Part(tuple(made), vectors, cache)


def delta(facts: Facts) -> Part:
    """The gated delta rule of Qwen 3.5 (arXiv 2412.06464): a convolution, and a matrix of state for each head."""
    hidden = facts.count("hidden_size")
    key_heads, value_heads = facts.count("linear_num_key_heads"), facts.count("linear_num_value_heads")
    keys = key_heads * facts.count("linear_key_head_dim")
    width = facts.count("linear_value_head_dim")
    values, kernel = value_heads * width, facts.count("linear_conv_kernel_dim", 4)
    cut, kept = Cut(key_heads, value_heads), Cut(key_heads, value_heads, keyed=True)
    channels = 2 * keys + values
    made = (
        Matrix("linear_attn.in_proj_qkv", 2 * keys, hidden, cut=kept),
        Matrix("linear_attn.in_proj_qkv", values, hidden, cut=cut),
        Matrix("linear_attn.in_proj_z", values, hidden, cut=cut),
        Matrix("linear_attn.in_proj_ba", 2 * value_heads, hidden, cut=cut),
        Matrix("linear_attn.out_proj", hidden, values, cut=cut),
    )
    matrix = value_heads * facts.count("linear_key_head_dim") * width
    states = State(2 * keys * (kernel - 1), kept), State(values * (kernel - 1), cut), State(matrix, cut)
    return Part(made, channels * kernel + 2 * value_heads + width, states=states)


def convolution(facts: Facts) -> Part:
    """The short convolution of LFM2 between two gates."""
    hidden, kernel = facts.count("hidden_size"), facts.count("conv_L_cache")
    cut = Cut(hidden)
    made = (Matrix("conv.in_proj", 3 * hidden, hidden, cut=cut), Matrix("conv.out_proj", hidden, hidden, cut=cut))
    bias = 5 * hidden if facts.flag("conv_bias") else 0
    return Part(made, hidden * kernel + bias, states=(State(hidden * (kernel - 1), cut),))


def mamba(facts: Facts) -> Part:
    """A selective state space (Mamba, arXiv 2312.00752)."""
    hidden, states = facts.count("hidden_size"), facts.count("mamba_d_state")
    given = facts.get("intermediate_size") if facts.table.get("model_type") != "jamba" else None
    inner = given or facts.count("mamba_expand") * hidden
    rank = facts.get("mamba_dt_rank", "auto")
    rank = -(-hidden // 16) if rank == "auto" else facts.count("mamba_dt_rank")
    kernel = facts.count("mamba_d_conv")
    made = (
        Matrix("mamba.in_proj", 2 * inner, hidden),
        Matrix("mamba.x_proj", rank + 2 * states, inner),
        Matrix("mamba.dt_proj", inner, rank),
        Matrix("mamba.out_proj", hidden, inner),
    )
    vectors = inner * (kernel + 1) + inner + inner * states + inner
    if facts.table.get("model_type") == "jamba":
        vectors += rank + 2 * states
    if facts.flag("use_bias") or facts.flag("mamba_proj_bias"):
        vectors += 2 * inner + hidden
    return Part(made, vectors, states=(State(inner * (kernel - 1 + states)),))


def mamba2(facts: Facts) -> Part:
    """A state space with one decay for each head (Mamba-2, arXiv 2405.21060)."""
    hidden, states = facts.count("hidden_size"), facts.count("mamba_d_state")
    heads, width = facts.count("mamba_n_heads"), facts.count("mamba_d_head")
    inner, kernel = heads * width, facts.count("mamba_d_conv")
    channels = inner + 2 * facts.count("mamba_n_groups") * states
    made = (
        Matrix("mamba.in_proj", inner + channels + heads, hidden),
        Matrix("mamba.out_proj", hidden, inner),
    )
    vectors = channels * (kernel + 1) + 3 * heads
    if facts.table.get("model_type") != "falcon_h1" or facts.flag("mamba_rms_norm"):
        vectors += inner
    if facts.flag("mamba_proj_bias") or (facts.flag("use_bias") and facts.table.get("model_type") == "mamba2"):
        vectors += made[0].outputs + hidden
    return Part(made, vectors, states=(State(channels * (kernel - 1) + heads * width * states),))


def feed_forward(facts: Facts, width: int, name: str = "mlp") -> Part:
    """A dense feed-forward part."""
    hidden, cut = facts.count("hidden_size"), columns(width)
    first = ("gate_proj", "up_proj") if facts.family.gated else ("up_proj",)
    made = [Matrix(f"{name}.{each}", width, hidden, cut=cut) for each in first]
    made.append(Matrix(f"{name}.down_proj", hidden, width, cut=cut))
    return Part(tuple(made), len(first) * width + hidden if "mlp" in biases(facts) else 0)


def experts(facts: Facts, width: int, shared: int, *, shared_gate: bool = False) -> Part:
    """A mixture of experts of this width, and one that all tokens have, where `shared` is above 0.

    On several devices each has a part of every expert, as of a dense layer.
    """
    hidden, count = facts.count("hidden_size"), facts.count("num_experts")
    active = min(facts.count("num_experts_per_tok"), count)
    cut = columns(width)
    made = [
        Matrix("mlp.gate", count, hidden),
        Matrix("mlp.experts.gate_up_proj", 2 * width, hidden, "experts", cut, count, active),
        Matrix("mlp.experts.down_proj", hidden, width, "experts", cut, count, active),
    ]
    if shared:
        made += feed_forward(facts, shared, "mlp.shared_expert").matrices
    if shared_gate:
        made.append(Matrix("mlp.shared_expert_gate", 1, hidden))
    vectors = count * (1 + 2 * width + hidden) if facts.family.experts_bias else 0
    return Part(tuple(made), vectors)


def columns(width: int, unit: int = 32) -> Cut:
    """How a feed-forward part is divided: in blocks of `unit` columns, so that groups of weights stay whole."""
    return Cut(width // unit if width % unit == 0 else width)
