"""What is asked of ONNX Runtime on a device: sessions, memory, bindings, runs. No device: a stand-in notes it all."""

from __future__ import annotations

import gc
import itertools
import warnings
import weakref
from pathlib import Path
from types import ModuleType

import numpy as np
import onnxruntime as ort
import pytest
from support.recorded_device import Device, record_device
from support.tiny_bundle import (
    LAYERS,
    MAX_CONTEXT,
    VOCABULARY,
    change_manifest,
    write_bundle,
)
from support.tiny_cuda_bundle import write_cuda_bundle
from support.tiny_static_bundle import LENGTHS, write_static_bundle

from satchel.runtime.bundle.reader import Bundle
from satchel.runtime.errors import BundleError, ProviderError, SatchelError, SatchelWarning
from satchel.runtime.execution import cpu
from satchel.runtime.execution.engine import Engine
from satchel.runtime.execution.experimental import captured, static
from satchel.runtime.execution.experimental.om_cache import om_folder
from satchel.runtime.execution.experimental.slots import MAX_KEPT
from satchel.runtime.generation.generator import Generator
from satchel.runtime.ort.experimental import device_session
from satchel.runtime.ort.open_bundle import open_bundle
from satchel.runtime.ort.providers import ProviderChoice

IDS = np.random.default_rng(7).integers(3, VOCABULARY, 40)
CACHES = [
    f"{side}.{layer}.{kind}"
    for side in ("past_key_values", "present")
    for layer in range(LAYERS)
    for kind in ("key", "value")
]


@pytest.fixture(scope="module")
def dynamic(tmp_path_factory: pytest.TempPathFactory) -> Generator:
    generator = Generator.open(write_bundle(tmp_path_factory.mktemp("dynamic") / "bundle"), threads=1)
    generator.engine.score(IDS)  # opens that graph while there is no stand-in
    return generator


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def cann(monkeypatch: pytest.MonkeyPatch, home: Path) -> Device:
    return record_device(monkeypatch, "cann")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch, home: Path) -> Device:
    return record_device(monkeypatch, "cuda")


def check_texts(found: Generator, dynamic: Generator) -> None:
    """A conversation, reuse, a batch, samples and beams give what they give on the CPU."""
    ids = IDS[:9].tolist()
    for options in ({}, {"temperature": 1.2, "seed": 4}, {"temperature": 0.9, "top_k": 5, "seed": 2}, {"logprobs": 3}):
        expected, result = (each.generate(ids, 6, **options) for each in (dynamic, found))
        assert result.token_ids == expected.token_ids
        ids += [*result.token_ids, 7, 8]
    assert result.reused_tokens > 0
    batches = [
        each.generate_batch([IDS[:5], IDS[3:20], IDS[:2]], rows=2, max_new_tokens=5) for each in (dynamic, found)
    ]
    assert [each.token_ids for each in batches[1]] == [each.token_ids for each in batches[0]]
    samples = [each.samples(IDS[:5], 3, max_new_tokens=5, temperature=1.3, seed=1) for each in (dynamic, found)]
    assert [each.token_ids for each in samples[1]] == [each.token_ids for each in samples[0]]
    beams = [each.beam_search(IDS[:5], 3, max_new_tokens=5) for each in (dynamic, found)]
    assert [each.token_ids for each in beams[1]] == [each.token_ids for each in beams[0]]
    scores = [each.engine.score(IDS) for each in (dynamic, found)]
    np.testing.assert_allclose(scores[1], scores[0], atol=1e-3)


@pytest.mark.parametrize("parts", [1, 2])
def test_static_graphs_on_cann_give_the_texts_of_the_cpu_and_never_see_a_second_shape(
    cann: Device, dynamic: Generator, tmp_path: Path, parts: int
) -> None:
    check_texts(Generator.open(write_static_bundle(tmp_path / "bundle", parts=parts), provider="cann"), dynamic)
    shapes = {(run.session, tuple(sorted(run.shapes.items()))) for run in cann.runs}
    assert len(shapes) == len(cann.opened) == parts * (len(LENGTHS) + 2)


