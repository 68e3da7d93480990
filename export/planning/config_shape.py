"""Reads the sizes of a model from its config, without transformers."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from satchel.export.errors import ExportError
from satchel.export.planning import mixers
from satchel.export.planning.facts import Facts
from satchel.export.planning.families import FAMILIES
from satchel.export.planning.mixers import Part
from satchel.export.planning.shape import Cache, Cut, Layer, Matrix, Shape

MAX_LAYERS = 512
LARGEST_FILE = 64 << 20
FULL, RECURRENT = "full_attention", "linear_attention"
SLIDING = ("sliding_attention", "chunked_attention", "local")
STATES = {
    "delta": (RECURRENT, mixers.delta), "conv": ("conv", mixers.convolution),
    "mamba": (RECURRENT, mixers.mamba), "mamba2": (RECURRENT, mixers.mamba2),
}  # fmt: skip
"""The kind of a layer with a state, and what is in it, by the family's mixer."""
ALIASES = {"attention": FULL, "mamba": RECURRENT, "short_conv": "conv"}


def read_config(path: Path) -> Mapping[str, Any]:
    """The object in a config.json.

    Raises:
        ExportError: It cannot be read, or is not a JSON object.
    """
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise ExportError(f"{path}: is larger than any config.json: pass the config.json of a model")
        table = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ExportError(f"{path}: cannot be read ({error.strerror}): pass a config.json") from None
    except (ValueError, RecursionError):
        raise ExportError(f"{path}: is not JSON: pass the config.json of a model") from None
    if not isinstance(table, dict):
        raise ExportError(f"{path}: holds no JSON object: pass the config.json of a model")
    return table


def shape_of(table: Mapping[str, Any], source: str) -> Shape:
    """The sizes of the causal language model that a config describes; of a multimodal one, of its text model.

    Raises:
        ExportError: The family is not known here, or a setting is missing or impossible.
    """
    inner = table.get("text_config")
    if isinstance(inner, dict) and inner.get("model_type") in FAMILIES:
        table = {**inner, "tie_word_embeddings": inner.get("tie_word_embeddings", table.get("tie_word_embeddings"))}
    kind = table.get("model_type")
    if not isinstance(kind, str) or not kind:
        raise ExportError(f"{source}: has no model_type: use the config.json of the original model")
    if kind not in FAMILIES:
        raise ExportError(
            f"{source}: satchel plan does not know the layers of {kind!r:.60}: docs/planning.md lists those that "
            "it knows; a bundle of any family can be planned"
        )
    facts = Facts(table, FAMILIES[kind], source)
    hidden, vocabulary = facts.count("hidden_size"), facts.count("vocab_size")
    count = facts.count("num_hidden_layers") if kind != "nemotron_h" else len(_kinds(facts, 0))
    if count > MAX_LAYERS:
        raise ExportError(f"{source}: num_hidden_layers is {count}: no model has more than {MAX_LAYERS}")
    layers = tuple(_layer(facts, kinds, index) for index, kinds in enumerate(_kinds(facts, count)))
    layers = _shared_caches(facts, layers, _kinds(facts, count))
    embedding = Matrix("embed_tokens", vocabulary, hidden, "embedding", Cut(vocabulary))
    tied = facts.get("tie_word_embeddings", facts.family.tied)
    head = None if tied else dataclasses.replace(embedding, layer="lm_head", kind="head")
    context = facts.count("max_position_embeddings", 1 << 20 if kind in ("mamba", "mamba2", "falcon_mamba") else None)
    vectors = vocabulary if "head" in mixers.biases(facts) and not tied else 0
    if facts.family.positions is not None:
        vectors += (context + facts.family.positions) * hidden
    if kind == "bloom":
        vectors += 2 * hidden  # the norm behind the embedding
    norms = facts.family.norm * hidden
    extra = _extra(facts, layers)
    return Shape(
        kind, hidden, vocabulary, context, layers, embedding, head, norms, vectors + extra, _rotary(facts, layers)
    )


