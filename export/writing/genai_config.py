"""genai_config.json: how onnxruntime-genai opens the same folder."""

from __future__ import annotations

from typing import Any

from satchel.export.checkpoint import Checkpoint
from satchel.runtime.bundle.contract import ATTENTION_MASK, INPUT_IDS, LOGITS
from satchel.runtime.bundle.manifest import GraphSpec, Manifest
from satchel.runtime.bundle.plain_graphs import without_custom


def genai_config(checkpoint: Checkpoint, manifest: Manifest) -> dict[str, Any] | None:
    """The configuration, or None where that runner cannot express the model.

    It knows one size of heads for all caches, keys and values alike, and hands a graph the same buffers as past and
    present. It loads no libraries of operators: where the graphs need one it gets those without passes of a user's own.
    Only graphs for the CPU are promised to run there. Where both phases share a session it gets one graph for
    both, as satchel's own runner does. Otherwise it gets both as a pipeline, in which prompts run the first stage and
    further tokens the second.
    """
    if manifest.custom_ops:
        manifest = without_custom(manifest)
    cache, facts = manifest.kv_cache, manifest.model
    sizes = {(layer.kv_heads, size) for layer in cache.layers for size in (layer.key_dim, layer.value_dim)}
    graphs = manifest.graphs
    if len(sizes) != 1 or cache.mode != "shared" or graphs is None or manifest.target != "cpu":
        return None
    ((kv_heads, head_dim),) = sizes
    decoder = {
        "session_options": _session_options(graphs.prefill),
        "head_size": head_dim,
        "hidden_size": checkpoint.fact("hidden_size") or kv_heads * head_dim,
        "num_attention_heads": checkpoint.fact("num_attention_heads") or kv_heads,
        "num_hidden_layers": len(cache.layers),
        "num_key_value_heads": kv_heads,
        "inputs": {
            "input_ids": INPUT_IDS,
            "attention_mask": ATTENTION_MASK,
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": LOGITS,
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
    }
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


def _stage(graph: GraphSpec, *, prompt: bool) -> dict[str, Any]:
    """One stage of a pipeline: the graph for prompts, or that for each token after them."""
    return {
        "filename": graph.file,
        "session_options": _session_options(graph),
        "run_on_prompt": prompt,
        "run_on_token_gen": not prompt,
        "inputs": [tensor.name for tensor in graph.inputs],
        "outputs": [tensor.name for tensor in graph.outputs],
    }


def _session_options(graph: GraphSpec) -> dict[str, Any]:
    """The graph's session entries among that runner's own: it hands over every name that it does not know."""
    return {"log_id": "onnxruntime-genai", "provider_options": [], **graph.session}


def _pad(manifest: Manifest) -> int:
    """The token that fills up a batch, which that runner must be given: any will do for one sequence at a time."""
    facts = manifest.model
    if facts.pad_token_id is not None:
        return facts.pad_token_id
    return facts.eos_token_ids[0] if facts.eos_token_ids else 0
