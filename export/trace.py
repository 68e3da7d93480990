"""A module on meta tensors -> one ONNX graph in standard operators and two internal ones.

The graph maps `input_ids` and `position_ids` [batch, sequence] to `logits` [batch, sequence, vocabulary] for the new tokens only. What depends on earlier
tokens stands in it as `satchel::Attention`, once per layer; the graph passes give that operator its KV cache later. Nothing of a
model's code is changed: `transformers` lets attention, masks and experts be replaced by name, and rotary modules are read out as tables.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch.utils._python_dispatch import _disable_current_modes

from satchel.export import torch_ops
from satchel.export.errors import ExportError
from satchel.graphs import signature

IMPLEMENTATION = "satchel"
"""The name under which attention, masks and experts are registered with `transformers`."""

OPSET = 24
"""The version of ONNX's standard operators in the graph: the first with TensorScatter."""

HARMLESS = {
    "position_ids",
    "cache_position",
    "use_cache",
    "output_attentions",
    "sliding_window",
    "dropout",
    "is_causal",
    "deterministic",
}
"""Keyword arguments of an attention call that say nothing which the mask or the graph does not say already."""


@dataclasses.dataclass(frozen=True)
class Mask:
    """Stands in for a mask tensor during the trace: causal, and limited to the last `window` positions (0: no limit).

    A model that computes with its mask fails on this object, and is refused, instead of losing what it computed.
    """

    window: int


@dataclasses.dataclass(frozen=True)
class Trace:
    """What a trace gives: the graph, whose initialisers have no values yet, and the values of those that no checkpoint holds, by name."""

    model: ir.Model
    constants: dict[str, np.ndarray]


def trace(module: torch.nn.Module, name: str, capacity: int, protocol: bool = False) -> Trace:
    """Trace `module` for any batch and sequence length.

    Args:
        module: Parameters on the meta device (or real); non-persistent buffers real, on the CPU.
        name: What to call the model in messages.
        capacity: Number of positions for which rotary tables are made; scaling rules that depend on the length (longrope, dynamic) see this one.
        protocol: True for a module of the user's own, whose forward takes the attention function as an argument.

    Raises:
        ExportError: The model does something that a decoder with a KV cache cannot express, or that torch cannot trace.
    """
    register_implementations()
    wrapper: torch.nn.Module = _ProtocolWrapper(module) if protocol else _ModelWrapper(module, name)
    # Three tensors, not one three times: the tracer takes the same tensor for the same input.
    device = next((p.device for p in module.parameters()), torch.device("meta"))
    examples = tuple(torch.zeros(2, length, dtype=torch.int64, device=device) for length in (7, 7, 11))
    batch, sequence, total = (torch.export.Dim(n) for n in (signature.BATCH, signature.SEQUENCE, signature.TOTAL))
    dims = ({0: batch, 1: sequence}, {0: batch, 1: sequence}, {0: batch, 1: total})
    with _quiet(), _tables_for_rotary(module, capacity), _buffers_on(device, module) as values, torch.no_grad():
        try:
            program = torch.export.export(wrapper, examples, dynamic_shapes=dims, strict=False)
            onnx_program = torch.onnx.export(
                program,
                dynamo=True,
                optimize=False,
                verbose=False,
                opset_version=OPSET,
                custom_translation_table=torch_ops.TRANSLATIONS,
            )
        except ExportError:
            raise
        except (
            RuntimeError,
            TypeError,
            ValueError,
            AttributeError,
            NotImplementedError,
            KeyError,
            torch.onnx.OnnxExporterError,
        ) as error:
            raise ExportError(f"{name}: torch cannot trace this model: {_root_cause(error)}") from error
    if onnx_program is None:
        raise ExportError(f"{name}: torch gave no graph for this model")
    model = onnx_program.model
    for value, wanted in zip(
        model.graph.inputs, (signature.INPUT_IDS, signature.POSITION_IDS, signature.ATTENTION_MASK), strict=True
    ):
        value.name = wanted
    model.graph.outputs[0].name = signature.LOGITS
    _name_dimensions(model)
    return Trace(model, dict(values))


