"""`satchel plan`: its formulas against their sources, its verdicts, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.command import Satchel

from satchel.export.planning.config_shape import shape_of
from satchel.export.planning.families import FAMILIES
from satchel.export.planning.model import Planned
from satchel.export.planning.plan import PIPELINE, TENSOR, make_plan
from satchel.export.planning.shape import Cut
from satchel.export.planning.speed import (
    ATTENTION_REACHED,
    INT8_REACHED,
    LAYER_SECONDS,
    PREFILL_REACHED,
    REACHED,
    Machine,
    Network,
    all_reduce,
    decode_seconds,
    gather,
    pipeline_messages,
    prefill_seconds,
    tensor_messages,
)
from satchel.export.planning.stored import Precision
from satchel.export.recipes import load_recipe
from satchel.runtime.util.child import python_path

CONFIGS = Path(__file__).parents[2] / "samples/configs"
GIGABIT = Network(125e6, 50e-6)
DEVICE = ("--bandwidth", 10, "--compute", 100, "--memory", 16)


def model_of(name: str, precision: str, **changes: Any) -> Planned:
    table = json.loads((CONFIGS / f"{name}.json").read_text()) | changes
    shape = shape_of(table, name)
    recipe = None if precision.startswith("fp") else load_recipe(precision)
    return Planned(name, shape, Precision(precision, recipe, 4).fitted(shape), 4096)


class Adding(Planned):
    joined = ()


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("llama-2-70b", 68_976_648_192), ("llama-3-8b", 8_030_261_248), ("qwen2-72b", 72_706_203_648)],
)
def test_models_have_the_published_number_of_parameters(name: str, parameters: int) -> None:
    """The sums of the sizes in the published safetensors files."""
    assert model_of(name, "fp32").parameters == parameters


def test_a_bundle_reads_each_weight_but_the_table_once() -> None:
    model = model_of("llama-3-8b", "fp16")
    table = 2 * 128256 * 4096
    assert model.weights() - model.read() == pytest.approx(table, rel=0.01)
    assert model.cache() == 32 * 8 * 128 * 2 * 4
    assert model_of("llama-3-8b", "int4").weights() / model.weights() == pytest.approx(0.2975, abs=0.002)


def test_experts_count_whole_in_memory_and_as_chosen_in_what_a_token_reads() -> None:
    experts = {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2}
    dense, mixed = model_of("llama-3-8b", "fp16"), model_of("llama-3-8b", "fp16", **experts)
    feed = 32 * 3 * 4096 * 14336
    assert mixed.parameters - dense.parameters == 7 * feed + 32 * 8 * 4096
    assert mixed.active_parameters - dense.active_parameters == feed + 32 * 8 * 4096


def test_windows_bound_what_is_read_and_not_what_is_kept() -> None:
    whole, windowed = (
        model_of("llama-3-8b", "fp32", model_type="mistral", sliding_window=window) for window in (None, 100)
    )
    assert windowed.cache() == whole.cache()
    assert windowed.cache_read(1000) == whole.cache_read(100) == 100 * whole.cache()


def test_a_latent_is_kept_once_for_all_heads_and_on_every_device() -> None:
    """DeepSeek-V2-Lite in docs/models.md: 27 layers, 512 + 64 numbers of a token in each."""
    table = {
        "model_type": "deepseek_v2", "num_hidden_layers": 27, "num_attention_heads": 16, "kv_lora_rank": 512,
        "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128, "hidden_size": 2048,
    }  # fmt: skip
    model = model_of("llama-3-8b", "fp32", **table)
    assert model.cache() == model.cache(4) == 62_208


@pytest.mark.parametrize("devices", [1, 2, 3, 5, 8])
def test_devices_together_have_a_model_at_least_once(devices: int) -> None:
    model = model_of("llama-2-70b", "fp16")
    assert devices * model.weights(devices) >= model.weights() * 0.999
    assert devices * model.weights(1, devices) >= model.weights() * 0.999
    assert model.cache(devices) == math.ceil(8 / devices) * model.cache() // 8


@pytest.mark.parametrize(("devices", "queries", "keys"), [(1, 12, 4), (3, 6, 2), (4, 3, 1), (8, 2, 1), (12, 1, 1)])
def test_heads_of_keys_stay_with_their_queries(devices: int, queries: int, keys: int) -> None:
    assert Cut(4, 12).share(devices) == queries / 12
    assert Cut(4, 12, keyed=True).share(devices) == keys / 4


def test_an_all_reduce_takes_the_faster_one_of_both_algorithms() -> None:
    small, large = all_reduce(1_000, 4, GIGABIT), all_reduce(1e6, 4, GIGABIT)
    assert (small.count, small.sent) == (2, 2_000)
    assert (large.count, large.sent) == (4, 1.5e6)
    assert large.latency == pytest.approx(200e-6)
    assert large.transfer == pytest.approx(12e-3)
    odd = all_reduce(1_000, 5, GIGABIT)
    assert (odd.count, odd.sent) == (4, 4_000)
    assert all_reduce(1_000, 1, GIGABIT).count == 0
    assert gather(1e6, 4, GIGABIT).sent == 0.75e6


def test_a_parallel_block_is_reduced_once() -> None:
    serial = model_of("llama-3-8b", "fp16")
    parallel = model_of("llama-3-8b", "fp16", model_type="cohere")
    assert (serial.reductions, parallel.reductions) == (64, 32)
    several = tensor_messages(serial, 2, GIGABIT)
    assert several.count == 65 + 1
    assert several.sent == 65 * 4 * 4096 + 128256 * 4 / 2
    assert pipeline_messages(serial, 4, GIGABIT).sent == 3 * 4 * 4096 + 4 * 128256


def test_devices_hand_each_other_parts_where_inputs_are_rounded() -> None:
    model, tokens = model_of("llama-3-8b", "int8"), 3
    found = tensor_messages(model, 4, GIGABIT, tokens)
    sums = all_reduce(4 * 4096 * tokens, 4, GIGABIT)
    assert found.count == sums.count + 2 + 32 * 4 * 2, "the table, the logits, and 4 gathers in two steps a layer"
    inner = 3 * 4096 + 14336
    assert found.sent == sums.sent + 0.75 * 4 * (128256 + 32 * tokens * inner)


def test_published_figures_of_four_devices_follow_from_those_of_two() -> None:
    """distributed-llama, Llama 3 8B Q40 on Raspberry Pi 5: 2 boards 3.07 tokens/s (messages take 56 ms), 4 boards 4.08.

    Bandwidth and latency are those of 2 boards; the second row is what the formulas say. Its devices add parts of sums.
    """
    model, length = Adding(**vars(model_of("llama-3-8b", "int4"))), 128
    read = model.read(2) / REACHED
    machine = Machine(read / (1 / 3.07 - 0.056 - decode_seconds(model, Machine(math.inf), length)))
    transfer = tensor_messages(model, 2, GIGABIT)
    network = dataclasses.replace(GIGABIT, latency=(0.056 - transfer.transfer) / transfer.count)
    rows = {row.devices: row for row in make_plan(model, machine, network, length).rows if row.way == TENSOR}
    assert rows[2].decode == pytest.approx(3.07, rel=0.05)
    assert rows[4].decode == pytest.approx(4.08, rel=0.15)


def test_a_prompt_takes_what_its_layers_and_its_attention_take() -> None:
    tokens, ops = 512, 2 * 512 * 32 * (2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    attention = 2 * 512**2 * 4096 * 32
    known = Machine(1e12, 4e11, None, True, 4e12)
    for precision, floats, int8 in (("int8", 0.0, ops), ("fp32", ops, 0.0)):
        seconds = prefill_seconds(model_of("llama-3-8b", precision), known)
        reached = ATTENTION_REACHED if int8 else PREFILL_REACHED[precision]
        wanted = int8 / (4e12 * INT8_REACHED["int8"]) + (floats + attention) / (4e11 * reached)
        assert seconds == pytest.approx(wanted + 32 * LAYER_SECONDS, rel=1e-3), precision
    unknown = dataclasses.replace(known, int8=None)
    assert prefill_seconds(model_of("llama-3-8b", "int8"), unknown, tokens=tokens) == pytest.approx(
        (ops + attention) / (4e11 * PREFILL_REACHED["int8"]) + 32 * LAYER_SECONDS, rel=1e-3
    )


def test_the_verdict_names_the_devices_that_are_enough() -> None:
    model = model_of("llama-2-70b", "int4")
    plan = make_plan(model, Machine(50e9, None, 16e9), GIGABIT, 512, 16)
    fitting = min(row.devices for row in plan.rows if row.fits)
    assert not plan.rows[0].fits
    assert fitting == 3
    assert "3 devices" in plan.verdict[0]
    none = make_plan(model, Machine(50e9, None, 1e9), GIGABIT, 512)
    assert not any(row.fits for row in none.rows)
    assert len(none.verdict) == 1


def test_fewer_devices_are_recommended_where_messages_are_slow() -> None:
    model = model_of("llama-3-8b", "int4")
    slow = make_plan(model, Machine(100e9, None, 64e9), Network(125e6, 1e-3), 512, 8)
    fast = make_plan(model, Machine(10e9, None, 64e9), Network(12.5e9, 5e-6), 512, 8)
    assert "Use 1 device" in slow.verdict[-1]
    assert fast.verdict[-1].startswith("8 devices")
    assert {row.way for row in slow.rows} == {TENSOR, PIPELINE}


def test_json_has_all_rows(satchel: Satchel) -> None:
    found = satchel.json("plan", CONFIGS / "llama-2-70b.json", "-p", "int4", *DEVICE, "--devices", 4)
    tensor = [row["devices"] for row in found["rows"] if row["way"] == TENSOR]
    assert tensor == list(range(1, 17))
    assert found["weights"] == found["rows"][0]["weights"]
    assert found["rows"][0]["prefill"] > 0
    text = satchel("plan", CONFIGS / "llama-2-70b.json", "-p", "int4", *DEVICE).out
    assert "too large" in text


def test_a_bundle_is_planned_from_its_files(satchel: Satchel, tiny_bundle: Path) -> None:
    found = satchel.json("plan", tiny_bundle, *DEVICE)
    inside = json.loads((tiny_bundle / "manifest.json").read_text())
    assert found["weights"] == inside["files"]["weights.bin"]["bytes"]
    assert found["precision"] == inside["precision"]
    satchel.refuses("plan", tiny_bundle, *DEVICE, "-p", "a16w4")


def test_nothing_of_the_exporter_is_imported_for_a_config() -> None:
    code = (
        "import sys; from satchel.runtime.cli.main import main; main(sys.argv[1:]);"
        "print(sorted(m for m in ('torch', 'transformers', 'onnx', 'onnx_ir', 'gguf') if m in sys.modules))"
    )
    words = ("plan", str(CONFIGS / "llama-3-8b.json"), "--bandwidth", "10", "--quiet")
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, *words], capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": python_path()},
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_device_that_is_not_described_is_this_machine(satchel: Satchel) -> None:
    found = satchel.json("plan", CONFIGS / "llama-3-8b.json", "--devices", 1)
    assert found["device"]["measured"]
    assert min(found["device"][name] for name in ("bandwidth", "compute", "memory")) > 1e8
    assert found["rows"][0]["prefill"] > 0


def test_the_page_shows_what_the_command_prints(satchel: Satchel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(CONFIGS.parents[1])
    text = Path("docs/planning.md").read_text()
    shown = re.findall(r"```console\n\$ satchel (.*?)\n(.*?)```", text, re.DOTALL)
    assert len(shown) == 2
    for command, expected in shown:
        assert satchel(*shlex.split(command)).out == expected
    assert set(re.findall(r"`([\w-]+)`", text.partition("## Families")[2])) == {*FAMILIES, "text_config"}


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": None}, {"model_type": "unheard-of"}, {"hidden_size": 0}, {"hidden_size": None},
        {"hidden_size": 1 << 40}, {"num_hidden_layers": 1 << 20}, {"num_attention_heads": "32"},
        {"num_key_value_heads": 64}, {"vocab_size": -1}, {"intermediate_size": True},
        {"layer_types": ["full_attention"]},
        {"layer_types": ["other"] * 32}, {"max_position_embeddings": None}, {"partial_rotary_factor": 7},
    ],
)  # fmt: skip
def test_impossible_configs_are_refused_in_one_line(satchel: Satchel, tmp_path: Path, changes: dict[str, Any]) -> None:
    table = json.loads((CONFIGS / "llama-3-8b.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(table))
    satchel.refuses("plan", tmp_path, *DEVICE)


@pytest.mark.parametrize("content", ["", "[]", "{", "null", "[" * 100_000])
def test_files_that_are_no_configs_are_refused(satchel: Satchel, tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    satchel.refuses("plan", tmp_path / "config.json", *DEVICE)
    satchel.refuses("plan", tmp_path / "missing.json", *DEVICE)


@pytest.mark.parametrize(
    "words",
    [
        ("-p", "int3"), ("-p", "stored"), ("--kv-cache", "int2"), ("--devices", 0), ("--devices", 1 << 40),
        ("--memory", 0), ("--bandwidth", "nan"), ("--bandwidth", "1e300"), ("--network", 0), ("--latency", -1),
        ("--compute", "inf"), ("--max-context", 0), ("--max-context", 9000), ("--length", 0), ("--length", 5000),
    ],
)  # fmt: skip
def test_impossible_flags_are_refused_in_one_line(satchel: Satchel, words: tuple[Any, ...]) -> None:
    satchel.refuses("plan", CONFIGS / "llama-3-8b.json", *DEVICE, *words)
