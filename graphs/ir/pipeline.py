"""Runs a pipeline of passes over a model: clone once, edit, verify after each, count."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir

from satchel.graphs.ir.contract import GraphPass, PassError, Refusal, Report
from satchel.graphs.ir.verify import signature, verify


@dataclasses.dataclass(frozen=True)
class Step:
    """One pass of a pipeline.

    Attributes:
        graph_pass: The pass.
        after: Names of passes that must have run before it, where they run at all.
        changes_signature: True where the pass adds or renames graph inputs or outputs.
    """

    graph_pass: GraphPass
    after: tuple[str, ...] = ()
    changes_signature: bool = False

    @property
    def name(self) -> str:
        return self.graph_pass.name


@dataclasses.dataclass(frozen=True)
class Done:
    """What one step of a run did."""

    name: str
    count: int
    refusals: tuple[Refusal, ...]

    def as_json(self, graph: str) -> dict[str, Any]:
        """The step as the manifest reports it for one graph."""
        refusals = [dataclasses.asdict(refusal) for refusal in self.refusals]
        return {"graph": graph, "pass": self.name, "count": self.count, "refusals": refusals}


def check_order(steps: Sequence[Step]) -> None:
    """Check that each step comes after the passes that it names.

    Raises:
        PassError: A step stands before a pass that it must follow.
    """
    last = {step.name: index for index, step in enumerate(steps)}
    for index, step in enumerate(steps):
        for earlier in step.after:
            if earlier in last and not any(s.name == earlier for s in steps[:index]):
                raise PassError(f"{step.name} must run after {earlier}")


def run(
    model: ir.Model, steps: Sequence[Step], progress: Callable[[str], None] = lambda name: None
) -> tuple[ir.Model, list[Done]]:
    """Run `steps` over a copy of `model`.

    Returns:
        The changed copy, and for each step what it did.

    Raises:
        PassError: A pass left the graph broken, or changed its inputs or outputs without saying so.
    """
    check_order(steps)
    model, done = model.clone(), list[Done]()
    for step in steps:
        progress(step.name)
        before, report = signature(model), Report()
        step.graph_pass.edit(model, report)
        try:
            verify(model)
            if not step.changes_signature and signature(model) != before:
                raise PassError(f"inputs and outputs changed from {before} to {signature(model)}")
        except PassError as error:
            ran = ", ".join(d.name for d in done) or "none"
            raise PassError(f"after the pass {step.name}: {error} (passes before it: {ran})") from error
        done.append(Done(step.name, report.count, tuple(report.refusals)))
    return model, done
