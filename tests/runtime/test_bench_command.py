"""`satchel bench`: its flags, what it prints and writes, and what it refuses before any work. Never timings."""

from __future__ import annotations

import dataclasses
import re
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from support.command import Satchel

from satchel.runtime.execution import engine
from satchel.runtime.ort import session
from satchel.runtime.tools.bench import bandwidth, speed_plot
from satchel.runtime.tools.bench.bandwidth import Bandwidth
from satchel.runtime.tools.bench.benchmark import Run, Summary

FOUND = Bandwidth(gb_per_second=2.5, threads=3, buffer_mb=64)
WORK = ("--threads", 1, "--prompt-tokens", 8, "--new-tokens", 3)
BASE_KEYS = ["prefill", "decode", "load", "rss_mb", "pss_mb", "ttft"]


@pytest.fixture(autouse=True)
def children(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A bandwidth that is known, in place of a measured one; how often it was asked for."""
    calls: list[str] = []

    def child() -> Bandwidth:
        calls.append("child")
        return FOUND

    monkeypatch.setattr(bandwidth, "measure_in_child", child)
    return calls


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail if a graph is opened."""

    def opened(*_: object, **__: object) -> None:
        raise AssertionError("a graph was opened")

    monkeypatch.setattr(session, "_open", opened)


def test_json_measures_bandwidth_when_told_to(satchel: Satchel, tiny: Path, children: list[str]) -> None:
    assert list(satchel.json("bench", tiny, *WORK)) == BASE_KEYS
    assert children == []
    document = satchel.json("bench", tiny, *WORK, "--bandwidth")
    assert list(document) == [*BASE_KEYS, "bytes_per_step", "bandwidth_share", "bandwidth"]
    assert document["bandwidth"] == dataclasses.asdict(FOUND)
    weights, positions = 4 * (2 * 64 * 192 + 64 * 400 + 64), 8 + 2  # the steps attend to 9, 10 and 11 positions
    assert document["bytes_per_step"] == weights + positions * 2 * 2 * 32 * 4
    assert document["bandwidth_share"] == pytest.approx(document["bytes_per_step"] * document["decode"] / 2.5e9)
    assert children == ["child"]


def test_runs_give_medians_and_spread(satchel: Satchel, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [Run(10.0, 3.0, 5.0), Run(30.0, 1.0, 4.0), Run(20.0, 2.0, 6.0)] * 2
    monkeypatch.setattr("satchel.runtime.tools.bench.benchmark.timed_run", lambda *_: runs.pop())
    document = satchel.json("bench", tiny, *WORK, "--runs", 3)
    assert [document[key] for key in ("prefill", "ttft", "decode", "runs")] == [20.0, 2.0, 5.0, 3]
    assert document["spread"] == {"prefill": [10.0, 30.0], "ttft": [1.0, 3.0], "decode": [4.0, 6.0]}
    assert satchel("bench", tiny, *WORK, "--runs", 3).out.splitlines()[:3] == [
        "prefill        20.0 tokens/s  10.0 to 30.0  (8 tokens; median of 3 runs)",
        "ttft          2.000 s  1.000 to 3.000",
        "decode          5.0 tokens/s  4.0 to 6.0  (3 tokens; median of 3 runs)",
    ]
    assert runs == []


def test_the_table_ends_with_the_share_of_bandwidth(satchel: Satchel, tiny: Path, children: list[str]) -> None:
    out, err = satchel("bench", tiny, *WORK)
    assert err == ""
    names = ["prefill", "ttft", "decode", "load", "memory", "bandwidth"]
    assert [line.split()[0] for line in out.splitlines()] == names
    assert re.fullmatch(
        r"bandwidth +2\.5 GB/s, of which decode reaches \d+% with 206\.1 kB a step", out.splitlines()[-1]
    )
    assert "bandwidth" not in satchel("bench", tiny, *WORK, "--no-bandwidth").out
    assert children == ["child"]


def test_a_batch_gives_totals_and_what_each_sequence_gets(satchel: Satchel, tiny: Path) -> None:
    document = satchel.json("bench", tiny, *WORK, "--batch", 3, "--bandwidth")
    assert document["batch"] == 3
    for name in ("prefill", "decode"):
        assert document["per_sequence"][name] * 3 == pytest.approx(document[name])
    assert document["prefill"] * document["ttft"] == pytest.approx(3 * 8)
    assert document["bytes_per_step"] == 4 * (2 * 64 * 192 + 64 * 400 + 64) + 3 * 10 * 2 * 2 * 32 * 4
    steps = document["decode"] / 3
    assert document["bandwidth_share"] == pytest.approx(document["bytes_per_step"] * steps / 2.5e9)
    out = satchel("bench", tiny, *WORK, "--batch", 3).out
    assert re.search(r"^prefill +[\d.]+ tokens/s  \(3 x 8 tokens, [\d.]+ each\)$", out, re.M)


def test_prompt_lengths_are_a_list_in_json_and_a_table(satchel: Satchel, tiny: Path) -> None:
    flags = ("--threads", 1, "--new-tokens", 2)
    document = satchel.json("bench", tiny, *flags, "--prompt-lengths", "20, 5,40", "--runs", 2, "--bandwidth")
    assert list(document) == ["prompt_lengths", "new_tokens", "load", "rss_mb", "pss_mb", "bandwidth"]
    assert [point["prompt_tokens"] for point in document["prompt_lengths"]] == [20, 5, 40]
    keys = ["prompt_tokens", "prefill", "decode", "ttft", "runs", "spread", "bytes_per_step", "bandwidth_share"]
    assert all(list(point) == keys for point in document["prompt_lengths"])
    sizes = [point["bytes_per_step"] for point in document["prompt_lengths"]]
    assert sizes[0] - sizes[1] == 15 * 2 * 2 * 32 * 4  # 15 positions more
    out, err = satchel("bench", tiny, *flags, "--prompt-lengths", "5,20")
    lines = out.splitlines()
    assert err == ""
    assert lines[0].split() == ["prompt", "prefill", "tokens/s", "ttft", "s", "decode", "tokens/s"]
    assert [line.split()[0] for line in lines[1:]] == ["5", "20", "load", "memory", "bandwidth"]
    assert all(len(line.split()) == 4 for line in lines[1:3])
    assert re.search(r"decode reaches \d+% with 204\.3 kB a step at 5, \d+% with 212\.0 kB a step at 20$", lines[-1])


def test_each_prompt_is_prefilled_whole_and_decoded_from_there(
    satchel: Satchel, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths: list[int] = []
    original = engine.Engine.decode

    def decode(self: Any, state: Any, token: int) -> Any:
        lengths.append(state.cache.length)
        return original(self, state, token)

    monkeypatch.setattr(engine.Engine, "decode", decode)
    satchel.json("bench", tiny, "--prompt-lengths", "30,7", "--new-tokens", 2)
    assert lengths == [16, 30, 31, 7, 8]  # the warm-up is first


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--runs", "0"), "--runs 0: must be 1 or more"),
        (("--batch", "-1"), "--batch -1: must be 1 or more"),
        (("--prompt-lengths", "abc"), "--prompt-lengths abc: "),
        (("--prompt-lengths", "8,0"), "--prompt-lengths 8,0: "),
        (("--prompt-lengths", "8,,9"), "--prompt-lengths 8,,9: "),
        (("--prompt-lengths", ""), "--prompt-lengths : "),
        (("--prompt-lengths", "8", "--prompt-tokens", "8"), "--prompt-lengths and --prompt-tokens"),
        (
            ("--prompt-lengths", "8,61,60", "--new-tokens", "4"),
            "--prompt-lengths 61: with 4 new tokens this takes 65 positions",
        ),
        (("--prompt-tokens", "0"), "--prompt-tokens and --new-tokens must be 1 or more"),
        (("--prompt-lengths", "8", "--new-tokens", "0"), "--prompt-tokens and --new-tokens must be 1 or more"),
        (("--prompt-tokens", "61", "--new-tokens", "4"), "65 positions is not possible: this bundle allows 1 to 64"),
        (("--vocabulary", "100"), "--vocabulary 100: must be from 101 to the bundle's 400"),
        (("--vocabulary", "401"), "--vocabulary 401: must be from 101 to the bundle's 400"),
        (("--plot", "FOLDER/speed.pdf"), "speed.pdf: must end in .png or .svg"),
        (("--plot", "FOLDER/none/speed.png"), "there is no folder"),
        (("--plot", "FOLDER"), "must end in .png or .svg"),
        (("--plot", "FOLDER/speed.png"), "128 and 128 new tokens are too many, this bundle's context holds 64"),
    ],
)
def test_wrong_values_are_refused_before_a_graph_is_opened(
    satchel: Satchel, tiny: Path, tmp_path: Path, children: list[str], arguments: tuple[str, ...], message: str
) -> None:
    said = satchel.refuses("bench", tiny, *(argument.replace("FOLDER", str(tmp_path)) for argument in arguments))
    assert message in said
    assert children == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_work")
def test_a_missing_matplotlib_is_told_before_any_work(
    satchel: Satchel, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    said = satchel.refuses("bench", tiny, "--prompt-lengths", 8, "--plot", tmp_path / "speed.svg")
    assert said.startswith("--plot: matplotlib is not installed: pip install 'matplotlib>=")


def test_a_failed_bandwidth_leaves_the_figures(satchel: Satchel, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> Bandwidth:
        raise bandwidth.SatchelError("the memory bandwidth could not be measured: no memory")

    monkeypatch.setattr(bandwidth, "measure_in_child", fail)
    out, err = satchel("bench", tiny, *WORK, code=2)
    assert err == "satchel: error: the memory bandwidth could not be measured: no memory\n"
    assert [line.split()[0] for line in out.splitlines()] == ["prefill", "ttft", "decode", "load", "memory"]


def test_the_plot_is_written_in_the_format_of_its_suffix(satchel: Satchel, tiny: Path, tmp_path: Path) -> None:
    contexts = ("--prompt-lengths", "30,7", "--new-tokens", 2, "--runs", 2, "--quiet")
    satchel.json("bench", tiny, *contexts, "--plot", tmp_path / "speed.PNG")
    content = (tmp_path / "speed.PNG").read_bytes()
    assert content.startswith(b"\x89PNG\r\n")
    assert min(struct.unpack(">II", content[16:24])) > 500
    satchel.json("bench", tiny, *contexts, "--plot", tmp_path / "speed.svg")
    assert ElementTree.parse(tmp_path / "speed.svg").getroot().tag == "{http://www.w3.org/2000/svg}svg"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["speed.PNG", "speed.svg"]


def test_a_plot_without_lengths_takes_those_that_fit(
    satchel: Satchel, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("satchel.runtime.cli.bench.PLOTTED_LENGTHS", (16, 32, 64))
    document = satchel.json("bench", tiny, "--new-tokens", 4, "--quiet", "--plot", tmp_path / "speed.svg")
    assert [point["prompt_tokens"] for point in document["prompt_lengths"]] == [16, 32]
    assert (tmp_path / "speed.svg").is_file()


def test_the_plot_draws_medians_over_contexts_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.axes import Axes

    drawn: list[Any] = []
    monkeypatch.setattr(Axes, "errorbar", lambda self, x, y, yerr, **_: drawn.append((x, y, yerr)))

    def summary(middle: float) -> Summary:
        low, high = Run(middle - 1, 0.0, middle * 2 - 2), Run(middle + 3, 0.0, middle * 2 + 4)
        return Summary(Run(middle, 0.0, middle * 2), low, high)

    speed_plot.write_plot(tmp_path / "speed.svg", "a $title$", [512, 128], [summary(50.0), summary(80.0)])
    assert drawn[0] == ([128, 512], [80.0, 50.0], [[1.0, 1.0], [3.0, 3.0]])
    assert drawn[1] == ([128, 512], [160.0, 100.0], [[2.0, 2.0], [4.0, 4.0]])


def test_matplotlib_is_loaded_for_a_plot_only_and_without_a_display(tiny: Path, tmp_path: Path) -> None:
    code = """
import sys
from satchel.runtime.cli import main as cli
assert cli.main(sys.argv[1:]) == 0
print("matplotlib" in sys.modules, "matplotlib.pyplot" in sys.modules)
"""
    work = ["bench", str(tiny), "--prompt-lengths", "8", "--new-tokens", "2", "--threads", "1", "--no-bandwidth"]
    for extra, expected in (([], "False False"), (["--plot", str(tmp_path / "speed.svg")], "True False")):
        done = subprocess.run([sys.executable, "-c", code, *work, *extra], capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1] == expected
