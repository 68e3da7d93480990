"""Each extra alone, in an environment that has what it requires and nothing else, does what the documents promise."""

from __future__ import annotations

import json
import subprocess
import urllib.request
from pathlib import Path

import pytest
from support.chat_bundle import write_chat_bundle
from support.checkpoints import gguf_metadata, save_tiny, tiny_model, write_gguf
from support.gguf_families import to_gguf
from support.installed import environment, run, site_packages
from support.tiny_bundle import write_bundle

from satchel.export import ExportConfig, export_bundle

pytestmark = pytest.mark.slow

EXPORTER_ONLY = {"torch", "transformers", "onnx", "onnx_ir", "onnxscript", "safetensors", "gguf"}
CLI = ("-m", "satchel.runtime.cli.main")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return environment(tmp_path_factory)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("tiny")
    export_bundle(save_tiny(place / "checkpoint", tokenizer=True), ExportConfig(place / "bundle", "fp32"))
    return place / "bundle"


def satchel(env: Path, *arguments: str | Path) -> str:
    """What the command prints; it succeeds and says nothing else."""
    done = run(env, *CLI, *arguments)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


def test_the_base_has_no_training_framework(base: Path) -> None:
    there = {path.name for path in site_packages(base).iterdir()}
    assert there >= {"satchel", "numpy", "onnxruntime", "tokenizers"}
    assert there.isdisjoint(EXPORTER_ONLY)


def test_the_base_runs_a_bundle(base: Path, bundle: Path, tmp_path: Path) -> None:
    assert json.loads(satchel(base, "run", bundle, "the cat", "--max-new-tokens", "8", "--json"))["new_tokens"] > 0
    assert satchel(base, "inspect", bundle)
    assert satchel(base, "verify", bundle)
    assert satchel(base, "doctor", bundle)
    satchel(base, "pack", bundle, "-o", tmp_path / "tiny.pyz")
    done = run(base, tmp_path / "tiny.pyz", "the cat", "--max-new-tokens", "4")
    assert done.returncode == 0, done.stderr


def test_the_base_chats(base: Path, tmp_path: Path) -> None:
    chatty = write_chat_bundle(tmp_path / "chatty")
    done = run(base, *CLI, "chat", chatty, "--max-new-tokens", "4", typed="the cat\n")
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_generating_in_python_loads_nothing_of_the_exporter(base: Path, bundle: Path) -> None:
    code = """
import sys
from satchel.runtime import Generator
assert Generator.open(sys.argv[1], threads=1).generate("the cat", 4).token_ids
print(*{name.split(".")[0] for name in sys.modules})
"""
    done = run(base, "-c", code, bundle)
    assert (done.returncode, done.stderr) == (0, "")
    assert set(done.stdout.split()).isdisjoint(EXPORTER_ONLY)


@pytest.mark.parametrize(
    ("arguments", "package"),
    [
        (("export", "{place}", "-o", "{place}/out"), "torch"),
        (("bench", "{bundle}", "--plot", "{place}/speed.png"), "matplotlib"),
        (("sign", "--new-key", "{place}/key"), "cryptography"),
        (("serve", "{bundle}", "--port", "0"), "starlette"),
        (("run", "{bundle}", "the", "--regex", "cat"), "llguidance"),
    ],
)
def test_without_its_extra_a_command_names_the_package(
    arguments: tuple[str, ...], package: str, base: Path, bundle: Path, tmp_path: Path
) -> None:
    done = run(base, *CLI, *(argument.format(place=tmp_path, bundle=bundle) for argument in arguments))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert "pip install" in done.stderr
    assert package in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_extra_export_exports_and_compares_with_a_gguf(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    env, model, text = environment(tmp_path_factory, "export"), tmp_path / "model.gguf", tmp_path / "text"
    tensors = to_gguf("llama", tiny_model("llama"))
    write_gguf(model, "llama", gguf_metadata("llama"), tensors, tokenizer=True)
    text.write_text("the cat sat on the mat and the dog ran to the door. " * 40)
    satchel(env, "export", model, "-o", tmp_path / "bundle", "--precision", "fp32", "--max-context", "64")
    windows = ("--windows", "2", "--window-tokens", "32", "--skip", "4")
    found = satchel(env, "eval", tmp_path / "bundle", "--text", text, "--reference", model, "--json", *windows)
    assert json.loads(found)["windows"] == 2


def test_the_extra_grammar_constrains(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    env = environment(tmp_path_factory, "grammar")
    assert satchel(env, "run", bundle, "the", "--regex", "cat", "--quiet").strip() == "cat"


def test_the_extra_plot_draws(bundle: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    plot = ("--plot", tmp_path / "speed.png", "--prompt-lengths", "4,8", "--new-tokens", "2")
    satchel(environment(tmp_path_factory, "plot"), "bench", bundle, *plot)
    assert (tmp_path / "speed.png").stat().st_size > 0


def test_the_extra_serve_serves(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    env = environment(tmp_path_factory, "serve")
    command = [env / "bin" / "python", *CLI, "serve", bundle, "--port", "0", "--no-specialize"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=env) as process:
        assert process.stderr is not None
        said = process.stderr.readline()
        assert said.startswith("serving "), said + process.stderr.read()
        address = said.split()[-1]
        try:
            for path in ("/", "/v1/models"):
                with urllib.request.urlopen(address + path, timeout=60) as answer:
                    assert answer.status == 200
        finally:
            process.terminate()
            process.communicate(timeout=60)  # it may still write to its log, which must not be closed then
    assert process.returncode == 0


def test_the_extra_sign_signs(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    env, bundle, key = environment(tmp_path_factory, "sign"), write_bundle(tmp_path / "bundle"), tmp_path / "key"
    satchel(env, "sign", "--new-key", key)
    satchel(env, "sign", bundle, "--key", f"{key}.pem")
    satchel(env, "run", bundle, "the cat", "--max-new-tokens", "2", "--require-signature", f"{key}.pub")