def _name_dimensions(model: ir.Model) -> None:
    """Call the tracer's symbols by what they are, wherever they stand."""
    ids, _, mask = (value.shape for value in model.graph.inputs)
    if ids is None or mask is None:
        return
    names = {_symbol(ids[0]): signature.BATCH, _symbol(ids[1]): signature.SEQUENCE, _symbol(mask[1]): signature.TOTAL}
    for value in [*model.graph.inputs, *(v for node in model.graph for v in node.outputs)]:
        if value.shape is not None:
            value.shape = ir.Shape(
                [d if isinstance(d, int) else names.get(_symbol(d), d.value) for d in value.shape.dims]
            )


def _symbol(dim: int | ir.SymbolicDim) -> str:
    return str(dim if isinstance(dim, int) else dim.value)


class _ModelWrapper(torch.nn.Module):
    """Calls a `transformers` model with explicit positions and without a cache of its own."""

    def __init__(self, module: torch.nn.Module, name: str) -> None:
        super().__init__()
        if "position_ids" not in inspect.signature(module.forward).parameters:
            raise ExportError(
                f"{name}: this model takes no position_ids, so its positions cannot follow a KV cache; satchel does not support it"
            )
        self.module = module

    def forward(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> torch.Tensor:
        # The mask keeps transformers from guessing packed sequences out of position_ids; no graph may use it.
        result = self.module(
            input_ids=input_ids, position_ids=position_ids, attention_mask=attention_mask, use_cache=False
        )
        logits: torch.Tensor = result.logits
        return logits


class _ProtocolWrapper(torch.nn.Module):
    """Calls a module of the user's own with the attention function that the protocol promises."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> torch.Tensor:
        layers = iter(range(1 << 30))

        def attention(
            query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *,
            scale: float | None = None, window: int | None = None, softcap: float | None = None,
        ) -> torch.Tensor:  # fmt: skip
            scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
            out = torch.ops.satchel.attention(query, key, value, next(layers), scale, window or 0, softcap or 0.0)
            return out.transpose(1, 2)

        logits: torch.Tensor = self.module(input_ids, position_ids, attention)
        return logits


def register_implementations() -> None:
    """Make satchel's attention, mask and experts known to `transformers`; doing it again changes nothing."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    AttentionInterface.register(IMPLEMENTATION, _attention)
    AttentionMaskInterface.register(IMPLEMENTATION, _mask)
    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _experts)


