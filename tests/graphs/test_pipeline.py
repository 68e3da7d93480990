"""The pipeline runs passes in a valid order, checks the graph after each, and names the one that broke it."""

from __future__ import annotations

import onnx_ir as ir
import pytest
from support.graphs import build, operators, serialized

from satchel.graphs.ir.contract import GraphPass, PassError, Report, graph_pass
from satchel.graphs.ir.pipeline import Step, check_order, run
from satchel.graphs.passes.normalize.remove_dead import remove_dead
from satchel.graphs.passes.normalize.remove_identity import remove_identity

TEXT = "(float[3] x) => (float[3] y) { a = Identity(x) b = Abs(x) y = Neg(a) }"


def named(name: str) -> GraphPass:
    """A pass of that name that does nothing."""

    def nothing(model: ir.Model, report: Report) -> None:
        del model, report

    return GraphPass(name, nothing, "")


def steps(*orders: tuple[str, tuple[str, ...]]) -> list[Step]:
    return [Step(named(name), after) for name, after in orders]


@graph_pass
def rename_output(model: ir.Model, report: Report) -> None:
    model.graph.outputs[0].name = "renamed"
    report.count += 1


@graph_pass
def read_too_early(model: ir.Model, report: Report) -> None:
    first = next(iter(model.graph))
    first.replace_input_with(0, model.graph.outputs[0])
    report.count += 1


@graph_pass
def refuse_neg(model: ir.Model, report: Report) -> None:
    for node in model.graph:
        if node.op_type == "Neg":
            report.refuse(node, "it is negative")


def test_a_repeated_step_may_stand_before_and_after() -> None:
    check_order(steps(("clean", ()), ("fuse", ("clean",)), ("clean", ("fuse",))))
    with pytest.raises(PassError, match="clean must run after fuse"):
        check_order(steps(("clean", ("fuse",)), ("fuse", ())))


def test_a_wrong_order_stops_the_run_before_any_pass() -> None:
    ran: list[str] = []
    with pytest.raises(PassError, match="must run after"):
        run(build(TEXT), steps(("second", ("first",)), ("first", ())), ran.append)
    assert ran == []


def test_a_run_says_what_each_step_did_and_leaves_the_given_model_alone() -> None:
    model = build(TEXT)
    before = serialized(model)
    ran: list[str] = []
    after, done = run(model, [Step(refuse_neg), Step(remove_identity), Step(remove_dead)], ran.append)
    assert serialized(model) == before
    assert operators(after) == {"Neg": 1}
    assert ran == ["refuse_neg", "remove_identity", "remove_dead"]
    assert [(step.name, step.count) for step in done] == [("refuse_neg", 0), ("remove_identity", 1), ("remove_dead", 0)]
    assert [(r.node, r.reason) for r in done[0].refusals] == [("node_2", "it is negative")]


def test_a_report_is_json_for_the_manifest() -> None:
    _, done = run(build(TEXT), [Step(refuse_neg)])
    refusal = {"node": "node_2", "reason": "it is negative"}
    assert done[0].as_json("decode") == {"graph": "decode", "pass": "refuse_neg", "count": 0, "refusals": [refusal]}


def test_a_broken_graph_names_the_pass_and_those_before_it() -> None:
    with pytest.raises(PassError) as raised:
        run(build(TEXT), [Step(remove_dead), Step(remove_identity), Step(read_too_early)])
    assert str(raised.value) == (
        "after the pass read_too_early: node node_2 (Neg) reads y, which nothing before it makes"
        " (passes before it: remove_dead, remove_identity)"
    )


def test_a_signature_that_changes_is_refused_unless_the_step_says_so() -> None:
    with pytest.raises(PassError, match=r"rename_output.*'y'.*'renamed'"):
        run(build(TEXT), [Step(rename_output)])
    after, _ = run(build(TEXT), [Step(rename_output, changes_signature=True)])
    assert after.graph.outputs[0].name == "renamed"