def test_a_session_on_cann_gets_its_options_and_folds_constants_only(cann: Device, tmp_path: Path) -> None:
    choice = ProviderChoice("cann", {"op_select_impl_mode": "high_precision", "precision_mode": "allow_fp32_to_fp16"})
    Generator.open(write_static_bundle(tmp_path / "bundle"), provider=choice)
    assert len(cann.opened) == len(LENGTHS) + 1
    for each in cann.opened:
        assert each["provider"] == "CANNExecutionProvider"
        assert each["level"] == ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
        assert each["record"] == "1"
        assert each["options"] == {
            "device_id": "0",
            "arena_extend_strategy": "kSameAsRequested",
            "dump_om_model": "1",
            "enable_cann_graph": "1",
            "enable_cann_subgraph": "0",
            "precision_mode": "allow_fp32_to_fp16",
            "op_select_impl_mode": "high_precision",
        }


def test_on_cann_caches_stay_on_the_device_and_swap_and_the_rest_comes_from_the_cpu(
    cann: Device, tmp_path: Path
) -> None:
    engine = Engine.open(open_bundle(write_static_bundle(tmp_path / "bundle", parts=2)), "cann")
    state = engine.new_state(MAX_CONTEXT)
    made = len(cann.values)
    for token in (5, 6, 7, 8):
        engine.decode(state, token)
    assert len(cann.values) == made + 1  # what the first part hands to the second
    assert cann.reads == []  # logits come with the run
    first = [run for run in cann.runs if "past_key_values.0.key" in run.bound]
    for name in ("past_key_values.0.key", "past_key_values.0.value"):
        present = name.replace("past_key_values", "present")
        for before, after in itertools.pairwise(first):
            assert after.bound[name] == before.bound[present] != before.bound[name]
            assert after.bound[name][0] == "cann"
        assert first[2].bound[name] == first[0].bound[name]
    for run in cann.runs:
        on_device = {name for name, (kind, _) in run.bound.items() if kind == "cann"}
        assert on_device == {name for name in run.bound if name in CACHES or name == "h1"}
    assert all(run.bound["logits"][0] == "cpu" for run in cann.runs if "logits" in run.bound)


