"""Reading a checkpoint keeps nothing of it: memory is bounded by the block, not by the model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from satchel.export.checkpoint.safetensors_file import read_safetensors
from satchel.export.checkpoint.torch_file import read_torch
from satchel.graphs.ir.weights import LazyWeight

ROLLUP = Path("/proc/self/smaps_rollup")
ROWS, COLUMNS = 1 << 14, 1 << 14
LIMIT = 64 << 20


def anonymous_bytes() -> int:
    """The memory of this process that no file backs."""
    line = next(line for line in ROLLUP.read_text().splitlines() if line.startswith("Anonymous:"))
    return int(line.split()[1]) << 10


def check_blocks(weight: LazyWeight) -> None:
    """Read all of a weight in blocks; the highest growth of anonymous memory stays under the limit."""
    before, highest = anonymous_bytes(), 0
    for block in weight.blocks(8 << 20):
        assert not block.any()
        highest = max(highest, anonymous_bytes() - before)
    assert highest < LIMIT


@pytest.mark.slow
@pytest.mark.skipif(not ROLLUP.exists(), reason="needs Linux's smaps_rollup")
def test_rows_of_a_large_safetensors_file_are_not_kept(tmp_path: Path) -> None:
    size = ROWS * COLUMNS * 2
    header = json.dumps({"w": {"dtype": "BF16", "shape": [ROWS, COLUMNS], "data_offsets": [0, size]}}).encode()
    path = tmp_path / "large.safetensors"
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)
    weight = read_safetensors(path)["w"]
    assert weight.nbytes == 1 << 30
    check_blocks(weight)


@pytest.mark.skipif(not ROLLUP.exists(), reason="needs Linux's smaps_rollup")
def test_rows_of_a_large_torch_file_are_not_kept(tmp_path: Path) -> None:
    path = tmp_path / "large.bin"
    torch.save({"w": torch.zeros(1 << 12, 1 << 14, dtype=torch.bfloat16)}, path)
    check_blocks(read_torch(path)["w"])


def test_columns_of_a_mapped_tensor_are_the_tensors_columns(tmp_path: Path) -> None:
    array = torch.arange(35, dtype=torch.float32).reshape(5, 7)
    torch.save({"w": array, "scalar": torch.tensor(3.0)}, tmp_path / "a.bin")
    found = read_torch(tmp_path / "a.bin")
    np.testing.assert_array_equal(found["w"].columns(2, 5), array[:, 2:5].numpy())
    assert found["scalar"].numpy().shape == () and found["scalar"].numpy() == 3.0
