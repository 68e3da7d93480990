"""Replacements for the attention of families whose own code computes it, some with a bias for distance (ALiBi).

ALiBi (https://arxiv.org/abs/2108.12409) adds a slope of the head times the distance to each score. In a row of scores
the query's position is a constant, which the softmax does not see, so slope times the key's position does the same: one
more element of each key, which the query multiplies with 1. It lies in the KV cache with the key.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

_POSITIONS: contextvars.ContextVar[torch.Tensor] = contextvars.ContextVar("positions")
_WIDTH = 8
"""Elements that are added to a head, so that its size stays a multiple of 8: the bias in two parts, and zeros."""


@contextlib.contextmanager
def at_positions(position_ids: torch.Tensor) -> Iterator[None]:
    """While it is entered, the tokens that attention sees are at `position_ids` [batch, new]."""
    token = _POSITIONS.set(position_ids)
    try:
        yield
    finally:
        _POSITIONS.reset(token)


def has_distance_bias(module: torch.nn.Module) -> bool:
    """Whether attention in a model has a bias for distance."""
    parts: Iterator[Any] = module.modules()
    return any(
        type(part).__name__ in ("BloomAttention", "MptAttention")
        or (type(part).__name__ == "FalconAttention" and part.config.alibi)
        for part in parts
    )


def _attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, scale: float
) -> torch.Tensor:
    """[batch, heads, new, head_dim] each -> [batch, new, heads * head_dim]."""
    out = torch.ops.satchel.attention(query, key, value, None, module.layer_idx, scale, mask.window, mask.chunk, 0.0)
    merged: torch.Tensor = out.flatten(2)
    return merged


def _biased(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, scale: float,
    bias: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """As `_attention`, with `bias` [batch, heads, new] for each key. Both parts of it are numbers of float16."""
    high = bias.half().float()
    width = query.shape[-1]
    zeros = torch.zeros_like(query[..., : _WIDTH - 2])
    ones = torch.ones_like(query[..., :2])
    query = torch.cat([query * scale, ones, zeros], dim=-1)
    key = torch.cat([key, torch.stack([high, bias - high], dim=-1), zeros], dim=-1)
    value = torch.cat([value, torch.zeros_like(value[..., :_WIDTH])], dim=-1)
    out: Any = _attention(module, query, key, value, mask, 1.0)
    narrow: torch.Tensor = out.unflatten(2, (-1, width + _WIDTH))[..., :width].flatten(2)
    return narrow


def _slopes(compute: Callable[[], torch.Tensor]) -> torch.Tensor:
    """The slopes of all heads as a constant, [heads, 1]."""
    with _disable_current_modes(), torch._C.DisableTorchFunction():
        values = compute().flatten().tolist()
    return torch.stack([_POSITIONS.get().new_full((1,), value, dtype=torch.float32) for value in values])


def _bloom(module: Any, hidden: torch.Tensor, residual: torch.Tensor, attention_mask: Any, **_: Any) -> Any:
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    query, key, value = module._reshape(module.query_key_value(hidden))
    slopes = _slopes(lambda: build_alibi_tensor(torch.ones(1, 2), module.num_heads, torch.float32)[..., 1])
    bias = slopes * _POSITIONS.get()[:, None].float()
    out = _biased(module, query, key, value, attention_mask, module.inv_norm_factor, bias)
    return module.dense(out) + residual, None


def _mpt(module: Any, hidden: torch.Tensor, attention_mask: Any, **_: Any) -> Any:
    from transformers.models.mpt import modeling_mpt as mpt

    fused = module.Wqkv(hidden)
    if module.clip_qkv:
        fused = fused.clamp(min=-module.clip_qkv, max=module.clip_qkv)
    heads = (part.unflatten(2, (module.n_heads, module.head_dim)).transpose(1, 2) for part in fused.chunk(3, dim=2))
    query, key, value = heads
    alibi: Any = mpt.build_mpt_alibi_tensor  # untyped in transformers
    slopes = _slopes(lambda: -alibi(module.n_heads, 2)[..., 0])
    bias = slopes * _POSITIONS.get()[:, None].float()
    return module.out_proj(_biased(module, query, key, value, attention_mask, module.softmax_scale, bias)), None


def _falcon(module: Any, hidden: torch.Tensor, attention_mask: Any, position_embeddings: Any = None, **_: Any) -> Any:
    from transformers.models.falcon.modeling_falcon import apply_rotary_pos_emb, build_alibi_tensor

    rotate: Any = apply_rotary_pos_emb  # untyped in transformers
    query, key, value = (part.transpose(1, 2) for part in _falcon_heads(module, module.query_key_value(hidden)))
    if not module.config.alibi:
        query, key = rotate(query, key, *position_embeddings)
        return module.dense(_attention(module, query, key, value, attention_mask, module.inv_norm_factor)), None
    slopes = _slopes(lambda: build_alibi_tensor(torch.ones(1, 2), module.num_heads, torch.float32)[..., 1])
    # transformers multiplies in bfloat16, which rounds the position and the product.
    bias = (slopes * _POSITIONS.get()[:, None].bfloat16().float()).bfloat16().float() * module.inv_norm_factor
    key, value = (part.expand(-1, module.num_heads, -1, -1) for part in (key, value))
    return module.dense(_biased(module, query, key, value, attention_mask, module.inv_norm_factor, bias)), None


def _falcon_heads(module: Any, fused: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Split the fused matrix into query, key and value, [batch, new, heads, head_dim] each."""
    if module.new_decoder_architecture:
        groups = fused.unflatten(2, (module.num_kv_heads, -1, module.head_dim))
        return groups[..., :-2, :].flatten(2, 3), groups[..., -2, :], groups[..., -1, :]
    if module.multi_query:
        heads = fused.unflatten(2, (module.num_heads + 2, module.head_dim))
        return heads[..., :-2, :], heads[..., -2:-1, :], heads[..., -1:, :]
    each = fused.unflatten(2, (module.num_heads, 3, module.head_dim))
    return each[..., 0, :], each[..., 1, :], each[..., 2, :]