def _kinds(facts: Facts, layers: int) -> tuple[str, ...]:
    """The kind of each layer: "full_attention", "sliding_attention", or that of another mixer."""
    named = facts.get("layer_types") or facts.get("layers_block_type")
    if named is not None:
        if not isinstance(named, list) or (layers and len(named) < layers):
            raise ExportError(f"{facts.source}: layer_types does not name the kind of {layers} layers: {named!r:.80}")
        found = tuple(ALIASES.get(str(kind), str(kind)) for kind in named[: layers or None])
        unknown = set(found) - {FULL, RECURRENT, "conv", "mlp", *SLIDING}
        if unknown:
            raise ExportError(f"{facts.source}: layers of kind {min(unknown)!r:.40} are not known to satchel plan")
        return found
    kind, full = facts.table.get("model_type"), FULL
    if kind == "nemotron_h":
        letters = {"M": RECURRENT, "*": FULL, "-": "mlp"}
        pattern = str(facts.get("hybrid_override_pattern", ""))
        if not pattern or set(pattern) - set(letters):
            raise ExportError(f"{facts.source}: hybrid_override_pattern is {pattern!r}: its layers are not known here")
        return tuple(letters[letter] for letter in pattern)
    if kind in ("mamba", "mamba2", "falcon_mamba"):
        return (RECURRENT,) * layers
    if kind == "falcon_h1":
        return ("both",) * layers
    if kind == "bamba":
        attends = facts.get("attn_layer_indices", [])
        return tuple(full if index in attends else RECURRENT for index in range(layers))
    if kind == "jamba":
        period, offset = facts.count("attn_layer_period"), facts.count("attn_layer_offset", least=0)
        return tuple(full if index % period == offset else RECURRENT for index in range(layers))
    if kind in ("lfm2", "lfm2_moe"):
        attends = facts.get("full_attn_idxs") or range(layers)
        return tuple(full if index in attends else "conv" for index in range(layers))
    if facts.has("full_attention_interval"):
        period = facts.count("full_attention_interval")
        return tuple(full if index % period == period - 1 else RECURRENT for index in range(layers))
    if facts.has("sliding_window_pattern") and facts.has("sliding_window"):
        period = facts.get("sliding_window_pattern")
        period = len(period) if isinstance(period, str) else facts.count("sliding_window_pattern")
        return tuple(full if index % period == period - 1 else "sliding_attention" for index in range(layers))
    if kind in ("gemma2", "gpt_oss"):
        return tuple(("sliding_attention", full)[index % 2] for index in range(layers))
    if kind == "gpt_neo":
        return tuple((FULL, "local")[index % 2] for index in range(layers))
    windowed = facts.has("sliding_window") and facts.get("use_sliding_window", True) is not False
    every = kind in ("mistral", "ministral", "mixtral", "starcoder2", "phi3")
    return ("sliding_attention" if windowed and every else full,) * layers


def _layer(facts: Facts, kind: str, index: int) -> Layer:
    facts = facts.of_layer(index)
    family, model = facts.family, facts.table.get("model_type")
    parallel = facts.flag(family.parallel) if isinstance(family.parallel, str) else family.parallel
    parts = []
    marked, mixer = STATES.get(family.mixer, ("", mixers.delta))
    if kind in (marked, "both"):
        parts.append(mixer(facts))
    if kind not in (marked, "mlp") or kind == "both":
        parts.append(_attention(facts, kind, index))
    mixed = len(parts)
    if model not in ("nemotron_h", "mamba", "mamba2", "falcon_mamba") or kind == "mlp":
        parts.append(_feed_forward(facts, index))
    norms = family.norms
    if parallel and model in ("stablelm", "falcon"):
        norms = 2 if facts.flag("new_decoder_architecture") else 1
    hidden = facts.count("hidden_size")
    more, vectors = _per_layer(facts)
    cache = next((part.cache for part in parts if part.cache is not None), None)
    return Layer(
        matrices=tuple(matrix for part in parts for matrix in part.matrices) + more,
        norms=norms * family.norm * hidden,
        vectors=sum(part.vectors for part in parts) + vectors,
        reductions=1 if parallel else min(mixed, 1) + len(parts) - mixed,
        cache=cache,
        reads=cache,
        states=tuple(state for part in parts for state in part.states),
    )


