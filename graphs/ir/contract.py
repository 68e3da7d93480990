"""What a graph pass is, what it returns, and how it fails."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator

import onnx_ir as ir

from satchel.graphs.ir.sweep import sweep


class PassError(Exception):
    """A pass broke an invariant of the graph. The message names the pass and those that ran before it."""


class Refused(Exception):
    """Raised inside a match when a node looks right but has something that the fusion cannot carry over."""


@dataclasses.dataclass(frozen=True)
class Refusal:
    """Why a pass left a node alone."""

    node: str
    reason: str


@dataclasses.dataclass
class Report:
    """How many times an edit changed the graph, and what it refused. Zero means that the graph is unchanged."""

    count: int = 0
    refusals: list[Refusal] = dataclasses.field(default_factory=list)

    def refuse(self, node: ir.Node, reason: str) -> None:
        self.refusals.append(Refusal(node.name or node.op_type, reason))

    @contextlib.contextmanager
    def refusing(self, node: ir.Node) -> Iterator[None]:
        """Note the reason if what happens inside raises Refused, which it must do before it changes the graph."""
        try:
            yield
        except Refused as refusal:
            self.refuse(node, str(refusal))


@dataclasses.dataclass(frozen=True)
class PassResult:
    """A changed copy of the model (or the same model when `count` is 0) and what was done to it."""

    model: ir.Model
    count: int
    refusals: tuple[Refusal, ...]


Edit = Callable[[ir.Model, Report], None]


@dataclasses.dataclass(frozen=True)
class GraphPass:
    """A function `Model -> PassResult`.

    It never alters the model that it is given: the edit works on a clone, which shares the weights.
    """

    name: str
    edit: Edit
    doc: str

    def __call__(self, model: ir.Model) -> PassResult:
        copy, report = model.clone(), Report()
        self.edit(copy, report)
        return PassResult(copy if report.count else model, report.count, tuple(report.refusals))


def graph_pass(edit: Edit, made_by: Callable[..., GraphPass] | None = None) -> GraphPass:
    """Turn an edit in place, `edit(model, report)`, into a pass with the name and docstring of the edit, or of the
    function that made it. The pass also takes out what its change left unread.
    """
    named = made_by or edit

    @functools.wraps(edit)
    def edit_and_sweep(model: ir.Model, report: Report) -> None:
        edit(model, report)
        if report.count:
            sweep(model.graph)

    return GraphPass(named.__name__, edit_and_sweep, named.__doc__ or "")
