"""`satchel doctor --report` and `bench --report` write what can be sent to somebody else."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from support.command import Satchel
from support.tiny_cuda_bundle import write_cuda_bundle

from satchel.runtime.bundle.reader import read_bundle
from satchel.runtime.errors import ProviderError
from satchel.runtime.evaluation import trial


def test_a_report_has_placement_accuracy_and_four_speeds(satchel: Satchel, certified: Path, tmp_path: Path) -> None:
    satchel("doctor", certified, "--report", tmp_path / "found.txt", "--threads", 1)
    found = json.loads((tmp_path / "found.json").read_text())
    page = (tmp_path / "found.html").read_text()
    assert found["works"]
    assert found["placement"]["complaints"] == []
    assert found["accuracy"]["mismatches"] == []
    assert found["accuracy"]["measured"] == pytest.approx(found["accuracy"]["recorded"], abs=1e-5)
    lengths = trial.lengths_of(read_bundle(certified).manifest)
    assert len(lengths) == 3
    for name in (*(f"{length} tokens" for length in lengths), f"{trial.BATCH} sequences"):
        runs = found[name]["decode"]
        assert 0 < runs["lowest"] <= runs["median"] <= runs["highest"]
        assert name in page
    assert not re.search(r"""(src|href)\s*=""", page)


def test_no_path_of_the_machine_is_in_a_report(satchel: Satchel, tiny: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(tiny, tmp_path / "someone" / "bundle")
    satchel("doctor", bundle, "--report", tmp_path / "found.json", "--threads", 1)
    satchel("bench", bundle, "-p", 8, "-n", 2, "--threads", 1, "--no-bandwidth", "--report", tmp_path / "bench.json")
    for name in ("found.json", "found.html", "bench.json"):
        text = (tmp_path / name).read_text()
        assert "someone" not in text
        assert str(Path.home() / ".cache") not in text


def test_a_bench_report_has_figures_machine_and_versions(satchel: Satchel, tiny: Path, tmp_path: Path) -> None:
    out, _ = satchel("bench", tiny, "-p", 8, "-n", 2, "--threads", 1, "--json", "--report", tmp_path / "b.json")
    found = json.loads(out)
    written = json.loads((tmp_path / "b.json").read_text())
    assert written["bench"]["decode"] == found["decode"]
    assert written["machine"]["satchel"]["version"]
    assert written["machine"]["processor"]["features"]


def test_what_fails_is_named_in_the_report(
    satchel: Satchel, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing after a failure is tried."""

    def fails(*_: object) -> None:
        raise ProviderError("the device has no memory")

    monkeypatch.setattr(trial.Engine, "open", fails)
    satchel("doctor", tiny, "--report", tmp_path / "found.json", code=1)
    found = json.loads((tmp_path / "found.json").read_text())
    assert not found["works"] and not found["placement"]["works"]
    assert "no memory" in found["placement"]["error"]
    assert "accuracy" not in found


def test_a_figure_outside_the_margins_is_told(
    satchel: Satchel, certified: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("satchel.runtime.evaluation.certify.mismatches", lambda *_: ["prompt 1: another token"])
    satchel("doctor", certified, "--report", tmp_path / "found.json", "--threads", 1, code=1)
    assert json.loads((tmp_path / "found.json").read_text())["accuracy"]["mismatches"] == ["prompt 1: another token"]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--report", "{}/found.json"], "bundle"),
        (["{tiny}", "--report", "{}/no/such/found.json"], "no/such"),
        (["{tiny}", "--provider", "cuda", "--report", "{}/found.json"], "--target cuda"),
        (["{tiny}", "--provider", "cuda"], "--target cuda"),
        (["{cuda}", "--provider", "cuda", "--report", "{}/found.json"], "onnxruntime-gpu"),
        (["{cuda}", "--provider", "cuda"], "onnxruntime-gpu"),
        (["--provider", "cann"], "onnxruntime-cann"),
        (["{}/nowhere", "--report", "{}/found.json"], "nowhere"),
        (["{broken}", "--report", "{}/found.json"], "weights"),
    ],
)
def test_wrong_requests_are_refused_before_any_work(
    satchel: Satchel, tiny: Path, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, args: list[str], said: str
) -> None:
    places = {"{tiny}": tiny, "{}": tmp_path}
    if "{cuda}" in args:
        places["{cuda}"] = write_cuda_bundle(tmp_path_factory.mktemp("cuda") / "bundle")
    if "{broken}" in args:
        places["{broken}"] = Path(shutil.copytree(tiny, tmp_path_factory.mktemp("broken") / "bundle"))
        next(places["{broken}"].glob("weights*")).write_bytes(b"")
    for name, place in places.items():
        args = [each.replace(name, str(place)) for each in args]
    assert said in satchel.refuses("doctor", *args)
    assert list(tmp_path.iterdir()) == []
