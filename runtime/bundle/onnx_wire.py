"""Reads and rewrites the external data locations and the nodes of an ONNX file, directly in protobuf wire format.

Field numbers are those of onnx.proto3, the encoding that of the Protocol Buffers specification ("Encoding"). The
protobuf package, which onnxruntime installs, could read this by a descriptor made at run time. It is not used, since
this runs whenever a graph is opened: importing protobuf takes 26 ms of CPU time and 6 MiB, it writes unknown fields in
another order than it read them, and this package depends on the standard library and numpy alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

VARINT, LENGTH_DELIMITED = 0, 2
"""The wire types of integers, and of strings and messages."""

MODEL_GRAPH, GRAPH_NODE, GRAPH_INITIALIZER = 7, 1, 5
NODE_INPUT, NODE_OUTPUT, NODE_NAME, NODE_OPERATOR, NODE_ATTRIBUTE, NODE_DOMAIN = 1, 2, 3, 4, 5, 7
ATTRIBUTE_NAME, ATTRIBUTE_INTS, ATTRIBUTE_TYPE, INTS = 1, 8, 20, 7
TENSOR_DIMS, TENSOR_TYPE, TENSOR_NAME, TENSOR_RAW_DATA, TENSOR_EXTERNAL_DATA = 1, 2, 8, 9, 13
ENTRY_KEY, ENTRY_VALUE = 1, 2

External = dict[str, str]
"""Entries of a tensor's external data, such as `location`, `offset` and `length`."""


def map_external_data(model: bytes, change: Callable[[External], External]) -> bytes:
    """A serialized ModelProto with the external data entries of each of its main graph's initializers replaced.

    `change` is called with the entries of one initializer, in file order, and returns those to write. All other
    bytes are unchanged.

    Raises:
        ValueError: The bytes are not a protobuf message.
    """

    def graph(body: bytes) -> bytes:
        return _mapped(body, GRAPH_INITIALIZER, tensor)

    def tensor(body: bytes) -> bytes:
        entries = [_entry(value) for number, value, _ in fields(body) if number == TENSOR_EXTERNAL_DATA]
        if not entries:
            return body
        kept = b"".join(raw for number, _, raw in fields(body) if number != TENSOR_EXTERNAL_DATA)
        written = (
            _delimited(ENTRY_KEY, key.encode()) + _delimited(ENTRY_VALUE, value.encode())
            for key, value in change(dict(entries)).items()
        )
        return kept + b"".join(_delimited(TENSOR_EXTERNAL_DATA, entry) for entry in written)

    return _mapped(model, MODEL_GRAPH, graph)


@dataclass(frozen=True)
class Node:
    """A node of the main graph. `ints` are attributes of a new one: those of a node that was read are left out."""

    operator: str
    domain: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    ints: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


def nodes(model: bytes) -> list[Node]:
    """The main graph's nodes, in file order. Raises ValueError."""
    graphs = [content for number, content, _ in fields(model) if number == MODEL_GRAPH]
    return [_node(body) for graph in graphs for kind, body, _ in fields(graph) if kind == GRAPH_NODE]


def replace_nodes(model: bytes, made: Mapping[str, Node]) -> bytes:
    """A serialized ModelProto with some of the main graph's nodes replaced; all other bytes are unchanged.

    `made` are the new ones by the name of the first output of the old ones. Raises ValueError.
    """

    def node(body: bytes) -> bytes:
        found = made.get("".join(_node(body).outputs[:1]))
        return body if found is None else _written(found)

    return _mapped(model, MODEL_GRAPH, lambda graph: _mapped(graph, GRAPH_NODE, node))


@dataclass(frozen=True)
class Tensor:
    """An initializer. `dtype` is a number of TensorProto.DataType.

    Its data, of `nbytes`, is in another file at `place`, or in the graph as raw bytes if `place` is empty.
    """

    name: str
    dims: tuple[int, ...]
    dtype: int
    place: External
    nbytes: int


def external_tensors(model: bytes) -> dict[str, Tensor]:
    """The main graph's initializers that have external data, by name. Raises ValueError."""
    return {name: tensor for name, tensor in all_tensors(model).items() if tensor.place}


def all_tensors(model: bytes) -> dict[str, Tensor]:
    """The main graph's initializers, by name. Raises ValueError."""
    graphs = [content for number, content, _ in fields(model) if number == MODEL_GRAPH]
    tensors = [_tensor(body) for graph in graphs for kind, body, _ in fields(graph) if kind == GRAPH_INITIALIZER]
    return {tensor.name: tensor for tensor in tensors}


