"""What gives the logits of every token: the score graph, or the prefill graph of a specialized bundle.

Specializing may choose another variant for prefill, whose kernels round differently from those of the score graph. Its
graph takes the last token of each sequence before the layers that only the logits need. With every token in that
place, each as a sequence of its own, the same kernels give for each token what they give for the last one of a prompt,
bit for bit.
"""

from __future__ import annotations

from satchel.runtime.bundle import onnx_wire
from satchel.runtime.bundle.onnx_wire import Node
from satchel.runtime.bundle.reader import Bundle
from satchel.runtime.errors import BundleError
from satchel.runtime.ort.session import SessionSettings, specialized_for

SCORE = "score"
LAST_TOKEN = "last_token"
"""The name of the node of standard operators that gives the last token's row, [batch, 1, n], gathered by GatherND."""

ROWS_FIRST = {"perm": (1, 0, 2)}
"""[1, tokens, n] -> [tokens, 1, n]"""


def scored_by(bundle: Bundle, settings: SessionSettings) -> str | None:
    """The variant whose prefill kernels give the logits of every token, None where the score graph gives them.

    That is the variant that runs prefill, unless it runs a rank's part of a model, or its graph does not take the last
    token in a known way.
    """
    made = specialized_for(bundle, settings)
    name = None if made is None else made.variant("prefill")
    if made is None or name is None or bundle.manifest.rank is not None:
        return None
    return name if _taking(onnx_wire.nodes(bundle.read(made.graphs["prefill"].file))) else None


def of_every_token(model: bytes) -> bytes:
    """A graph of prefill with the logits of every token of one sequence, [tokens, 1, vocabulary].

    before: x [1, tokens, n] -> LastToken, or GatherND -> Unsqueeze -> [1, 1, n] -> what only the logits need
    after:  x [1, tokens, n] -> Transpose -> [tokens, 1, n] -> the same

    Raises BundleError for a graph that does not take the last token in either way.
    """
    taking = _taking(onnx_wire.nodes(model))
    if not taking:
        raise BundleError("the graph of prefill does not take the last token in a known way: export the bundle again")
    return onnx_wire.replace_nodes(model, taking)


def _taking(nodes: list[Node]) -> dict[str, Node]:
    """What takes every token in place of the nodes that take the last one, by the output of these."""
    makers = {output: node for node in nodes for output in node.outputs}
    found = {}
    for node in nodes:
        rows = None
        if (node.domain, node.operator) == ("satchel", "LastToken"):
            rows = node.inputs[0]
        elif (node.name, node.operator) == (LAST_TOKEN, "Unsqueeze"):
            gather = makers.get(node.inputs[0])
            rows = gather.inputs[0] if gather is not None and gather.operator == "GatherND" else None
        if rows is not None:
            found[node.outputs[0]] = Node("Transpose", "", node.name, (rows,), node.outputs, ROWS_FIRST)
    return found