def test_graphs_are_opened_and_first_run_in_the_folder_of_what_they_compile_to(
    cann: Device, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_static_bundle(tmp_path / "bundle", parts=2)
    monkeypatch.chdir(tmp_path)
    generator = Generator.open("bundle", provider="cann")  # a relative path
    generator.generate(IDS[:20], 5)
    generator.prompt_logprobs(IDS[:20])
    (folder,) = (home / "satchel" / "om").iterdir()
    assert {each["folder"] for each in cann.opened} == {str(folder)}
    seen: set[int] = set()
    for run in cann.runs:
        first = run.session not in seen
        assert run.folder == str(folder if first else tmp_path)
        seen.add(run.session)
    assert Path.cwd() == tmp_path


def test_the_working_directory_comes_back_where_a_first_run_fails(
    cann: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine.open(open_bundle(write_static_bundle(tmp_path / "bundle")), "cann")
    state = engine.new_state(9)
    monkeypatch.chdir(tmp_path)

    def failing(*_: object) -> None:
        raise RuntimeError("E16002: no parser")

    monkeypatch.setattr("support.recorded_device.Session.run_with_iobinding", failing)
    with pytest.raises(SatchelError, match=r"fails at position 0 .*E16002"):
        engine.prefill(state, IDS[:3])
    assert Path.cwd() == tmp_path
    assert state.cache.length == 0


def test_what_is_compiled_has_a_folder_for_each_bundle_option_and_version(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = (open_bundle(write_static_bundle(tmp_path / str(seed), seed=seed)) for seed in (0, 1))
    choice = ProviderChoice("cann")
    folders = [
        om_folder(one, choice),
        om_folder(other, choice),
        om_folder(one, ProviderChoice("cann", {"op_select_impl_mode": "high_precision"})),
    ]
    with monkeypatch.context() as patch:
        patch.setattr(ort, "__version__", "9.9.9")
        folders.append(om_folder(one, choice))
    monkeypatch.setenv("ASCEND_HOME_PATH", "/usr/local/Ascend/8.2")
    folders.append(om_folder(one, choice))
    assert len(set(folders)) == len(folders)
    assert all(folder.parent == home / "satchel" / "om" for folder in folders)


def test_a_folder_that_cannot_be_made_is_one_line(cann: Device, home: Path, tmp_path: Path) -> None:
    home.write_text("no folder")
    with pytest.raises(SatchelError, match="XDG_CACHE_HOME"):
        Generator.open(write_static_bundle(tmp_path / "bundle"), provider="cann")


@pytest.mark.parametrize("shared", [True, False])
def test_graphs_on_cuda_give_the_texts_of_the_cpu(
    cuda: Device, dynamic: Generator, tmp_path: Path, shared: bool
) -> None:
    check_texts(Generator.open(write_cuda_bundle(tmp_path / "bundle", shared=shared), provider="cuda"), dynamic)
    assert all(each["options"]["enable_cuda_graph"] == "1" for each in cuda.opened)


def test_decode_on_cuda_is_captured_once_for_each_set_of_addresses(cuda: Device, tmp_path: Path) -> None:
    engine = Engine.open(open_bundle(write_cuda_bundle(tmp_path / "bundle")), "cuda")
    states = [engine.new_state(20 + i) for i in range(2)]
    for state in states:
        state.prefill(IDS[:7])
    for token in (5, 6, 7):
        for state in states:
            state.decode(token)
    prefill, decode = cuda.runs[:2], cuda.runs[2:]
    assert [run.graph for run in prefill] == ["-1", "-1"]
    assert [run.graph for run in decode] == ["1", "2"] * 3
    assert all(run.shapes["attention_mask"] == (1, MAX_CONTEXT) for run in decode)
    for name in CACHES:
        if name.startswith("past"):
            assert all(run.bound[name] == run.bound[name.replace("past_key_values", "present")] for run in cuda.runs)
    assert cuda.reads == []  # nobody asked for logits


def test_a_slot_serves_one_sequence_after_the_other_with_its_graph(cuda: Device, tmp_path: Path) -> None:
    generator = Generator.open(write_cuda_bundle(tmp_path / "bundle"), provider="cuda", prefix_cache_mib=0)
    for count in (3, 9, 30):
        generator.generate(IDS[:count], 4)
    assert {run.graph for run in cuda.runs} == {"-1", "1"}


def test_more_sequences_than_slots_run_uncaptured(cuda: Device, tmp_path: Path) -> None:
    engine = Engine.open(open_bundle(write_cuda_bundle(tmp_path / "bundle")), "cuda")
    states = [engine.new_state(9) for _ in range(MAX_KEPT + 2)]
    for state in states:
        state.decode(5)
    assert [run.graph for run in cuda.runs] == [str(i + 1) for i in range(MAX_KEPT)] + ["-1", "-1"]
    del states, state
    engine.new_state(9).decode(5)
    assert cuda.runs[-1].graph in {str(i + 1) for i in range(MAX_KEPT)}


@pytest.mark.parametrize(
    ("provider", "write", "module"),
    [("cpu", write_bundle, cpu), ("cuda", write_cuda_bundle, captured), ("cann", write_static_bundle, static)],
)
def test_a_score_that_fails_frees_its_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: Path, provider: str, write: object, module: ModuleType
) -> None:
    if provider != "cpu":
        record_device(monkeypatch, provider)
    engine, released = Engine.open(open_bundle(write(tmp_path / "bundle")), provider), []
    monkeypatch.setattr(type(engine), "release", lambda self, cache: released.append(cache))
    engine.score(IDS[:9])
    assert len(released) == 1

    def failing(*_: object) -> None:
        raise BundleError("a graph fails")

    monkeypatch.setattr(module, "run_bound", failing)
    with pytest.raises(BundleError, match="a graph fails"):
        engine.score(IDS[:9])
    assert len(released) == 2


def test_nothing_is_captured_without_a_mask_of_fixed_length(cuda: Device, tmp_path: Path, dynamic: Generator) -> None:
    folder = write_cuda_bundle(tmp_path / "bundle")
    change_manifest(folder, "graphs", "decode", "inputs", 1, "shape", to=["batch", "total"])
    generator = Generator.open(folder, provider="cuda")
    assert generator.generate(IDS[:9], 5).token_ids == dynamic.generate(IDS[:9], 5).token_ids
    assert cuda.opened[0]["options"]["enable_cuda_graph"] == "0"
    assert {run.graph for run in cuda.runs} == {"-1"}


@pytest.mark.parametrize(
    ("options", "whole"),
    [
        ({}, False),
        ({"temperature": 1.0, "top_k": 5, "seed": 1}, False),
        ({"temperature": 1.0, "top_k": 5, "top_p": 0.9, "seed": 1}, False),
        ({"temperature": 1.0, "top_k": 12, "seed": 1}, True),  # one more would have to be known
        ({"temperature": 1.0, "seed": 1}, True),
        ({"repetition_penalty": 1.2}, True),
        ({"logit_bias": {5: 1.0}}, True),
        ({"logprobs": 2}, True),
    ],
)
def test_logits_are_copied_from_the_device_only_where_they_are_looked_at(
    cuda: Device, dynamic: Generator, tmp_path: Path, options: dict[str, object], whole: bool
) -> None:
    generator = Generator.open(write_cuda_bundle(tmp_path / "bundle"), provider="cuda", prefix_cache_mib=0)
    result = generator.generate(IDS[:9], 6, **options)
    assert result.token_ids == dynamic.generate(IDS[:9], 6, **options).token_ids
    assert ((1, 1, VOCABULARY) in cuda.reads) == whole


def test_logits_that_are_not_finite_are_found_by_the_best_token(
    cuda: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine.open(open_bundle(write_cuda_bundle(tmp_path / "bundle")), "cuda")
    generator = Generator(engine, None, MAX_CONTEXT, Generator.open(engine.bundle.folder, provider="cuda").prefix_cache)
    read = type(engine.new_state(3)).best

    def spoiled(self: object, count: int) -> object:
        found = read(self, count)
        if self.cache.length == 11:
            for result in self._slot.results.values():
                if result._value.held.dtype == np.float32:
                    result._value.held[:] = np.nan
            found = read(self, count)
        return found

    monkeypatch.setattr(type(engine.new_state(3)), "best", spoiled)
    with pytest.raises(SatchelError, match="the logits of step 2 are not finite"):
        generator.generate(IDS[:9], 6)


def test_the_cpu_takes_the_best_tokens_of_the_graph_too(dynamic: Generator, tmp_path: Path) -> None:
    generator = Generator.open(write_cuda_bundle(tmp_path / "bundle"), threads=1)
    check_texts(generator, dynamic)
    state = generator.engine.new_state(9)
    state.prefill(IDS[:4])
    ids, logits = state.best(3)
    assert ids[0] == state.logits.argmax()
    np.testing.assert_array_equal(logits, np.sort(state.logits)[::-1][: len(logits)])
    assert state.best(13) is None


@pytest.mark.parametrize(("provider", "write"), [("cuda", write_cuda_bundle), ("cann", write_static_bundle)])
def test_a_provider_that_does_not_start_is_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, home: Path, provider: str, write: object
) -> None:
    device = record_device(monkeypatch, provider)
    device.starts = False
    with pytest.raises(ProviderError, match=f"--provider {provider}: ONNX Runtime could not start .* --verbose"):
        Engine.open(open_bundle(write(tmp_path / "bundle")), provider)


NORM = ("SimplifiedLayerNormalization", "layer0.norm", "", "CPUExecutionProvider")
SHAPE = ("Shape", "lengths", "", "CPUExecutionProvider")
FOREIGN = ("Gather", "embed", "com.microsoft", "CPUExecutionProvider")


@pytest.mark.parametrize(
    ("placed", "message"),
    [
        ([], None),
        ([SHAPE], None),
        ([SHAPE, NORM], r"prefill.onnx: 1 node runs on another provider than CUDAExecutionProvider: "
         r"SimplifiedLayerNormalization layer0.norm \(CPUExecutionProvider\)"),
        ([NORM] * 5, r"5 nodes run on another .* and 2 more"),
        ([FOREIGN], r"1 node runs on another .* Gather embed"),
    ],
)  # fmt: skip
def test_nodes_on_another_provider_are_told_of_and_refused_where_asked(
    cuda: Device, tmp_path: Path, placed: list[tuple[str, str, str, str]], message: str | None
) -> None:
    bundle = open_bundle(write_cuda_bundle(tmp_path / "bundle"))
    cuda.placed = placed
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Engine.open(bundle, "cuda")
    assert [type(each.message) for each in caught] == [SatchelWarning] * (message is not None)
    if message is None:
        Engine.open(bundle, ProviderChoice("cuda", strict=True))
        return
    assert "\n" not in str(caught[0].message)
    with pytest.raises(ProviderError, match=message + ".*leave --strict out"):
        Engine.open(bundle, ProviderChoice("cuda", strict=True))


def test_an_onnx_runtime_that_does_not_tell_of_placement_is_one_line(cuda: Device, tmp_path: Path) -> None:
    bundle = open_bundle(write_cuda_bundle(tmp_path / "bundle"))
    cuda.tells_placement = False
    with pytest.warns(SatchelWarning, match="which nodes run on CUDAExecutionProvider"):
        Engine.open(bundle, "cuda")
    with pytest.raises(ProviderError, match="which nodes"):
        Engine.open(bundle, ProviderChoice("cuda", strict=True))


def test_on_the_cpu_strict_has_nothing_to_say(dynamic: Generator) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Engine.open(dynamic.engine.bundle, ProviderChoice(strict=True), 1)


def test_the_device_number_is_that_of_the_options(cann: Device, tmp_path: Path) -> None:
    engine = Engine.open(
        open_bundle(write_static_bundle(tmp_path / "bundle")), ProviderChoice("cann", {"device_id": "3"})
    )
    engine.new_state(4)
    assert set(cann.values) == {("cann", 3)}
    assert cann.opened[0]["options"]["device_id"] == "3"


def test_weights_are_handed_over_as_memory_that_stays_with_the_session(
    cann: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handed: list[str] = []
    kept: list[weakref.ref[np.ndarray]] = []
    original = device_session.hand_over_weights

    def noted(bundle: Bundle, name: str, options: ort.SessionOptions) -> list[np.ndarray]:
        handed.append(name)
        arrays = original(bundle, name, options)
        kept.extend(weakref.ref(array) for array in arrays)
        return arrays

    monkeypatch.setattr(device_session, "hand_over_weights", noted)
    bundle = open_bundle(write_static_bundle(tmp_path / "bundle"))
    engine = Engine.open(bundle, "cann")
    assert handed == [f"prefill-{length}-0.onnx" for length in LENGTHS] + ["decode-1-0.onnx"]
    gc.collect()
    assert len(kept) > 10
    assert all(each() is not None for each in kept)
    del engine
    gc.collect()
    assert not any(each() is not None for each in kept)
