"""`satchel eval`: its figures, its JSON, and what it refuses before a model is opened."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
from support.command import Satchel
from support.custom_ops import LIBRARY
from support.tiny_bundle import VOCABULARY, read_manifest, write_bundle, write_manifest
from support.tiny_custom_bundle import write_custom_bundle

from satchel.runtime.evaluation.fidelity import cut_windows, evaluate, text_ids
from satchel.runtime.execution.engine import Engine
from satchel.runtime.generation.tokenizer import Tokenizer
from satchel.runtime.util.kl import KL_MEANING

WORDS = "the cat sat on the mat and looked at the other cat, which sat elsewhere. " * 4
SMALL = ["--windows", "2", "--window-tokens", "30", "--skip", "6", "--threads", "1"]
PHASE_KEYS = [
    "kl_mean", "kl_median", "kl_p90", "top1", "perplexity", "reference_perplexity", "kl_p999", "kl_max", "flips",
]  # fmt: skip


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(WORDS, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("bundles") / "other", seed=1)


def test_json_is_one_object_on_one_line(satchel: Satchel, tiny: Path, text: Path) -> None:
    found = satchel.json("eval", tiny, "--text", text, "--reference", tiny, *SMALL)
    assert list(found) == [
        "prefill", "decode", "windows", "window_tokens", "skip", "text", "bundle", "reference", "graphs",
    ]  # fmt: skip
    assert found["graphs"] == {"prefill": "portable", "decode": "portable"}
    assert list(found["prefill"]) == list(found["decode"]) == PHASE_KEYS
    assert found["prefill"]["kl_mean"] < 1e-6 > found["decode"]["kl_mean"]
    assert found["prefill"]["top1"] == found["decode"]["top1"] == 1
    assert (found["windows"], found["window_tokens"], found["skip"]) == (2, 30, 6)
    assert (found["text"], found["bundle"], found["reference"]) == (str(text), str(tiny), str(tiny))


def test_the_figures_are_those_of_the_text_without_special_tokens(
    satchel: Satchel, tiny: Path, other: Path, text: Path, engine: Engine
) -> None:
    windows = cut_windows(text_ids(Tokenizer.open(engine.bundle), WORDS), 30, 2)
    expected = evaluate(engine, windows, None, skip=6)
    found = satchel.json("eval", tiny, "--text", text, "--reference", other, *SMALL)
    assert found["prefill"]["perplexity"] == pytest.approx(expected.prefill.perplexity, rel=1e-6)
    assert found["decode"]["perplexity"] == pytest.approx(expected.decode.perplexity, rel=1e-6)
    assert found["prefill"]["kl_mean"] > 0.5
    alone = satchel.json("eval", other, "--text", text, *SMALL)
    assert alone["prefill"]["perplexity"] == pytest.approx(found["prefill"]["reference_perplexity"], rel=1e-6)
    assert alone["reference"] is None
    assert [alone["decode"][key] is None for key in PHASE_KEYS] == [key != "perplexity" for key in PHASE_KEYS]


def test_a_table_has_a_row_for_each_figure(satchel: Satchel, tiny: Path, text: Path) -> None:
    out, err = satchel("eval", tiny, "--text", text, "--reference", tiny, *SMALL)
    rows = [re.split(r"\s{2,}", line.strip()) for line in out.splitlines()]
    assert (err.count("\n"), rows[0]) == (1, ["prefill", "decode"])
    assert KL_MEANING in err
    assert [row[0] for row in rows[1:]] == [
        "KL mean", "KL median", "KL p90", "KL p99.9", "KL max", "top-1", "flips", "perplexity", "reference's", "graphs",
    ]  # fmt: skip
    assert all(len(row) == 3 for row in rows[1:])
    out, _ = satchel("eval", tiny, "--text", text, *SMALL)
    assert [line.split()[0] for line in out.splitlines()] == ["prefill", "perplexity", "graphs"]


def test_a_text_shorter_than_a_window_is_one_window(satchel: Satchel, tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("the cat sat on the mat and")
    found = satchel.json("eval", tiny, "--text", path, "--skip", 2, "--window-tokens", 60)
    assert found["windows"] == 1
    assert 4 <= found["window_tokens"] < 60


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["TINY", "--text", "nowhere.txt"], "nowhere.txt: cannot be read (No such file or directory): give a text"),
        (["TINY", "--text", "LATIN"], "not UTF-8 text (byte 3): convert it to UTF-8"),
        (
            ["TINY", "--text", "SHORT", "--window-tokens", "40"],
            "tokens, and --skip 32 needs at least 34: give a longer",
        ),
        (["TINY", "--text", "TEXT"], "--window-tokens 256: this bundle's context holds 64: ask for fewer"),
        (["TINY", "--text", "TEXT", "--window-tokens", "33"], "--window-tokens 33: must be at least --skip + 2"),
        (["TINY", "--text", "TEXT", "--windows", "0"], "--windows 0: must be 1 or more"),
        (["TINY", "--text", "TEXT", "--skip", "-1"], "--skip -1: must be 0 or more"),
        (["MUTE", "--text", "TEXT", *SMALL], "has no tokenizer, which a text needs: export it again with --tokenizer"),
        (["TINY", "--text", "TEXT", *SMALL, "--reference", "WIDE"], "its vocabulary has 401 tokens where the bundle's"),
        (["TINY", "--text", "TEXT", *SMALL, "--reference", "LOW"], "its context holds 20: lower --window-tokens to"),
        (["nowhere", "--text", "TEXT", *SMALL], "nowhere: no such file or folder"),
    ],
)
def test_wrong_input_is_one_line_before_a_model_is_opened(
    satchel: Satchel, tiny: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    arguments: list[str], message: str,
) -> None:  # fmt: skip
    def never(*_: object, **__: object) -> None:
        raise AssertionError("a graph was opened")

    monkeypatch.setattr("satchel.runtime.ort.session._open", never)
    places = {"TINY": tiny, "TEXT": text, "LATIN": tmp_path / "latin.txt", "SHORT": tmp_path / "short.txt"}
    places["LATIN"].write_bytes("caf\xe9".encode("latin-1"))
    places["SHORT"].write_text("the cat")
    if "MUTE" in arguments:
        places["MUTE"] = write_bundle(tmp_path / "mute", tokenizer_kind=None)
    for name, changes in (("WIDE", {"vocab_size": VOCABULARY + 1}), ("LOW", {"max_context": 20})):
        if name in arguments:
            places[name] = write_bundle(tmp_path / name)
            manifest = read_manifest(places[name])
            write_manifest(places[name], {**manifest, "model": {**manifest["model"], **changes}})
    assert message in satchel.refuses("eval", *(places.get(argument, argument) for argument in arguments))


def test_a_checkpoint_as_reference_needs_the_exporters_packages(
    satchel: Satchel, tiny: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in list(sys.modules):
        if name == "satchel.export.reference" or name.split(".")[0] == "torch":
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch", None)
    said = satchel.refuses("eval", tiny, "--text", text, *SMALL, "--reference", tmp_path)
    assert said.startswith("torch is not installed: pip install 'torch")


def test_a_reference_gets_the_libraries_that_it_was_made_with(
    satchel: Satchel, tiny: Path, text: Path, tmp_path: Path
) -> None:
    custom = write_custom_bundle(tmp_path / "custom", tiny)
    flags = ("--text", text, *SMALL, "--custom-ops", LIBRARY)
    equal = []
    for bundle, reference, more in (
        (custom, custom, ()),
        (custom, tiny, ()),
        (tiny, custom, ()),
        (custom, custom, ("--no-custom-passes",)),  # what the passes change
        (custom, custom, ("--no-custom-ops",)),
    ):
        figures = satchel.json("eval", bundle, "--reference", reference, *flags, *more)["prefill"]
        equal.append(figures["perplexity"] == figures["reference_perplexity"])
    assert equal == [True, False, False, False, False]


def test_a_reference_without_its_library_runs_plainly_and_one_line_says_so(
    satchel: Satchel, tiny: Path, text: Path, tmp_path: Path
) -> None:
    custom = write_custom_bundle(tmp_path / "custom", tiny)
    out, err = satchel("eval", tiny, "--text", text, "--reference", custom, *SMALL, "--json")
    assert err.count("\n") == 1
    assert f"{custom}: the plain graphs run" in err
    figures = json.loads(out)["prefill"]
    assert figures["perplexity"] == figures["reference_perplexity"]


def test_a_library_that_neither_was_made_with_is_refused(
    satchel: Satchel, tiny: Path, text: Path, tmp_path: Path
) -> None:
    custom = write_custom_bundle(tmp_path / "custom", tiny)
    for bundle, reference, says in (
        (custom, tiny, f"--custom-ops {text}: its SHA-256 is"),
        (tiny, custom, f"{tiny}: needs no custom operators: leave --custom-ops out"),
    ):
        flags = ("--text", text, "--reference", reference, *SMALL, "--custom-ops", text)
        assert satchel.refuses("eval", bundle, *flags).startswith(says)
