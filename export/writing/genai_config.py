"""genai_config.json: lets onnxruntime-genai open the bundle's folder."""

from __future__ import annotations

from typing import Any

from satchel.export.checkpoint import Checkpoint
from satchel.runtime.bundle.contract import ATTENTION_MASK, CONV, INPUT_IDS, LOGITS, RECURRENT
from satchel.runtime.bundle.graph_specs import GraphSpec
from satchel.runtime.bundle.manifest import Manifest
from satchel.runtime.bundle.plain_graphs import without_custom

LAYER_TYPES = {
    frozenset({"attention"}): "full_attention",
    frozenset({CONV}): "conv",
    frozenset({CONV, RECURRENT}): "linear_attention",
}
"""What a layer keeps, in the words of onnxruntime-genai."""


def genai_config(checkpoint: Checkpoint, manifest: Manifest) -> dict[str, Any] | None:
    """Return the configuration, or None if onnxruntime-genai cannot run the model.

    It supports a single head size for all keys and values, and passes the same buffers as past and present. It does not
    load custom operators: if the graphs need them, it gets the graphs without custom passes. Only graphs for the CPU
    are supported. If both phases share a session, it gets one graph for both, as in satchel's runner; otherwise it gets
    a pipeline, in which the first stage runs prompts and the second runs further tokens. It finds a convolution without
    a recurrence only where `layer_types` says what each layer keeps, and then each must keep one of `LAYER_TYPES`.
    """
    if manifest.custom_ops:
        manifest = without_custom(manifest)
    cache, facts, graphs = manifest.kv_cache, manifest.model, manifest.graphs
    sizes = {(layer.kv_heads, size) for layer in cache.layers for size in (layer.key_dim, layer.value_dim)}
    types = _layer_types(manifest)
    listed = LAYER_TYPES[frozenset({CONV})] in types
    if len(sizes) > 1 or cache.mode != "shared" or graphs is None or manifest.target != "cpu":
        return None
    if not types or (listed and None in types):
        return None
    kv_heads, head_dim = next(iter(sizes), (1, 1))
    kinds = sorted({state.kind for state in manifest.states})
    decoder = {
        "session_options": _session_options(graphs.prefill),
        "head_size": head_dim,
        "hidden_size": checkpoint.fact("hidden_size") or kv_heads * head_dim,
        "num_attention_heads": checkpoint.fact("num_attention_heads") or kv_heads,
        "num_hidden_layers": len(types),
        "num_key_value_heads": kv_heads,
        "inputs": {
            "input_ids": INPUT_IDS,
            "attention_mask": ATTENTION_MASK,
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
            **{f"past_{kind}_names": f"past.%d.{kind}" for kind in kinds},
        },
        "outputs": {
            "logits": LOGITS,
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
            **{f"present_{kind}_names": f"present.%d.{kind}" for kind in kinds},
        },
    }
    if listed:
        decoder["layer_types"] = types
    one_session = graphs.decode.session_of == "prefill"
    if one_session:
        decoder["filename"] = graphs.prefill.file
    else:
        decoder["pipeline"] = [
            {"prefill": _stage(graphs.prefill, prompt=True)},
            {"decode": _stage(graphs.decode, prompt=False)},
        ]
    model: dict[str, Any] = {
        "type": "decoder" if one_session else "decoder-pipeline",
        "vocab_size": facts.vocab_size,
        "context_length": facts.max_context,
        "pad_token_id": _pad(manifest),
        "decoder": decoder,
    }
    if facts.eos_token_ids:
        model["eos_token_id"] = list(facts.eos_token_ids)
    if facts.bos_token_id is not None:
        model["bos_token_id"] = facts.bos_token_id
    search = {"do_sample": False, "max_length": facts.max_context, "min_length": 0, "past_present_share_buffer": True}
    return {"model": model, "search": search}


def _layer_types(manifest: Manifest) -> list[str | None]:
    """Return what each layer keeps, in the words of that runner, which has none for other combinations: None."""
    kept: dict[int, set[str]] = {}
    for layer in manifest.kv_cache.layers:
        kept.setdefault(int(layer.past_key.split(".")[1]), set()).add("attention")
    for state in manifest.states:
        kept.setdefault(state.layer, set()).add(state.kind)
    return [LAYER_TYPES.get(frozenset(kept.get(index, ()))) for index in range(max(kept, default=-1) + 1)]


def _stage(graph: GraphSpec, *, prompt: bool) -> dict[str, Any]:
    """Return one stage of a pipeline: the graph for prompts, or the graph for each further token."""
    return {
        "filename": graph.file,
        "session_options": _session_options(graph),
        "run_on_prompt": prompt,
        "run_on_token_gen": not prompt,
        "inputs": [tensor.name for tensor in graph.inputs],
        "outputs": [tensor.name for tensor in graph.outputs],
    }


def _session_options(graph: GraphSpec) -> dict[str, Any]:
    """Merge the graph's session entries with its own options: it passes unknown names on to ONNX Runtime."""
    return {"log_id": "onnxruntime-genai", "provider_options": [], **graph.session}


def _pad(manifest: Manifest) -> int:
    """Return the padding token, which is required, though unused with one sequence at a time."""
    facts = manifest.model
    if facts.pad_token_id is not None:
        return facts.pad_token_id
    return facts.eos_token_ids[0] if facts.eos_token_ids else 0
