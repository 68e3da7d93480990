"""Traces one layer of each kind; the others become copies of its nodes.

While a model is traced, a layer that is the same program as an earlier one is a single placeholder operator with what
the layer is given. The tensors that go into the earlier one and come out of it are marked. In the traced graph each
placeholder is then replaced by a copy of what lies between the marks, with the layer's own parameters.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import onnx_ir as ir
import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from satchel.export.tracing.same_layers import LAYER, Kind
from satchel.graphs.ir.values import INTERNAL, nodes, replace

RESULT = -1
"""The place of a mark on what a layer gives; on what it is given, that is the number of the tensor."""

Forward = Callable[..., Any]


@contextlib.contextmanager
def one_of_each(module: torch.nn.Module, kinds: Sequence[Kind]) -> Iterator[None]:
    """While it is entered, only the first layer of each kind runs, between marks; the others are placeholders."""
    with contextlib.ExitStack() as changed:
        for number, kind in enumerate(kinds):
            form = _Form()
            first: Any = module.get_submodule(kind.first)
            changed.enter_context(_with_forward(first, _marked(first.forward, number, form)))
            for name in kind.offsets:
                layer = module.get_submodule(name)
                changed.enter_context(_with_forward(layer, _placeholder(number, name, form)))
                changed.enter_context(_without_tensors(layer))
        yield


@dataclasses.dataclass
class _Form:
    """How a layer gives its only tensor, as the first of the kind did."""

    structure: Any = None
    leaves: list[Any] = dataclasses.field(default_factory=list)

    def filled(self, tensor: torch.Tensor) -> Any:
        return tree_unflatten([tensor if isinstance(x, torch.Tensor) else x for x in self.leaves], self.structure)


@contextlib.contextmanager
def _with_forward(layer: Any, forward: Forward) -> Iterator[None]:
    before = vars(layer).get("forward")
    layer.forward = forward
    try:
        yield
    finally:
        del layer.forward
        if before is not None:
            layer.forward = before


@contextlib.contextmanager
def _without_tensors(layer: torch.nn.Module) -> Iterator[None]:
    """Take a layer's parameters and buffers from it: the tracer takes time for each, whether it is read or not."""
    taken = [(part, part._parameters, part._buffers) for part in layer.modules()]
    for part, _, _ in taken:
        part._parameters, part._buffers = {}, {}
    try:
        yield
    finally:
        for part, parameters, buffers in taken:
            part._parameters, part._buffers = parameters, buffers


def _marked(forward: Forward, kind: int, form: _Form) -> Forward:
    def run(*args: Any, **kwargs: Any) -> Any:
        leaves, structure = tree_flatten((args, kwargs))
        tensors = [place for place, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
        for number, place in enumerate(tensors):
            leaves[place] = torch.ops.satchel.mark(leaves[place], kind, number)
        args, kwargs = tree_unflatten(leaves, structure)
        form.leaves, form.structure = tree_flatten(forward(*args, **kwargs))
        return form.filled(
            next(torch.ops.satchel.mark(x, kind, RESULT) for x in form.leaves if isinstance(x, torch.Tensor))
        )

    return run


def _placeholder(kind: int, name: str, form: _Form) -> Forward:
    def run(*args: Any, **kwargs: Any) -> Any:
        given = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, torch.Tensor)]
        return form.filled(torch.ops.satchel.layer(given, kind, name))

    return run


def copy_layers(model: ir.Model, module: torch.nn.Module, kinds: Sequence[Kind]) -> None:
    """Replace the placeholders in the graph of `module` by copies of the first layers of their kinds."""
    if not kinds:
        return
    order = {node: number for number, node in enumerate(model.graph)}
    marks: dict[int, dict[int, ir.Node]] = {}
    for mark in nodes(model, "Mark", INTERNAL):
        marks.setdefault(mark.attributes.get_int("kind"), {})[mark.attributes.get_int("place")] = mark
    layers = {number: _Layer(kinds[number].first, places, order) for number, places in marks.items()}
    for node in list(nodes(model, "Layer", INTERNAL)):
        number, name = node.attributes.get_int("kind"), node.attributes.get_string("name")
        replace(node.outputs[0], layers[number].copied(model.graph, node, name, kinds[number].offsets[name]))
        model.graph.remove(node, safe=True)
    for mark in list(nodes(model, "Mark", INTERNAL)):
        replace(mark.outputs[0], cast(ir.Value, mark.inputs[0]))
        model.graph.remove(mark, safe=True)
    order_parameters(model.graph, module)