def external_data(model: bytes) -> list[External]:
    """The external data entries of the main graph's initializers, those that have any. Raises ValueError."""
    return [tensor.place for tensor in external_tensors(model).values()]


def numbers(content: bytes, raw: bytes) -> Iterator[int]:
    """The integers of a field: several if it is packed, else the one after the tag."""
    position = 0
    if not content:
        _, position = varint(raw, 0)
        content = raw
    while position < len(content):
        number, position = varint(content, position)
        yield number


def _tensor(message: bytes) -> Tensor:
    name, dtype, size = "", 0, 0
    dims: list[int] = []
    place: External = {}
    for number, content, raw in fields(message):
        if number == TENSOR_DIMS:
            dims.extend(numbers(content, raw))
        elif number == TENSOR_TYPE:
            dtype = next(numbers(content, raw))
        elif number == TENSOR_NAME:
            name = content.decode()
        elif number == TENSOR_EXTERNAL_DATA:
            key, value = _entry(content)
            if key in place:
                raise ValueError(f"duplicate key {key[:30]!r} in the external data of {name[:60]!r}")
            place[key] = value
        elif number == TENSOR_RAW_DATA:
            size = len(content)
    return Tensor(name, tuple(dims), dtype, place, int(place.get("length", size)))


def _node(message: bytes) -> Node:
    texts: dict[int, list[str]] = {
        number: [] for number in (NODE_INPUT, NODE_OUTPUT, NODE_NAME, NODE_OPERATOR, NODE_DOMAIN)
    }
    for number, content, _ in fields(message):
        if number in texts:
            texts[number].append(content.decode())
    operator, domain, name = ("".join(texts[number][-1:]) for number in (NODE_OPERATOR, NODE_DOMAIN, NODE_NAME))
    return Node(operator, domain, name, tuple(texts[NODE_INPUT]), tuple(texts[NODE_OUTPUT]))


def _written(node: Node) -> bytes:
    texts = [
        *((NODE_INPUT, name) for name in node.inputs),
        *((NODE_OUTPUT, name) for name in node.outputs),
        (NODE_NAME, node.name),
        (NODE_OPERATOR, node.operator),
        (NODE_DOMAIN, node.domain),
    ]
    attributes = [
        _delimited(ATTRIBUTE_NAME, name.encode())
        + b"".join(_number(ATTRIBUTE_INTS << 3 | VARINT) + _number(value) for value in values)
        + _number(ATTRIBUTE_TYPE << 3 | VARINT)
        + _number(INTS)
        for name, values in node.ints.items()
    ]
    return b"".join(_delimited(number, text.encode()) for number, text in texts) + b"".join(
        _delimited(NODE_ATTRIBUTE, attribute) for attribute in attributes
    )


def _mapped(message: bytes, wanted: int, change: Callable[[bytes], bytes]) -> bytes:
    parts = [
        _delimited(wanted, change(value)) if number == wanted else raw for number, value, raw in fields(message)
    ]  # fmt: skip
    return b"".join(parts)


def _entry(message: bytes) -> tuple[str, str]:
    values = {number: value.decode() for number, value, _ in fields(message)}
    return values.get(ENTRY_KEY, ""), values.get(ENTRY_VALUE, "")


def fields(message: bytes) -> Iterator[tuple[int, bytes, bytes]]:
    """Each field's number, its content (empty where it is not length-delimited), and its bytes with the tag.

    Raises ValueError for bytes that are not a protobuf message.
    """
    position = 0
    while position < len(message):
        start = position
        tag, position = varint(message, position)
        content = b""
        match tag & 7:
            case 0:  # varint
                _, position = varint(message, position)
            case 1:  # fixed64
                position += 8
            case 2:  # length-delimited
                size, position = varint(message, position)
                content, position = message[position : position + size], position + size
            case 5:  # fixed32
                position += 4
            case kind:
                raise ValueError(f"wire type {kind} at byte {start}")
        if position > len(message):
            raise ValueError(f"a field at byte {start} ends beyond its message")
        yield tag >> 3, content, message[start:position]


def varint(message: bytes, position: int) -> tuple[int, int]:
    """The number that starts at byte `position`, and the position behind it. Raises ValueError."""
    value = shift = 0
    while position < len(message) and shift < 70:
        byte = message[position]
        value |= (byte & 0x7F) << shift
        position += 1
        if byte < 0x80:
            return value, position
        shift += 7
    raise ValueError(f"a number that does not end before byte {position}")


def _delimited(field: int, content: bytes) -> bytes:
    return _number(field << 3 | LENGTH_DELIMITED) + _number(len(content)) + content


def _number(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
