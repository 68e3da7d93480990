"""Bundles specialized for satchel's own kernels: made, checked, chosen, run, and left where they do not fit."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from support.command import Satchel
from support.kernels import needs_kernels
from support.specialized import IDS, files, logits
from support.tiny_bundle import change_manifest, read_manifest, write_bundle
from support.tiny_native_bundle import write_native_bundle

from satchel.runtime.bundle.reader import Bundle
from satchel.runtime.errors import BundleError, SatchelError, SatchelWarning
from satchel.runtime.execution.engine import Engine
from satchel.runtime.execution.kv_cache import position_bytes
from satchel.runtime.generation.prefix_cache import Prefix
from satchel.runtime.generation.session_file import SavedState, read_state, write_state
from satchel.runtime.kernels import library
from satchel.runtime.optimize import prepare, specialize, trials
from satchel.runtime.ort import session
from satchel.runtime.ort.open_bundle import open_bundle
from satchel.runtime.ort.score_graph import of_every_token
from satchel.runtime.tools.bench.decode_traffic import weight_bytes
from satchel.runtime.tools.inspection.inspection import inspect_bundle


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return write_native_bundle(tmp_path / "bundle")


@pytest.fixture
def made(folder: Path) -> Path:
    specialize.specialize(open_bundle(folder), kernels="satchel", threads=1)
    return folder


@needs_kernels
def test_one_session_serves_both_phases_with_nearly_the_same_logits(made: Path) -> None:
    bundle = open_bundle(made)
    special = bundle.specialized
    assert special is not None
    assert (special.variants, set(special.graphs)) == (("native",), {"prefill"})
    assert len(set(map(id, Engine.open(bundle, threads=1).sessions))) == 1
    given, wanted = logits(bundle), logits(Bundle(made, bundle.manifest))
    assert np.abs(given - wanted).max() < 0.02 * np.abs(wanted).max()
    assert not np.array_equal(given, wanted), "the portable graphs ran"


@needs_kernels
def test_own_kernels_take_more_tokens_of_a_prompt_in_a_run(made: Path) -> None:
    bundle = open_bundle(made)
    own, portable = (
        [span.stop for span in Engine.open(each, threads=1).spans(600)]
        for each in (bundle, dataclasses.replace(bundle, specialized=None))
    )
    assert (own, portable) == ([512, 600], [256, 512, 600])


@needs_kernels
def test_the_cache_is_of_the_native_graphs_type_and_takes_half_the_memory(folder: Path) -> None:
    portable = open_bundle(folder)
    before, whole = position_bytes(portable.kv_cache), inspect_bundle(portable).cache_bytes_per_token
    specialize.specialize(portable, kernels="satchel", threads=1)
    bundle = open_bundle(folder)
    assert (portable.kv_cache.dtype, bundle.kv_cache.dtype) == ("float32", "float16")
    engine = Engine.open(bundle, threads=1)
    cache = engine.new_state(20).cache
    assert {buffer.dtype.name for buffer in cache.past.values()} == {"float16"}
    assert cache.nbytes == 20 * before // 2
    assert inspect_bundle(bundle).cache_bytes_per_token == whole // 2
    for each in (engine, Engine.open(dataclasses.replace(bundle, specialized=None), threads=1)):
        assert each.score([3, 5, 7]).shape[0] == 3, "each score graph has a cache of its own type"


@needs_kernels
@pytest.mark.parametrize("first", ["portable", "native"])
def test_saved_states_serve_graphs_with_another_type_of_cache(made: Path, first: str, tmp_path: Path) -> None:
    native = open_bundle(made)
    portable = dataclasses.replace(native, specialized=None)
    one, other = (portable, native) if first == "portable" else (native, portable)
    ids = np.arange(5, 17)
    engine = Engine.open(one, threads=1)
    state = engine.new_state(len(ids))
    engine.prefill(state, ids)
    write_state(tmp_path / "state", one.fingerprint, SavedState(Prefix(ids, state.cache)))
    found = read_state(tmp_path / "state", other).prefix.cache
    for name, buffer in found.past.items():
        assert buffer.dtype == other.kv_cache.dtype
        wanted = state.cache.past[name][:, :, : len(ids)].astype(np.float16)
        assert np.array_equal(buffer.astype(np.float16), wanted)


@needs_kernels
@pytest.mark.parametrize(
    ("prefill", "step", "native"), [(0.5, 0.01, True), (1.5, 0.01, False), (1.2, 0.008, True)], ids=str
)
def test_auto_keeps_the_faster(
    folder: Path, monkeypatch: pytest.MonkeyPatch, prefill: float, step: float, native: bool
) -> None:
    """A slower prefill is weighed against a faster decode."""
    monkeypatch.setattr(trials, "prefill_seconds", lambda *_: [1.0, 1.0, prefill])
    monkeypatch.setattr(trials, "step_seconds", lambda *_: [0.01, step])
    special = specialize.specialize(open_bundle(folder), threads=1).specialized
    assert special is not None
    assert ("native" in special.variants) is native
    on_disk = {path.name for path in folder.glob("specialized-*")}
    assert on_disk == set(special.files), "the other form is taken away"
    assert open_bundle(folder).specialized == special


@needs_kernels
@pytest.mark.parametrize("flags", [["--kernels", "onnxruntime"], ["--layout", "stored"]])
def test_who_asks_for_onnx_runtime_gets_it(satchel: Satchel, folder: Path, flags: list[str]) -> None:
    satchel("specialize", folder, "--threads", 1, *flags)
    assert read_manifest(folder)["specialized"]["graphs"]["prefill"]["variant"] is None


@needs_kernels
def test_the_commands_run_on_them(satchel: Satchel, made: Path) -> None:
    assert satchel.json("inspect", made)["specialized"]["graphs"]["prefill"]["variant"] == "native"
    assert "Linear" in satchel("profile", made, "--threads", 1, "--prompt-tokens", 8, "--new-tokens", 2).out


@needs_kernels
def test_eval_measures_the_kernels_that_answer_and_says_so(satchel: Satchel, made: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat and looked at the other cat, which sat elsewhere. " * 4)
    flags = ("--text", text, "--windows", 2, "--window-tokens", 30, "--skip", 6, "--threads", 1, "--quiet")
    flags += ("--reference", made)
    native, portable = satchel.json("eval", made, *flags), satchel.json("eval", made, "--portable", *flags)
    assert native["graphs"] == {"prefill": "native", "decode": "native"}
    assert portable["graphs"] == {"prefill": "portable", "decode": "portable"}
    assert satchel("eval", made, *flags).out.splitlines()[-1].split() == ["graphs", "native", "native"]
    for phase in ("prefill", "decode"):
        found, other = native[phase]["perplexity"], portable[phase]["perplexity"]
        assert found != other
        assert portable[phase]["kl_mean"] < 1e-6 < native[phase]["kl_mean"], "the reference is portable"
        assert found == pytest.approx(other, rel=0.02)


@needs_kernels
def test_eval_measures_the_copy_in_the_cache_that_the_user_runs(
    satchel: Satchel, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare.machine, "is_in_place", lambda _: False)
    prepare.prepare(folder, kernels="satchel", threads=1)
    assert open_bundle(folder, custom=None).specialized is None
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat and looked at the other cat. " * 4)
    found = satchel.json("eval", folder, "--text", text, "--window-tokens", 30, "--skip", 6, "--threads", 1)
    assert found["graphs"]["prefill"] == "native"


@needs_kernels
def test_the_graph_of_every_token_is_opened_when_it_is_asked_for(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    started = session._open

    def noted(bundle: Bundle, name: str, *rest: object) -> object:
        opened.append(name)
        return started(bundle, name, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(session, "_open", noted)
    bundle = open_bundle(made)
    engine = Engine.open(bundle, threads=1)
    prefill = engine.prefill(engine.new_state(len(IDS)), IDS).copy()
    assert len(opened) == 1
    rows = engine.score(IDS)
    assert opened == [bundle.specialized.graphs["prefill"].file] * 2, "no other graph, and no other weights"  # type: ignore[union-attr]
    np.testing.assert_array_equal(rows[-1], prefill)


@needs_kernels
def test_a_graph_that_takes_the_last_token_otherwise_is_not_measured(made: Path) -> None:
    bundle = open_bundle(made)
    model = (made / bundle.specialized.graphs["prefill"].file).read_bytes()  # type: ignore[union-attr]
    assert isinstance(of_every_token(model), bytes)
    with pytest.raises(BundleError, match="last token in a known way"):
        of_every_token(model.replace(b"LastToken", b"LastTaken"))


@needs_kernels
def test_a_step_reads_the_native_graphs_weights(made: Path) -> None:
    bundle = open_bundle(made)
    products = 2 * (64 * 64 * 2 + 64 * 32 * 2) * 4  # q, k, v and o of two layers
    gains = 64 * 4
    assert weight_bytes(bundle) == products + gains + 25 * (64 * 16 + 64)
    assert weight_bytes(Bundle(made, bundle.manifest)) == products + gains + 400 * 64 + 400 * 4


@needs_kernels
def test_wrong_logits_are_noticed(tmp_path: Path, folder: Path) -> None:
    wrong = write_native_bundle(tmp_path / "wrong", hadamard=64)
    before = files(wrong)
    with pytest.raises(SatchelError, match="the specialized graphs differ"):
        specialize.specialize(open_bundle(wrong), kernels="satchel", threads=1)
    assert files(wrong) == before
    with pytest.warns(SatchelWarning, match="satchel's own kernels are left out: "):
        special = specialize.specialize(open_bundle(wrong), threads=1).specialized
    assert special is not None
    assert not special.variants
    assert {path.name for path in wrong.glob("specialized-*")} == set(special.files)


@needs_kernels
@pytest.mark.parametrize(
    ("why", "reason", "remedy"),
    [
        ("off", "SATCHEL_KERNELS=off", "satchel specialize"),
        ("missing", "are not built", "satchel specialize"),
        ("version", f"version 0 of satchel's own kernels.*version {library.VERSION}", "export it again"),
    ],
)
def test_elsewhere_the_portable_graphs_run(
    made: Path, monkeypatch: pytest.MonkeyPatch, why: str, reason: str, remedy: str
) -> None:
    if why == "off":
        monkeypatch.setenv("SATCHEL_KERNELS", "off")
    elif why == "missing":
        monkeypatch.setattr(library, "__file__", str(made / "library.py"))
    else:
        change_manifest(made, "variants", 0, "kernel_abi", to=0)
    with pytest.warns(SatchelWarning, match=f"portable graphs.*{reason}.*: {remedy}"):
        bundle = open_bundle(made)
    np.testing.assert_array_equal(logits(bundle), logits(Bundle(made, bundle.manifest)))


@pytest.fixture
def off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SATCHEL_KERNELS", "off")


@pytest.mark.usefixtures("off")
def test_without_the_library_auto_makes_the_forms_of_onnx_runtime(folder: Path) -> None:
    special = specialize.specialize(open_bundle(folder), threads=1).specialized
    assert special is not None
    assert not special.variants


@pytest.mark.usefixtures("off")
@pytest.mark.parametrize(
    ("flags", "fact"), [([], "SATCHEL_KERNELS=off"), (["--layout", "int8"], "--kernels satchel with --layout")]
)
def test_kernels_that_cannot_be_had_are_an_error(satchel: Satchel, folder: Path, flags: list[str], fact: str) -> None:
    before = files(folder)
    assert fact in satchel.refuses("specialize", folder, "--kernels", "satchel", *flags)
    assert files(folder) == before


@needs_kernels
def test_a_bundle_without_a_native_graph_says_so(satchel: Satchel, tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "plain")
    assert "has no variant for them" in satchel.refuses("specialize", folder, "--kernels", "satchel")


@needs_kernels
def test_a_library_that_does_not_load_is_named(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = open_bundle(made)
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"no library")
    monkeypatch.setattr(library, "_built", lambda: broken)
    with pytest.raises(BundleError, match=r"cannot be loaded .*broken.so.*install satchel again"):
        Engine.open(bundle, threads=1)
