"""Providers: what a user may choose, which bundles run where, and the flags that say it."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import onnxruntime as ort
import pytest
from support.command import Satchel
from support.tiny_bundle import read_manifest, write_manifest
from support.tiny_cuda_bundle import write_cuda_bundle
from support.tiny_static_bundle import write_static_bundle

from satchel.runtime.bundle.manifest import Manifest
from satchel.runtime.cli import provider_flags
from satchel.runtime.errors import BundleError, PromptError, ProviderError
from satchel.runtime.execution.engine import Engine
from satchel.runtime.ort.experimental.placement import RECORD, strayed_nodes
from satchel.runtime.ort.open_bundle import open_bundle
from satchel.runtime.ort.providers import CPU, PROVIDERS, ProviderChoice

BOTH = "both of them"
RUNNING = ("run", "chat", "eval", "verify", "bench", "profile")


def parsed(*flags: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    provider_flags.add_flags(parser)
    return parser.parse_args(flags)


def test_flags_make_a_choice() -> None:
    flags = ("--provider", "cuda", "--provider-option", "device_id=1", "--provider-option", "use_tf32=1", "--strict")
    assert provider_flags.choice_of(parsed(*flags)) == ProviderChoice(
        "cuda", {"device_id": "1", "use_tf32": "1"}, strict=True
    )
    assert provider_flags.choice_of(parsed()) == CPU


@pytest.mark.parametrize(
    ("provider", "options", "facts"),
    [
        ("tpu", [], "--provider tpu: .*cpu, cuda, cann"),
        ("cpu", ["x=1"], "--provider-option x=1: cpu has no such option"),
        ("cann", ["dynamic_dims=1"], "--provider-option dynamic_dims=1: .*choose one of arena_extend_strategy, "),
        ("cuda", ["device_id"], "KEY=VALUE"),
        ("cuda", ["=1"], "KEY=VALUE"),
        ("cuda", [""], "KEY=VALUE"),
        ("cuda", ["device_id=1", "device_id=2"], r"device_id.*\b1\b.*\b2\b"),
        ("cuda", ["device_id=first"], "device_id=first: must be a whole number"),
    ],
)
def test_what_is_not_known_or_no_option_is_refused(provider: str, options: list[str], facts: str) -> None:
    with pytest.raises((ProviderError, PromptError), match=facts):
        _ = provider_flags.choice_of(
            parsed("--provider", provider, *(f"--provider-option={each}" for each in options))
        ).device


WRITERS: dict[str, Callable[[Path], Path]] = {"cuda": write_cuda_bundle, "cann": write_static_bundle}


@pytest.mark.parametrize("target", WRITERS)
@pytest.mark.parametrize("provider", WRITERS)
def test_what_is_for_another_target_or_not_installed_is_refused(tmp_path: Path, provider: str, target: str) -> None:
    message = f"exported for {target}: export it again with --target {provider}"
    if provider == target:
        message = f"has no {PROVIDERS[provider].ort_name}, only .*CPU.* install onnxruntime-"
    with pytest.raises(ProviderError, match=message):
        Engine.open(open_bundle(WRITERS[target](tmp_path / "bundle")), provider)


@pytest.mark.parametrize("command", RUNNING)
def test_every_command_that_runs_a_bundle_has_the_flags(
    satchel: Satchel, tiny: Path, tmp_path: Path, command: str
) -> None:
    (tmp_path / "text").write_text("the cat")
    more = {"run": ["x"], "eval": ["--text", tmp_path / "text"]}.get(command, [])
    said = satchel.refuses(command, tiny, *more, "--provider", "cuda", "--provider-option", "moon=1", "--strict")
    assert said.startswith("--provider-option moon=1: cuda has no such option: choose one of ")


def test_the_real_cpu_provider_has_every_node(tiny: Path) -> None:
    options = ort.SessionOptions()
    options.add_session_config_entry(RECORD, "1")
    session = ort.InferenceSession(tiny / "decode.onnx", options, providers=["CPUExecutionProvider"])
    assert strayed_nodes(session, CPU) == []
    strayed = strayed_nodes(session, ProviderChoice("cuda"))
    assert strayed is not None
    assert any(node.startswith("GroupQueryAttention ") and node.endswith("(CPUExecutionProvider)") for node in strayed)
    assert not any(node.startswith(("Shape ", "Squeeze ")) for node in strayed)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda graphs: graphs["decode"]["outputs"].pop(), BOTH),
        (lambda graphs: graphs["decode"]["outputs"][-1].update(dtype="int32"), "int64"),
        (lambda graphs: graphs["decode"]["outputs"][-2].update(dtype="float16"), "float32"),
        (lambda graphs: graphs["decode"]["outputs"][-1].update(shape=["batch", 1, 3]), "equal in shape"),
        (lambda graphs: graphs["decode"]["outputs"][-1].update(shape=["batch", 1, "k"]), "a number of tokens"),
        (lambda graphs: [graphs["decode"]["outputs"].pop() for _ in range(2)], "as many top tokens"),
        (lambda graphs: graphs["score"]["outputs"].extend(graphs["decode"]["outputs"][-2:]), BOTH),
    ],
)
def test_best_tokens_that_make_no_sense_are_refused(
    tmp_path: Path, change: Callable[[dict[str, dict]], object], message: str
) -> None:
    folder = write_cuda_bundle(tmp_path / "bundle")
    document = read_manifest(folder)
    change(document["graphs"])
    write_manifest(folder, document)
    with pytest.raises(BundleError, match=message):
        Manifest.read(folder / "manifest.json")