def order_parameters(graph: ir.Graph, module: torch.nn.Module) -> None:
    """Put initializers in the order of the parameters of `module`, in which files have them; others come after."""
    order = {name: number for number, (name, _) in enumerate(module.named_parameters())}
    initializers = list(graph.initializers.values())
    graph.initializers.clear()
    for value in sorted(initializers, key=lambda value: order.get(str(value.name), len(order))):
        graph.initializers[str(value.name)] = value


class _Layer:
    """The nodes of a traced layer.

    Args:
        name: The module's name.
        marks: By place.
        order: Of all nodes of the graph. Those before the marks are not of the layer.
    """

    def __init__(self, name: str, marks: Mapping[int, ir.Node], order: Mapping[ir.Node, int]) -> None:
        self.prefix = f"{name}."
        self.given = {mark.outputs[0]: place for place, mark in marks.items() if place != RESULT}
        self.result = cast(ir.Value, marks[RESULT].inputs[0])
        begin = min((order[mark] for place, mark in marks.items() if place != RESULT), default=0)
        found: set[ir.Node] = set()
        waiting = [self.result]
        while waiting:
            node = waiting.pop().producer()
            if node is None or node in found or order[node] < begin or node.op_type == "Mark":
                continue
            found.add(node)
            waiting += [value for value in node.inputs if value is not None]
        changing = set(self.given)
        self.nodes: list[ir.Node] = []
        for node in sorted(found, key=order.__getitem__):
            if not node.inputs or any(
                value is not None and (value in changing or self._owns(value)) for value in node.inputs
            ):
                self.nodes.append(node)
                changing.update(node.outputs)

    def _owns(self, value: ir.Value) -> bool:
        return value.is_initializer() and str(value.name).startswith(self.prefix)

    def copied(self, graph: ir.Graph, placeholder: ir.Node, name: str, offset: int) -> ir.Value:
        """Insert a copy before the placeholder of layer `name`, and return what it gives."""
        values: dict[ir.Value | None, ir.Value | None] = {
            value: placeholder.inputs[number] for value, number in self.given.items()
        }
        place = name.partition(".")[2]  # without the tracer's wrapper
        for node in self.nodes:
            for value in node.inputs:
                if value is not None and self._owns(value):
                    values[value] = self._parameter(graph, value, name)
            inputs = [values.get(value, value) for value in node.inputs]
            kept = [
                ir.AttrInt64(LAYER, attribute.as_int() + offset)
                if attribute.name == LAYER and node.domain == INTERNAL
                else attribute
                for attribute in node.attributes.values()
            ]
            copy = ir.Node(
                node.domain, node.op_type, inputs, kept, overload=node.overload, num_outputs=len(node.outputs),
                version=node.version, name=f"{place}.{node.name}",
            )  # fmt: skip
            for old, new in zip(node.outputs, copy.outputs, strict=True):
                new.name, new.type = f"{place}.{old.name}", old.type
                new.shape = None if old.shape is None else old.shape.copy()
                values[old] = new
            graph.insert_before(placeholder, copy)
        return cast(ir.Value, values[self.result])

    def _parameter(self, graph: ir.Graph, value: ir.Value, layer: str) -> ir.Value:
        """The parameter of another layer with the name that `value` has in this one."""
        name = f"{layer}.{str(value.name).removeprefix(self.prefix)}"
        if name not in graph.initializers:
            shape = None if value.shape is None else value.shape.copy()
            graph.initializers[name] = ir.Value(name=name, shape=shape, type=value.type)
        return graph.initializers[name]