def _attention(facts: Facts, kind: str, index: int) -> Part:
    if facts.has("kv_lora_rank"):
        return mixers.latent(facts)
    heads, model = facts.count("num_attention_heads"), facts.table.get("model_type")
    kv_heads = facts.count("num_key_value_heads", heads)
    if model == "falcon" and not facts.flag("new_decoder_architecture"):
        kv_heads = 1 if facts.flag("multi_query") else heads
    elif model == "gpt_bigcode":
        kv_heads = 1 if facts.get("multi_query", True) else heads
    elif model in ("gpt2", "gpt_neo", "gptj", "codegen", "bloom", "mpt", "gpt_neox", "opt"):
        kv_heads = heads
    own = model not in ("stablelm", "gpt2", "gpt_neo", "gptj", "codegen", "bloom", "mpt", "gpt_neox", "opt", "falcon")
    width = facts.count("hidden_size") // heads
    head_dim = facts.count("head_dim", width) if own else width
    if head_dim < 1 or kv_heads > heads:
        raise ExportError(
            f"{facts.source}: {heads} heads with {kv_heads} for keys do not fit into hidden_size "
            f"{facts.count('hidden_size')}: use the config.json of the original model"
        )
    window = None
    if kind in SLIDING:
        window = facts.count("window_size" if kind == "local" else "sliding_window", 256 if kind == "local" else None)
    keys = values = True
    if model == "gemma4_text" and kind == FULL:
        head_dim, values = facts.count("global_head_dim", head_dim), not facts.flag("attention_k_eq_v")
        kv_heads = facts.count("num_global_key_value_heads", kv_heads) if not values else kv_heads
    if facts.has("num_kv_shared_layers"):
        keys = index < facts.count("num_hidden_layers") - facts.count("num_kv_shared_layers", least=0)
    biased = facts.family.distances or facts.flag("alibi")
    return mixers.attention(facts, heads, kv_heads, head_dim, window, keys=keys, values=values, biased=biased)


