"""A model's graph does not hang on the order of sets of texts, which varies from process to process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.families import FAMILIES, build, save

from satchel.export.tracing.stand_ins import sets_in_order

EXPORT = """
import sys
from pathlib import Path
from satchel.export import ExportConfig, export_bundle
checkpoint, output, context = sys.argv[1:]
export_bundle(checkpoint, ExportConfig(Path(output), "fp32", max_context=int(context), certificate=False))
"""


def test_sets_of_a_model_are_iterated_in_order() -> None:
    module = build(FAMILIES["gemma3n_text"])
    names = [f"type {number}" for number in range(40)]
    module.held = set(names)
    file = vars(sys.modules[type(module).__module__])
    with sets_in_order(module):
        assert list(module.held) == list(file["set"](names)) == sorted(names)
        assert "type 3" in module.held
    assert type(module.held) is set and "set" not in file


@pytest.mark.slow
def test_each_process_traces_the_same_graph(tmp_path: Path) -> None:
    family = FAMILIES["gemma3n_text"]
    checkpoint = save(family, tmp_path / "checkpoint")
    for seed in ("1", "2"):  # which order two types of layers differently
        command = [sys.executable, "-c", EXPORT, checkpoint, tmp_path / seed, str(family.context)]
        subprocess.run(command, check=True, env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True)
    assert (tmp_path / "1" / "prefill.onnx").read_bytes() == (tmp_path / "2" / "prefill.onnx").read_bytes()