def _attention(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any,
    scaling: float | None = None, softcap: float | None = None, **kwargs: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """The attention function that `transformers` calls: query [batch, heads, new, head_dim] -> [batch, new, heads, head_dim]."""
    where = type(module).__name__
    if not isinstance(attention_mask, Mask):
        raise ExportError(
            f"{where}: its attention gets a mask of its own making ({type(attention_mask).__name__}); satchel knows causal masks and windows only"
        )
    unknown = sorted(k for k, v in kwargs.items() if k not in HARMLESS and v is not None and v is not False)
    if unknown:
        raise ExportError(
            f"{where}: its attention uses {', '.join(unknown)}, which satchel cannot carry over; this family is not supported"
        )
    if kwargs.get("is_causal") is False:
        raise ExportError(
            f"{where}: its attention looks ahead (is_causal=False); satchel exports causal language models only"
        )
    layer = getattr(module, "layer_idx", None)
    if layer is None:
        raise ExportError(f"{where}: its attention does not know its layer index, so its KV cache cannot be named")
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    out = torch.ops.satchel.attention(
        query, key, value, int(layer), scale, attention_mask.window, float(softcap or 0.0)
    )
    return out, None


def _mask(mask_function: Callable[..., Any], local_size: int | None = None, **_: Any) -> Mask:
    """The mask function that `transformers` calls: finds out by trying whether `mask_function` is causal, with or without a window."""
    window = int(local_size or 0)
    reach = window or 1 << 20
    query = reach + 3
    with _disable_current_modes(), torch._C.DisableTorchFunction():
        keys = torch.tensor([0, query - reach, query - reach + 1, query - 1, query, query + 1])
        wanted = (keys <= query) & (keys > query - (window or query + 1))
        zero = torch.zeros_like(keys)
        try:
            found = mask_function(zero, zero, torch.full_like(keys, query), keys)
            same = torch.equal(torch.as_tensor(found).broadcast_to(wanted.shape), wanted)
        except (RuntimeError, TypeError, AttributeError, IndexError):
            same = False
    if not same:
        raise ExportError(
            "the model asks for a mask that is neither causal nor a sliding window (chunked, packed or bidirectional); satchel does not support it"
        )
    return Mask(window)


def _experts(
    module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The experts function that `transformers` calls: [tokens, hidden] and the chosen experts' indices and weights [tokens, k] -> [tokens, hidden]."""
    where = type(module).__name__
    beyond = {
        "biases": module.has_bias,
        "transposed weights": module.is_transposed,
        "interleaved gates": not module.is_concatenated,
        "no gate": not module.has_gate,
        "a norm after each expert": module.has_post_expert_norm,
        "a gate of its own": "_apply_gate" in type(module).__dict__
        and type(module)._apply_gate.__name__ != "_default_apply_gate",
        f"the activation {type(module.act_fn).__name__}": not isinstance(module.act_fn, torch.nn.SiLU)
        and type(module.act_fn).__name__ != "SiLUActivation",
    }
    found = [feature for feature, there in beyond.items() if there]
    if found:
        raise ExportError(
            f"{where}: its experts have {', '.join(found)}, which satchel cannot express yet; this family is not supported"
        )
    out: torch.Tensor = torch.ops.satchel.experts(
        hidden_states, top_k_index, top_k_weights.to(hidden_states.dtype), module.gate_up_proj, module.down_proj
    )
    return out


@contextlib.contextmanager
def _tables_for_rotary(module: torch.nn.Module, capacity: int) -> Iterator[None]:
    """Replace, for the time of the trace, each rotary module's forward by a look-up in its own table for positions 0 .. capacity - 1."""
    replaced: list[tuple[torch.nn.Module, list[str]]] = []
    try:
        for part in list(module.modules()):
            forward = part.forward
            parameters = inspect.signature(forward).parameters
            if (
                "RotaryEmbedding" not in type(part).__name__
                or "position_ids" not in parameters
                or list(part.parameters())
            ):
                continue
            keys = sorted(part.rope_type) if isinstance(getattr(part, "rope_type", None), dict) else [None]
            names: list[str] = []
            replaced.append((part, names))
            positions = torch.arange(capacity)[None]
            for key in keys:
                extra = () if key is None else (key,)
                with torch.no_grad():
                    tables = forward(torch.zeros(1, dtype=torch.float32), positions, *extra)
                for kind, table in zip(("cos", "sin"), tables, strict=True):
                    names.append(_table_name(kind, key))
                    part.register_buffer(names[-1], table[0].float().contiguous(), persistent=False)
            part.forward = _look_up(part)  # type: ignore[method-assign]
        yield
    finally:
        for part, names in replaced:
            part.__dict__.pop("forward", None)
            for name in names:
                delattr(part, name)


def _table_name(kind: str, key: str | None) -> str:
    return f"rotary_{kind}" if key is None else f"rotary_{kind}_{key}"


def _look_up(part: torch.nn.Module) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    def forward(
        x: torch.Tensor, position_ids: torch.Tensor, layer_type: str | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = (
            torch.nn.functional.embedding(position_ids, getattr(part, _table_name(kind, layer_type)))
            for kind in ("cos", "sin")
        )
        return cos, sin

    return forward


@contextlib.contextmanager
def _buffers_on(device: torch.device, module: torch.nn.Module) -> Iterator[dict[str, np.ndarray]]:
    """Put real buffers where the parameters are for the time of the trace; yields their values by name, to be given back to the graph."""
    real = {name: b for name, b in module.named_buffers() if b.device.type != "meta"}
    places = {name: (module.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in real}
    try:
        for name, (part, leaf) in places.items():
            part._buffers[leaf] = real[name].to(device)
        yield {name: b.detach().numpy() for name, b in real.items()}
    finally:
        for name, (part, leaf) in places.items():
            part._buffers[leaf] = real[name]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the tracer's own chatter off the user's terminal; its errors come back as exceptions."""
    loggers = [
        logging.getLogger(n)
        for n in ("torch.onnx", "torch.export", "onnxscript", "torch.onnx._internal.exporter._registration")
    ]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _root_cause(error: BaseException) -> str:
    """The innermost exception's first line, with the line of the model's code that raised it."""
    while error.__cause__ is not None:
        error = error.__cause__
    frame, place = error.__traceback__, ""
    while frame is not None:
        if "modeling_" in frame.tb_frame.f_code.co_filename or "torch" not in frame.tb_frame.f_code.co_filename:
            place = f" ({frame.tb_frame.f_code.co_filename.rpartition('/')[2]}:{frame.tb_lineno})"
        frame = frame.tb_next
    first = str(error).strip().splitlines()
    return f"{type(error).__name__}: {first[0] if first else 'no message'}{place}"
