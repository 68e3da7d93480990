"""The wheel for Arm, by emulation: the kernels' own tests, and the tokens of a real model as on this machine.

`make test-arm` makes the Arm system and the bundles first, and names them in SATCHEL_ARM and SATCHEL_ARM_BUNDLES. No
process can start another there, so the prompt is one whose chat template was applied before.
"""

from __future__ import annotations

import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.installed import CHECKOUT

SYSTEM = os.environ.get("SATCHEL_ARM", "")
BUNDLES = [Path(name).resolve() for name in os.environ.get("SATCHEL_ARM_BUNDLES", "").split()]
PROMPT = "<|im_start|>user\nWhat is the capital of Japan?<|im_end|>\n<|im_start|>assistant\n"
RUN = ("--raw", "--json", "--no-specialize", "--threads", "2", "--max-new-tokens", "8")
OPERATORS = ("attention", "convolution", "linear", "ragged", "recurrence")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not SYSTEM, reason="there is no Arm system: `make test-arm` makes one, and runs these"),
]


def on_arm(*arguments: str | Path, folder: Path | None = None, **variables: str) -> str:
    """What the Python of the Arm system prints."""
    command = runpy.run_path(str(CHECKOUT / "packaging" / "arm.py"))["packaged_python"](Path(SYSTEM).resolve())
    return output([*command, *map(str, arguments)], folder, variables)


def output(command: list[str], folder: Path | None = None, variables: dict[str, str] | None = None) -> str:
    environment = {**os.environ, **(variables or {})}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder, env=environment)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def not_by_own_kernels() -> str | None:
    """Why satchel's own kernels do not run there as they are; None if they do."""
    reason: str | None = json.loads(on_arm("-m", "satchel", "doctor", "--json"))["kernels"]["reason"]
    return reason


@pytest.mark.parametrize("operator", OPERATORS)
def test_the_tests_of_the_kernels_pass(operator: str, not_by_own_kernels: str | None) -> None:
    if not_by_own_kernels:
        pytest.skip(f"on Arm, satchel's own operators {not_by_own_kernels}")
    options = ["-q", "-p", "no:cacheprovider", "-c", "../pyproject.toml", "-k", "not (exit or thread)"]
    tests = CHECKOUT / "tests"
    said = on_arm("-m", "pytest", *options, f"runtime/test_kernels_{operator}.py", folder=tests)
    assert "own operators (i8mm)" in said  # the tests compare all sets
    assert "skipped" not in said


@pytest.mark.parametrize("bundle", BUNDLES, ids=lambda path: path.name)
@pytest.mark.parametrize("kernels", ["onnxruntime", "satchel"])
def test_a_model_gives_the_tokens_of_this_machine(
    bundle: Path, kernels: str, not_by_own_kernels: str | None, tmp_path: Path
) -> None:
    if kernels == "satchel" and not_by_own_kernels:
        pytest.skip(f"on Arm, satchel's own operators {not_by_own_kernels}")
    switch = {"SATCHEL_KERNELS": "off"} if kernels == "onnxruntime" else {}
    found = []
    for name, call in (("here", lambda *words, **more: output([sys.executable, *words], None, more)), ("arm", on_arm)):
        place = tmp_path / name
        shutil.copytree(bundle, place, ignore=shutil.ignore_patterns("specialized-*"))
        if kernels == "satchel":
            call("-m", "satchel", "specialize", str(place), "--kernels", "satchel", "--force", "--threads", "2")
        answer: dict[str, Any] = json.loads(call("-m", "satchel", "run", str(place), PROMPT, *RUN, **switch))
        found.append(answer["token_ids"])
    assert len(found[0]) > 4
    assert found[0] == found[1]
