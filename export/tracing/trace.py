"""Traces a module on meta tensors into one ONNX graph of standard operators and two internal ones.

The graph maps `input_ids` and `position_ids` [batch, sequence] to `logits` [batch, sequence, vocabulary] for the new
tokens only, and to their `hidden_states` if asked for. Only `satchel::Attention`, once per layer, depends on earlier
tokens; graph passes add its KV cache later.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import io
import logging
import warnings
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import onnx_ir as ir
import torch

from satchel.export.errors import ExportError
from satchel.export.tracing import torch_ops
from satchel.export.tracing.own_attention import at_positions, has_distance_bias
from satchel.export.tracing.recurrences import has_recurrences, replaced_functions
from satchel.export.tracing.repeated_layers import copy_layers, one_of_each
from satchel.export.tracing.rotary_tables import tables_for_rotary
from satchel.export.tracing.same_layers import MODEL_ERRORS, same_layers
from satchel.export.tracing.stand_ins import (
    chunks_without_padding,
    register_implementations,
    replaced_methods,
    sets_in_order,
    without_temperature,
)
from satchel.graphs.ir.values import IDENTITY, INTERNAL, nodes
from satchel.runtime.bundle.contract import (
    ATTENTION_MASK,
    BATCH,
    HIDDEN_STATES,
    INPUT_IDS,
    LOGITS,
    POSITION_IDS,
    SEQUENCE,
    TOTAL,
)

OPSET = 24
"""The version of ONNX's standard operators in the graph: the first with TensorScatter."""


@dataclasses.dataclass(frozen=True)
class Trace:
    """The result of a trace.

    Attributes:
        model: The graph; its initializers have no values yet.
        constants: The values of initializers that are not in the checkpoint, by name.
    """

    model: ir.Model
    constants: dict[str, np.ndarray]


def trace(module: torch.nn.Module, name: str, capacity: int, protocol: bool = False, *, hidden: bool = False) -> Trace:
    """Trace `module` for any batch and sequence length.

    Args:
        module: Parameters on the meta device (or real); non-persistent buffers real, on the CPU.
        name: The model's name for messages.
        capacity: Number of positions in the rotary tables; length-dependent scaling (longrope, dynamic) uses it as the
            length.
        protocol: Whether this is a custom module, whose forward takes the attention function as an argument.
        hidden: Whether the hidden states are an output too, times an identity matrix (`choose_output`).

    Raises:
        ExportError: The model is not compatible with a KV cache, or torch cannot trace it.
    """
    register_implementations()
    wrapper: torch.nn.Module
    if protocol:
        if hidden:
            raise ExportError(f"--embeddings: {name} gives logits only: leave it out for a module of your own")
        wrapper = _ProtocolWrapper(module)
    else:
        wrapper = _HiddenWrapper(module, name) if hidden else _ModelWrapper(module, name)
    # Three tensors, since the tracer treats the same tensor as the same input.
    device = next((p.device for p in module.parameters()), torch.device("meta"))
    examples = tuple(torch.zeros(2, length, dtype=torch.int64, device=device) for length in (7, 7, 11))
    batch, sequence, total = (torch.export.Dim(n) for n in (BATCH, SEQUENCE, TOTAL))
    dims = ({0: batch, 1: sequence}, {0: batch, 1: sequence}, {0: batch, 1: total})
    # A custom rotary module is traced unchanged: only transformers' classes are known to return tables.
    tables = contextlib.nullcontext() if protocol else tables_for_rotary(module, capacity)
    without_temperature(module, capacity)
    replaced = contextlib.ExitStack()
    replaced.enter_context(tables)
    replaced.enter_context(chunks_without_padding())
    replaced.enter_context(replaced_methods(module))
    replaced.enter_context(sets_in_order(module))
    replaced.enter_context(replaced_functions(module))
    with _quiet(), replaced, _buffers_on(device, module) as values, torch.no_grad():
        # A custom module may call its layers with functions, and count them.
        kinds = [] if protocol else same_layers(wrapper, examples)
        replaced.enter_context(one_of_each(wrapper, kinds))
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
        except (*MODEL_ERRORS, torch.onnx.OnnxExporterError) as error:
            raise ExportError(f"{name}: torch cannot trace this model: {_root_cause(error)}") from error
    if onnx_program is None:
        raise ExportError(f"{name}: torch returned no graph for this model")
    model = onnx_program.model
    copy_layers(model, wrapper, kinds)
    for value, wanted in zip(model.graph.inputs, (INPUT_IDS, POSITION_IDS, ATTENTION_MASK), strict=True):
        value.name = wanted
    for value, wanted in zip(model.graph.outputs, (LOGITS, HIDDEN_STATES), strict=False):
        value.name = wanted
    _name_dimensions(model)
    for node in nodes(model, "Attention", INTERNAL):
        if node.attributes.get_int("chunk", 0) >= capacity:
            node.attributes["chunk"] = ir.AttrInt64("chunk", 0)  # all positions are in one chunk
    constants = dict(values)
    if isinstance(wrapper, _HiddenWrapper):
        constants[IDENTITY] = np.eye(wrapper.size, dtype=np.float32)
    return Trace(model, constants)


