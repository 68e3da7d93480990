"""Small readers and writers of graphs that passes share: constants, producers, shapes, new nodes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from satchel.graphs.ir.contract import Refused
from satchel.graphs.ir.weights import LazyWeight
from satchel.runtime.bundle.contract import HIDDEN_STATES

MICROSOFT = "com.microsoft"
INTERNAL = "satchel"
IDENTITY = f"{HIDDEN_STATES}.weight"
"""The identity matrix in front of the hidden states, where a graph has them beside logits: it takes in what passes do
to all matrices that read the residual stream."""
SMALL = 1 << 16
"""A constant of at most so many bytes may be read while passes run; larger ones stay lazy."""


def constant(value: ir.Value | None) -> np.ndarray | None:
    """The array behind a small constant (an initializer or a Constant node), or None; a default of a graph input is
    none."""
    if value is None or value.is_graph_input():
        return None
    tensor = value.const_value
    producer = value.producer()
    if tensor is None and producer is not None and producer.op_type == "Constant" and producer.domain == "":
        (attribute,) = producer.attributes.values()
        if attribute.name == "value":
            tensor = attribute.as_tensor()
        elif attribute.name in ("value_int", "value_ints"):
            return np.asarray(attribute.value, dtype=np.int64)
        elif attribute.name in ("value_float", "value_floats"):
            return np.asarray(attribute.value, dtype=np.float32)
    if tensor is None or tensor.nbytes > SMALL:
        return None
    return tensor.numpy()


def scalar(value: ir.Value | None) -> float | None:
    """The one element of a constant, or None."""
    array = constant(value)
    return float(array.reshape(())) if array is not None and array.size == 1 else None


def weight(value: ir.Value | None) -> LazyWeight | None:
    """The lazy weight behind an initializer, or None."""
    return value.const_value if value is not None and isinstance(value.const_value, LazyWeight) else None


def producer(value: ir.Value | None, op_type: str, domain: str = "") -> ir.Node | None:
    """The node that makes `value`, if it is of this operator."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == op_type and node.domain == domain else None


def nodes(model: ir.Model, op_type: str, domain: str = "") -> Iterator[ir.Node]:
    """The nodes of one operator, in the graph's order; those removed meanwhile are left out."""
    for node in [n for n in model.graph if n.op_type == op_type and n.domain == domain]:
        if node.graph is not None:
            yield node


def only_user(value: ir.Value) -> ir.Node | None:
    """The single node that reads `value`, or None if there are more, none, or it is an output of the graph."""
    uses = value.uses()
    if len(uses) != 1 or value.is_graph_output():
        return None
    return next(iter(uses)).node


def split_operand(node: ir.Node, wanted: str) -> tuple[ir.Node, ir.Value] | None:
    """For a commutative binary node: (the operand's producer of type `wanted`, the other operand), or None."""
    first, second = node.inputs
    for value, other in ((first, second), (second, first)):
        found = producer(value, wanted)
        if found is not None and other is not None:
            return found, other
    return None


def square(value: ir.Value | None) -> ir.Node | None:
    """The node that makes `value` by squaring its first input, a Pow or a Mul, or None."""
    power = producer(value, "Pow")
    if power is not None:
        return power if scalar(power.inputs[1]) == 2 else None
    product = producer(value, "Mul")
    return product if product is not None and product.inputs[0] is product.inputs[1] else None


def span(value: ir.Value | None) -> tuple[ir.Value, range] | None:
    """(source, channels) if `value` is these channels of the source's last axis: a Slice of one axis, or an output of a
    Split, by constants; None otherwise.
    """
    node = value.producer() if value is not None else None
    source = node.inputs[0] if node is not None and node.domain == "" and node.inputs else None
    if value is None or node is None or source is None:
        return None
    last = (-1, (rank(source) or 0) - 1)
    operands = [constant(operand) for operand in node.inputs[1:]]
    if node.op_type == "Split" and operands and operands[0] is not None:
        start = int(operands[0][: value.index()].sum())
        whole = node.attributes.get_int("axis", 0) in last
        return (source, range(start, start + int(operands[0][value.index() or 0]))) if whole else None
    if node.op_type == "Slice" and len(operands) > 2 and all(o is not None and o.size == 1 for o in operands):
        start, end, axis, *step = (int(o.reshape(())) for o in operands if o is not None)
        width = last_dim(source)
        return (source, range(width)[slice(start, end, *step)]) if axis in last and width is not None else None
    return None


def attributes(node: ir.Node, **defaults: Any) -> dict[str, Any]:
    """The node's attributes over their defaults.

    Raises:
        Refused: The node has an attribute that is not named here: its meaning would be lost.
    """
    unknown = sorted(set(node.attributes) - set(defaults))
    if unknown:
        raise Refused(f"{node.op_type} has an attribute that this pass does not know: {', '.join(unknown)}")
    return defaults | {name: attribute.value for name, attribute in node.attributes.items()}


