"""The base package alone, in an environment that has its dependencies and nothing else, runs a bundle."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import venv
from importlib.metadata import Distribution, distribution
from pathlib import Path

import pytest
from integration.conftest import CHECKOUT
from packaging.requirements import Requirement
from support.checkpoints import save_tiny

from satchel.export import ExportConfig, export_bundle

pytestmark = pytest.mark.slow

EXPORTER_ONLY = {"torch", "transformers", "onnx", "onnx_ir", "onnxscript", "safetensors", "gguf"}


def with_requirements(name: str, found: dict[str, Distribution]) -> None:
    """Collect an installed distribution and all that it requires, by name."""
    if name.lower() in found:
        return
    found[name.lower()] = distribution(name)
    for line in found[name.lower()].requires or ():
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            with_requirements(requirement.name, found)


def site_packages(environment: Path) -> Path:
    (found,) = environment.glob("lib/python*/site-packages")
    return found


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with satchel as `pip install .` gives it, and links to its dependencies (no network)."""
    root = tmp_path_factory.mktemp("base")
    source = root / "source"
    for name in ("export", "graphs", "runtime"):
        shutil.copytree(CHECKOUT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(CHECKOUT / name, source)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "install"]
    venv.create(root / "env", symlinks=True)
    site = site_packages(root / "env")
    subprocess.run([*pip, "--no-deps", "--no-build-isolation", "--target", str(site), str(source)], check=True)
    found: dict[str, Distribution] = {}
    for line in distribution("satchel").requires or ():
        requirement = Requirement(line)
        if requirement.marker is None:
            with_requirements(requirement.name, found)
    for dependency in found.values():
        for top in {file.parts[0] for file in dependency.files or () if file.parts[0] not in ("..", "__pycache__")}:
            target = site / top
            if not target.exists():
                target.symlink_to(dependency.locate_file(top))
    return root / "env"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny(folder / "checkpoint", tokenizer=True)
    export_bundle(folder / "checkpoint", ExportConfig(folder / "bundle"))
    return folder / "bundle"


def python(environment: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [str(environment / "bin" / "python"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=environment)


def test_the_environment_has_no_training_framework(environment: Path) -> None:
    there = {path.name for path in site_packages(environment).iterdir()}
    assert there >= {"satchel", "numpy", "onnxruntime", "tokenizers"}
    assert there.isdisjoint(EXPORTER_ONLY)


def test_the_command_runs_a_bundle(environment: Path, bundle: Path) -> None:
    run = ("run", bundle, "the cat", "--max-new-tokens", "8", "--json")
    done = python(environment, "-m", "satchel.runtime.cli.main", *run)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["new_tokens"] > 0


def test_generating_in_python_loads_nothing_of_the_exporter(environment: Path, bundle: Path) -> None:
    code = """
import sys
from satchel.runtime import Generator
assert Generator.open(sys.argv[1], threads=1).generate("the cat", 4).token_ids
print(*{name.split(".")[0] for name in sys.modules})
"""
    done = python(environment, "-c", code, bundle)
    assert (done.returncode, done.stderr) == (0, "")
    assert set(done.stdout.split()).isdisjoint(EXPORTER_ONLY)


def test_exporting_says_what_to_install(environment: Path, tmp_path: Path) -> None:
    done = python(environment, "-m", "satchel.runtime.cli.main", "export", tmp_path, "-o", tmp_path / "bundle")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert "is not installed: pip install " in done.stderr
    assert list(tmp_path.iterdir()) == []
