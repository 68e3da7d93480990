"""The runner stays light: a fresh interpreter generates text without any package of the exporter."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EXPORTER_ONLY = ["torch", "transformers", "onnx", "onnx_ir", "onnxscript", "safetensors", "gguf"]


def run_python(code: str, *arguments: str | Path) -> str:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def test_generating_text_loads_no_package_of_the_exporter(tiny: Path) -> None:
    code = """
import importlib, pkgutil, sys
import satchel.runtime
for module in pkgutil.walk_packages(satchel.runtime.__path__, "satchel.runtime."):
    if not module.name.endswith(".kernels._library"):  # operators for ONNX Runtime: no module of Python
        importlib.import_module(module.name)
assert satchel.runtime.Generator.open(sys.argv[1], threads=1).generate("the cat", 5).token_ids
packages = {name.split(".")[0] for name in sys.modules} | {".".join(name.split(".")[:2]) for name in sys.modules}
print(*sorted(packages))
"""
    loaded = set(run_python(code, tiny).split())
    assert {"numpy", "onnxruntime", "tokenizers", "satchel.runtime"} <= loaded
    assert loaded.isdisjoint([*EXPORTER_ONLY, "satchel.export", "satchel.graphs"])


def test_every_module_of_the_runner_imports_when_the_exporters_packages_are_not_installed() -> None:
    code = f"""
import importlib, pkgutil, sys
sys.modules.update(dict.fromkeys({EXPORTER_ONLY!r}))
import satchel.runtime
names = [module.name for module in pkgutil.walk_packages(satchel.runtime.__path__, "satchel.runtime.")]
for name in names:
    if not name.endswith(".kernels._library"):
        importlib.import_module(name)
print(len(names))
"""
    assert int(run_python(code)) > 10


@pytest.mark.parametrize(
    "module",
    ["satchel.runtime", "satchel.runtime.cli.main", "satchel.runtime.bundle.manifest", "satchel.runtime.bundle.dtypes"],
)
def test_a_light_module_loads_neither_numpy_nor_onnx_runtime(module: str) -> None:
    loaded = run_python(f"import sys, {module}; print(*sys.modules)").split()
    assert "numpy" not in loaded
    assert "onnxruntime" not in loaded


def test_a_bundle_that_was_seen_before_is_opened_without_the_library_that_hashes(tiny: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(tiny, tmp_path / "bundle")  # one that no other test has opened
    # Sampling brings it along with numpy.random; an engine alone, as bench has it, does without.
    code = """
import sys
from satchel.runtime import Engine, open_bundle
Engine.open(open_bundle(sys.argv[1]), threads=1)
print(*sys.modules)
"""
    assert "_hashlib" in run_python(code, bundle).split()
    assert {"_hashlib", "unicodedata"}.isdisjoint(run_python(code, bundle).split())


def test_the_package_offers_each_name_that_it_declares() -> None:
    code = "import satchel.runtime as r; print(*(getattr(r, name).__name__ for name in r.__all__)); print(*r.__all__)"
    found, declared = run_python(code).splitlines()
    assert found == declared


def test_onnx_runtime_writes_no_identifier_into_the_users_cache(tiny: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    environment = {k: v for k, v in os.environ.items() if k != "ORT_DISABLE_TELEMETRY"} | {"XDG_CACHE_HOME": str(cache)}
    command = [sys.executable, "-m", "satchel.runtime.cli.main", "run", str(tiny), "the cat", "--max-new-tokens", "2"]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    assert [path.name for path in cache.iterdir()] == ["satchel"]