def _name_dimensions(model: ir.Model) -> None:
    """Rename the tracer's symbolic dimensions throughout the graph."""
    ids, _, mask = (value.shape for value in model.graph.inputs)
    if ids is None or mask is None:
        return
    names = {_symbol(ids[0]): BATCH, _symbol(ids[1]): SEQUENCE, _symbol(mask[1]): TOTAL}
    for value in [*model.graph.inputs, *(v for node in model.graph for v in node.outputs)]:
        if value.shape is not None:
            value.shape = ir.Shape(
                [d if isinstance(d, int) else names.get(_symbol(d), d.value) for d in value.shape.dims]
            )


def _symbol(dim: int | ir.SymbolicDim) -> str:
    return str(dim if isinstance(dim, int) else dim.value)


class _ModelWrapper(torch.nn.Module):
    """Calls a `transformers` model with explicit positions and without its own KV cache."""

    def __init__(self, module: torch.nn.Module, name: str) -> None:
        super().__init__()
        self.positioned = "position_ids" in inspect.signature(module.forward).parameters
        if not (self.positioned or has_recurrences(module) or has_distance_bias(module)):
            raise ExportError(
                f"{name}: this model takes no position_ids, which a KV cache needs; satchel does not support it"
            )
        self.module = module

    def forward(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> torch.Tensor:
        # The mask keeps transformers from inferring packed sequences from position_ids; no graph may use it.
        places = {"position_ids": position_ids} if self.positioned else {}
        with at_positions(position_ids):
            result = self.module(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **places)
        logits: torch.Tensor = result.logits
        return logits


class _HiddenWrapper(_ModelWrapper):
    """Takes the hidden states of the model's body as well, times an identity matrix."""

    def __init__(self, module: torch.nn.Module, name: str) -> None:
        super().__init__(module, name)
        body: Any = getattr(module, "base_model", module)
        head = cast(Any, module).get_output_embeddings()
        if body is module or head is None:
            raise ExportError(f"--embeddings: {name} has no body and head of its own: leave it out for this model")
        self.size = int(head.weight.shape[-1])
        self.hidden_states = torch.nn.Linear(self.size, self.size, bias=False, device="meta")
        self._body = [body]  # no module of this one

    def forward(  # type: ignore[override]
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        found: list[torch.Tensor] = []
        hook = self._body[0].register_forward_hook(lambda body, given, result: found.append(result[0]))
        try:
            logits = super().forward(input_ids, position_ids, attention_mask)
        finally:
            hook.remove()
        return logits, found[-1] @ self.hidden_states.weight


class _ProtocolWrapper(torch.nn.Module):
    """Calls a custom module with the attention function of the protocol."""

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
            if scale == 0 or (window is not None and window < 1) or (softcap is not None and softcap <= 0):
                raise ExportError(
                    f"attention got scale={scale}, window={window}, softcap={softcap}: scale must not be 0, "
                    "window at least 1 and softcap above 0, or None for none of it"
                )
            scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
            out = torch.ops.satchel.attention(
                query, key, value, None, next(layers), scale, window or 0, 0, softcap or 0.0
            )
            spread: torch.Tensor = out.transpose(1, 2)
            return spread

        logits: torch.Tensor = self.module(input_ids, position_ids, attention)
        return logits


@contextlib.contextmanager
def _buffers_on(device: torch.device, module: torch.nn.Module) -> Iterator[dict[str, np.ndarray]]:
    """Move real buffers to the parameters' device during the trace.

    Yields their values by name, to be bound to the graph.
    """
    real = {name: b for name, b in module.named_buffers() if b.device.type != "meta"}
    places = {name: (module.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in real}
    try:
        for name, (part, leaf) in places.items():
            part._buffers[leaf] = real[name].to(device)
        floats = {name: b.float() if b.dtype == torch.bfloat16 else b for name, b in real.items()}
        yield {name: b.detach().numpy() for name, b in floats.items()}
    finally:
        for name, (part, leaf) in places.items():
            part._buffers[leaf] = real[name]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the tracer's output off the terminal; its errors are exceptions."""
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
    """Return the first line of the innermost exception, and the line of model code that raised it."""
    while error.__cause__ is not None:
        error = error.__cause__
    frame, place = error.__traceback__, ""
    while frame is not None:
        if "modeling_" in frame.tb_frame.f_code.co_filename or "torch" not in frame.tb_frame.f_code.co_filename:
            place = f" ({frame.tb_frame.f_code.co_filename.rpartition('/')[2]}:{frame.tb_lineno})"
        frame = frame.tb_next
    first = str(error).strip().splitlines()
    return f"{type(error).__name__}: {first[0] if first else 'no message'}{place}"
