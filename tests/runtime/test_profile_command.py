"""`satchel profile`: the runs of both phases told apart, figures that add up, the trace, and what it refuses."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from pathlib import Path

import onnx
import pytest
from support.command import Satchel
from support.tiny_bundle import change_manifest, replace_file

from satchel.runtime.execution import cpu
from satchel.runtime.tools.profiling import profiling
from satchel.runtime.tools.profiling.ort_profile import Kernel, Run, read_runs
from satchel.runtime.tools.profiling.profiling import PREFILL_PASSES, Recording, summarize

PROMPT, NEW, CHUNK = 20, 6, 8
CHUNKS = 3  # of 8, 8 and 4 tokens
WORK = ("--prompt-tokens", str(PROMPT), "--new-tokens", str(NEW), "--threads", "1")


def name_nodes(folder: Path) -> None:
    """Give the layers' nodes names like those of an export; all others keep none."""
    for phase in ("prefill", "decode", "score"):
        path = folder / f"{phase}.onnx"
        model = onnx.load(path, load_external_data=False)
        for node in model.graph.node:
            weights = [name for name in node.input if name[:2] in ("q.", "k.", "v.", "o.")]
            if node.op_type == "GroupQueryAttention":
                node.name = f"attention.{node.output[0][1:]}"
            elif weights:
                node.name = f"layers.{weights[0][2:]}.{weights[0][0]}"
        replace_file(folder, path.name, model.SerializeToString())


@pytest.fixture(scope="module", params=["a session each", "one session"])
def named(request: pytest.FixtureRequest, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundles") / "named"
    shutil.copytree(tiny, folder)
    name_nodes(folder)
    change_manifest(folder, "graphs", "decode", "session_of", to="prefill" if request.param == "one session" else None)
    return folder


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "PREFILL_CHUNK", CHUNK)


def test_json_has_figures_that_add_up(satchel: Satchel, named: Path) -> None:
    found = satchel.json("profile", named, *WORK, "--top", 4)
    assert (found["bundle"], found["prompt_tokens"], found["new_tokens"]) == (str(named), PROMPT, NEW)
    for phase, steps, runs in (("prefill", PREFILL_PASSES, CHUNKS), ("decode", NEW, 1)):
        profile = found[phase]
        assert (profile["steps"], profile["runs"]) == (steps, runs)
        assert 0 < profile["kernels_ms"] <= profile["ms"]
        for table in ("operators", "layers"):
            assert sum(row["ms"] for row in profile[table]) == pytest.approx(profile["kernels_ms"])
        count = {row["operator"]: row["count"] for row in profile["operators"]}
        assert (count["MatMul"], count["GroupQueryAttention"]) == (9 * runs, 2 * runs)
        assert [row["layer"] for row in profile["layers"]] == ["before", 0, 1, "after"]
        assert len(profile["nodes"]) == 4
        times = [row["ms"] for row in profile["nodes"]]
        assert times == sorted(times, reverse=True)


def test_the_trace_keeps_the_phases_apart(satchel: Satchel, named: Path, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    path.write_text("an old trace", encoding="utf-8")
    satchel("profile", named, *WORK, "--trace", path)
    events = json.loads(path.read_text(encoding="utf-8"))
    names = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert names == {1: "prefill", 2: "decode"}
    spans = [event for event in events if event["ph"] == "X"]
    ends = {}
    for process, lengths in ((1, [8, 8, 4] * PREFILL_PASSES), (2, [1] * NEW)):
        mine = [event for event in spans if event["pid"] == process]
        runs = [event for event in mine if event["cat"] == "run"]
        attention = [event for event in mine if event["name"] == "attention.0"]
        # The tokens that attention was given tell what kind of run it was, whatever the order.
        assert [event["args"]["input_type_shape"][0]["float"][1] for event in attention] == lengths
        assert [event["name"] for event in runs] == [f"{names[process]} run {i + 1}" for i in range(len(lengths))]
        for run, kernel in zip(runs, attention, strict=True):
            assert run["ts"] <= kernel["ts"] <= kernel["ts"] + kernel["dur"] <= run["ts"] + run["dur"]
            assert kernel["args"]["layer"] == 0
        ends[process] = (runs[0]["ts"], runs[-1]["ts"] + runs[-1]["dur"])
    assert ends[1][0] == 0
    assert ends[1][1] == ends[2][0]
    assert list(tmp_path.iterdir()) == [path]


def kernel(name: str, operator: str, duration: int) -> Kernel:
    return Kernel(name, operator, 0, duration, {})


def test_figures_are_per_step_and_shares_of_the_runs() -> None:
    kernels = (kernel("embed", "Gather", 100), kernel("layers.0.up", "MatMul", 400), kernel("act", "Mul", 100),
               kernel("layers.0.down", "MatMul", 200), kernel("head", "MatMul", 200))  # fmt: skip
    profile = summarize(Recording(2, tuple(Run(0, 1250, kernels) for _ in range(4))), layers=1, top=2)
    assert (profile.steps, profile.runs) == (2, 2)
    assert (profile.ms, profile.kernels_ms) == pytest.approx((2.5, 2.0))
    assert (profile.by_name, profile.by_position) == pytest.approx((0.6, 0.1))
    found = [(row.operator, row.count, row.ms, row.share) for row in profile.operators]
    assert found == [("MatMul", 6, pytest.approx(1.6), pytest.approx(0.64)),
                     ("Gather", 2, pytest.approx(0.2), pytest.approx(0.08)),
                     ("Mul", 2, pytest.approx(0.2), pytest.approx(0.08))]  # fmt: skip
    layers = [(row.layer, row.ms) for row in profile.layers]
    assert layers == [("before", pytest.approx(0.2)), (0, pytest.approx(1.4)), ("after", pytest.approx(0.4))]
    assert [(row.name, row.layer, row.ms) for row in profile.nodes] == [
        ("layers.0.up", 0, pytest.approx(0.8)),
        ("layers.0.down", 0, pytest.approx(0.4)),
    ]


@pytest.mark.parametrize("lost", [0, 1])
def test_profiles_do_not_stay_behind_and_one_that_lost_runs_is_an_error(
    satchel: Satchel, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: int
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(profiling, "read_runs", lambda path: read_runs(path)[lost:])
    if lost:
        said = satchel.refuses("profile", tiny, *WORK, "--json", "--trace", tmp_path / "trace.json")
        assert re.search(r"recorded \d+ of \d+ runs: lower --prompt-tokens or --new-tokens", said)
    else:
        satchel.json("profile", tiny, *WORK)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "544 positions is not possible: this bundle allows 1 to 64"),
        (["--prompt-tokens", "0"], "--prompt-tokens and --new-tokens must be 1 or more"),
        (["--top", "-1"], "--top -1: must be 0 or more"),
        (["--trace", "."], "--trace .: this is a folder"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(
    satchel: Satchel, tiny: Path, arguments: list[str], message: str
) -> None:
    assert message in satchel.refuses("profile", tiny, *arguments)


def test_a_name_is_shown_escaped(satchel: Satchel, named: Path, tmp_path: Path) -> None:
    folder = tmp_path / "odd"
    shutil.copytree(named, folder)
    model = onnx.load(folder / "prefill.onnx", load_external_data=False)
    next(node for node in model.graph.node if node.op_type == "GroupQueryAttention").name = 'layers.0."a\\b\x1b[2J'
    replace_file(folder, "prefill.onnx", model.SerializeToString())
    out, _ = satchel("profile", folder, *WORK, "--top", 100)
    assert "\x1b" not in out
    assert r'layers.0."a\b\x1b[2J' in out