def dims(value: ir.Value | None) -> list[int | str | None] | None:
    """The value's shape with numbers for known and names for symbolic dimensions, or None."""
    if value is None or value.shape is None:
        return None
    return [d if isinstance(d, int) else d.value for d in value.shape.dims]


def last_dim(value: ir.Value | None) -> int | None:
    """The size of the last axis where it is known."""
    shape = dims(value)
    return shape[-1] if shape and isinstance(shape[-1], int) else None


def heads_of(value: ir.Value | None) -> tuple[int, int]:
    """(heads, head_dim) of a tensor [batch, heads, new, head_dim].

    Raises:
        Refused: One of them is not known.
    """
    match dims(value):
        case [_, int(heads), _, int(head_dim)]:
            return heads, head_dim
    raise Refused("the number or width of its heads is not known")


def rank(value: ir.Value | None) -> int | None:
    """The number of dimensions where it is known."""
    return None if value is None or value.shape is None else len(value.shape)


class Builder:
    """Adds nodes before a given node, and initializers, under names that do not clash."""

    def __init__(self, model: ir.Model, before: ir.Node | None = None) -> None:
        self.graph = model.graph
        self.before = before

    def node(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        name: str,
        domain: str = "",
        outputs: int = 1,
        **attributes: Any,
    ) -> ir.Node:
        """A new node called `name`, inserted before `self.before` (at the end without one); its first output takes the
        same name.
        """
        attrs: Mapping[str, Any] = {k: v for k, v in attributes.items() if v is not None}
        self.graph.opset_imports.setdefault(domain, 1)
        node = ir.node(op_type, list(inputs), attributes=dict(attrs), domain=domain, num_outputs=outputs, name=name)
        for index, output in enumerate(node.outputs):
            output.name = name if index == 0 else f"{name}.{index}"
        if self.before is None:
            self.graph.append(node)
        else:
            self.graph.insert_before(self.before, node)
        return node

    def value(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        name: str,
        like: ir.Value | None = None,
        domain: str = "",
        **attributes: Any,
    ) -> ir.Value:
        """The only output of a new node, with the dtype and shape of `like` if given."""
        output = self.node(op_type, inputs, name, domain, **attributes).outputs[0]
        if like is not None:
            output.shape, output.type = like.shape, like.type
        return output

    def constant(self, array: np.ndarray, name: str) -> ir.Value:
        """An initializer `const/name` with these values; one that exists already is used again. No checkpoint's names
        have a slash.

        Raises:
            ValueError: It is there with other values.
        """
        name = f"const/{name}"
        there = self.graph.initializers.get(name)
        if there is not None:
            known = constant(there)
            if known is None or known.dtype != array.dtype or not np.array_equal(known, array):
                raise ValueError(f"an initializer called {name} exists already")
            return there
        return self.initializer(ir.Tensor(np.ascontiguousarray(array).reshape(array.shape), name=name))

    def shape(self, *sizes: int) -> ir.Value:
        """A constant for the target of a Reshape, `const/shape.a_b_c`; 0 keeps a dimension, -1 is inferred."""
        return self.constant(np.asarray(sizes, np.int64), "shape." + "_".join(map(str, sizes)))

    def shared(self, lazy: LazyWeight) -> ir.Value:
        """An initializer for a weight that may be read in several places; one of its name is used again.

        Raises:
            ValueError: One of its name has another shape or dtype.
        """
        there = self.graph.initializers.get(lazy.name)
        if there is None:
            return self.initializer(lazy)
        known = weight(there)
        if known is None or (known.dims, known.dtype) != (lazy.dims, lazy.dtype):
            raise ValueError(f"an initializer called {lazy.name} exists already")
        return there

    def initializer(self, tensor: ir.TensorProtocol) -> ir.Value:
        """An initializer for a tensor, lazy or not, under the tensor's own name.

        Raises:
            ValueError: Another initializer has the name.
        """
        name = str(tensor.name)
        there = self.graph.initializers.get(name)
        if there is not None:
            raise ValueError(f"an initializer called {name} exists already")
        value = ir.Value(
            name=name, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype), const_value=tensor
        )
        self.graph.register_initializer(value)
        return value


def replace(old: ir.Value, new: ir.Value) -> None:
    """Let every reader of `old`, and the graph's outputs, read `new`; an output keeps its name."""
    if old.is_graph_output():
        name, old.name = old.name, f"{old.name}.replaced"
        new.name = name
    if new.shape is None:
        new.shape = old.shape
    if new.type is None:
        new.type = old.type
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