def _gptj(module: Any, hidden_states: torch.Tensor, attention_mask: Any, **options: Any) -> Any:
    from transformers.models.gptj import modeling_gptj as gptj

    if not hasattr(module, "_attn"):  # transformers 5.24 calls the attention function of the registry
        return type(module).forward(module, hidden_states, attention_mask=attention_mask, **options)
    position_ids = options["position_ids"]
    rotate: Any = gptj.apply_rotary_pos_emb  # untyped in transformers
    width = module.rotary_dim or module.head_dim
    sin, cos = module.embed_positions[position_ids].chunk(2, dim=-1)
    heads = (
        part(hidden_states).unflatten(2, (-1, module.head_dim))
        for part in (module.q_proj, module.k_proj, module.v_proj)
    )
    query, key, value = heads
    query, key = (torch.cat([rotate(x[..., :width], sin, cos), x[..., width:]], dim=-1) for x in (query, key))
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return module.out_proj(_attention(module, query, key, value, attention_mask, 1 / module.scale_attn)), None


def _codegen_scored(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any
) -> Any:
    """`_attn` of CodeGen: [batch, heads, new, head_dim] each, also the result."""
    out = torch.ops.satchel.attention(
        query,
        key,
        value,
        None,
        module.layer_idx,
        1 / module.scale_attn,
        attention_mask.window,
        attention_mask.chunk,
        0.0,
    )
    return out.transpose(1, 2), None


def _gpt_neo_scored(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any
) -> Any:
    """`_attn` of GPT-Neo, whose scores have no scale; every other layer sees a window."""
    window = module.config.window_size if module.attention_type == "local" else attention_mask.window
    out = torch.ops.satchel.attention(query, key, value, None, module.layer_id, 1.0, window, attention_mask.chunk, 0.0)
    return out.transpose(1, 2), None


def register_classes() -> None:
    """Let families be built for satchel's attention that look their class up by the name of the implementation."""
    from transformers.models.falcon import modeling_falcon as falcon
    from transformers.models.gpt_neo import modeling_gpt_neo as gpt_neo
    from transformers.models.gptj import modeling_gptj as gptj

    for home, name in ((falcon, "FALCON"), (gpt_neo, "GPT_NEO"), (gptj, "GPTJ")):
        classes = getattr(home, f"{name}_ATTENTION_CLASSES", None)
        if classes is not None:
            classes["satchel"] = classes["eager"]


METHODS: dict[tuple[str, str], Callable[..., Any]] = {
    ("BloomAttention", "forward"): _bloom,
    ("MptAttention", "forward"): _mpt,
    ("FalconAttention", "forward"): _falcon,
    ("GPTJAttention", "forward"): _gptj,
    ("CodeGenAttention", "_attn"): _codegen_scored,
    ("GPTNeoSelfAttention", "_attn"): _gpt_neo_scored,
}
"""Replacements for methods of classes of `transformers`, as in `stand_ins.METHODS`."""