def _feed_forward(facts: Facts, index: int) -> Part:
    model = facts.table.get("model_type")
    named = facts.family.width
    width = facts.get(named)
    if isinstance(width, list) and index < len(width):
        return mixers.feed_forward(facts, int(width[index]))
    if width is None and (named != "intermediate_size" or model == "gpt_neo"):
        return mixers.feed_forward(facts, facts.count("expansion_ratio", 4) * facts.count("hidden_size"))
    if model != "nemotron_h" and facts.has("num_experts") and _is_sparse(facts, index):
        return _experts(facts)
    if model == "granitemoehybrid":
        return mixers.feed_forward(facts, facts.count("shared_intermediate_size"))
    width = facts.count(named)
    if model == "lfm2" and facts.flag("block_auto_adjust_ff_dim"):
        width = int(facts.get("block_ffn_dim_multiplier", 1.0) * int(2 * width / 3))
        multiple = facts.count("block_multiple_of")
        width = -(-width // multiple) * multiple
    if facts.flag("use_double_wide_mlp") and facts.has("num_kv_shared_layers"):
        first = facts.count("num_hidden_layers") - facts.count("num_kv_shared_layers", least=0)
        width *= 2 if index >= first > 0 else 1
    return mixers.feed_forward(facts, width)


def _is_sparse(facts: Facts, index: int) -> bool:
    kinds = facts.get("mlp_layer_types")
    if isinstance(kinds, list) and index < len(kinds):
        return bool(kinds[index] == "sparse")
    if facts.get("num_experts") == 0 or index in (facts.get("mlp_only_layers") or ()):
        return False
    if facts.has("expert_layer_period"):
        return index % facts.count("expert_layer_period") == facts.count("expert_layer_offset", least=0)
    step = facts.count("decoder_sparse_step", 1)
    return index >= facts.count("first_k_dense_replace", 0, least=0) and (index + 1) % step == 0


def _experts(facts: Facts) -> Part:
    width = facts.count("moe_intermediate_size", facts.get("intermediate_size"))
    shared = facts.count("shared_expert_intermediate_size", facts.get("shared_intermediate_size", 0), least=0)
    gate = facts.has("shared_expert_intermediate_size")
    if facts.has("num_shared_experts"):
        shared = width * facts.count("num_shared_experts", least=0)
    return mixers.experts(facts, width, shared, shared_gate=gate)


def _per_layer(facts: Facts) -> tuple[tuple[Matrix, ...], int]:
    """Gemma 3n and 4: an input of its own for each layer; Gemma 3n: a low rank beside attention, several streams."""
    model, hidden = facts.table.get("model_type"), facts.count("hidden_size")
    if model not in ("gemma3n_text", "gemma4_text") or not facts.get("hidden_size_per_layer_input"):
        return (), 0
    own = facts.count("hidden_size_per_layer_input")
    made = [Matrix("per_layer_input_gate", own, hidden), Matrix("per_layer_projection", hidden, own)]
    vectors = hidden
    if model == "gemma3n_text":
        rank, streams = facts.count("laurel_rank"), facts.count("altup_num_inputs")
        made += [Matrix("laurel.linear_left", rank, hidden), Matrix("laurel.linear_right", hidden, rank)]
        vectors += hidden + 2 * hidden + streams * hidden + streams**2 + streams**3
    return tuple(made), vectors


def _extra(facts: Facts, layers: tuple[Layer, ...]) -> int:
    """Numbers outside of layers that inputs of single layers need; they count as vectors, which each device has."""
    if not _per_layer(facts)[0]:
        return 0
    own, hidden = facts.count("hidden_size_per_layer_input"), facts.count("hidden_size")
    rows = facts.count("vocab_size_per_layer_input", facts.count("vocab_size"))
    total = rows * own * len(layers) + own * len(layers) * hidden + own
    if facts.table.get("model_type") == "gemma3n_text":
        total += 2 * (facts.count("altup_num_inputs") - 1) * hidden**2
    return total


def _shared_caches(facts: Facts, layers: tuple[Layer, ...], kinds: tuple[str, ...]) -> tuple[Layer, ...]:
    """The layers, in which those without a cache read that of the last layer of the same kind before them."""
    last: dict[str, Cache] = {}
    found = []
    for layer, kind in zip(layers, kinds, strict=True):
        if layer.cache is not None:
            last[kind] = layer.cache
        elif facts.has("num_kv_shared_layers") and kind in last:
            layer = dataclasses.replace(layer, reads=last[kind])
        found.append(layer)
    return tuple(found)


def _rotary(facts: Facts, layers: tuple[Layer, ...]) -> int:
    """Numbers in the tables of cosines and sines for one position; one pair of tables for each width."""
    if not facts.family.angles or facts.flag("alibi"):
        return 0
    wide = 2 if facts.family.wide_angles else 1
    part = facts.get("partial_rotary_factor", facts.get("rotary_pct", 1.0))
    rope = facts.get("rope_parameters")
    if isinstance(rope, dict):
        part = rope.get("partial_rotary_factor", part)
    if facts.has("kv_lora_rank"):
        return wide * facts.count("qk_rope_head_dim")
    widths = {layer.cache.key_dim for layer in layers if layer.cache is not None}
    if not isinstance(part, int | float) or not 0 <= part <= 1:
        raise ExportError(f"{facts.source}: partial_rotary_factor is {part!r}: it must be from 0 to 1")
    tables = 2 if isinstance(rope, dict) and SLIDING[0] in rope and len(widths) == 1 else 1
    return sum(int(width * part) for width in widths) * tables * wide
