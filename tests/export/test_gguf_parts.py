"""A split GGUF file is read from any of its parts, however they are named, and a part that is missing is named."""

from __future__ import annotations

import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
from support.checkpoints import GGUF_ARCHITECTURES, gguf_metadata, tiny_model, write_gguf
from support.gguf_families import to_gguf

from satchel.export.checkpoint import open_checkpoint
from satchel.export.checkpoint.gguf_parts import open_parts
from satchel.export.errors import ExportError

NUMBERED = [f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
ANY = ["z.gguf", "m-00001-of-00003.gguf", "Part Two.GGUF"]
"""Names that say nothing, or something else than the keys inside."""


def write_parts(folder: Path, names: list[str]) -> list[Path]:
    """A tiny llama in three parts, of which only the first has the metadata."""
    folder.mkdir(exist_ok=True)
    tensors = to_gguf("llama", tiny_model("llama"))
    shares = np.array_split(list(tensors), 3)
    paths = []
    for number, (name, share) in enumerate(zip(names, shares, strict=True)):
        writer = gguf.GGUFWriter(folder / name, GGUF_ARCHITECTURES["llama"])
        if number:
            writer.kv_data[0].pop("general.architecture")
        else:
            for key, value in gguf_metadata("llama").items():
                (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(f"llama.{key}", value)
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", 3)
        writer.add_int32("split.tensors.count", len(tensors))
        for tensor in share:
            writer.add_tensor(tensor, np.ascontiguousarray(tensors[tensor]))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        paths.append(folder / name)
    return paths


@pytest.mark.parametrize("names", [NUMBERED, ANY])
@pytest.mark.parametrize("given", [0, 1, 2])
def test_any_part_opens_the_whole_model(names: list[str], given: int, tmp_path: Path) -> None:
    paths = write_parts(tmp_path, names)
    write_gguf(tmp_path / "another.gguf", "llama", {}, {"token_embd.weight": np.ones((2, 2), np.float32)})
    (tmp_path / "damaged.gguf").write_bytes(b"GGUF\0")
    checkpoint = open_checkpoint(paths[given])
    expected = {name: tensor.numpy() for name, tensor in tiny_model("llama").state_dict().items()}
    assert {name: w.numpy().tobytes() for name, w in checkpoint.weights.items()} == {
        name: array.tobytes() for name, array in expected.items()
    }
    assert set(checkpoint.sources) == set(paths)


def test_two_models_in_one_folder_are_told_apart_by_their_names(tmp_path: Path) -> None:
    paths = write_parts(tmp_path, NUMBERED)
    write_parts(tmp_path, [name.replace("m-", "other-") for name in NUMBERED])
    assert open_parts(paths[1]).parts == tuple(paths)


def test_two_files_for_one_part_are_refused(tmp_path: Path) -> None:
    paths = write_parts(tmp_path, ANY)
    shutil.copy(paths[2], tmp_path / "copy.gguf")
    with pytest.raises(ExportError, match=r"(?=.*copy\.gguf)(?=.*Part Two\.GGUF).*part 3 of 3"):
        open_parts(paths[0])


@pytest.mark.parametrize("names", [NUMBERED, ANY])
@pytest.mark.parametrize("missing", [0, 1, 2])
def test_a_missing_part_is_named(names: list[str], missing: int, tmp_path: Path) -> None:
    paths = write_parts(tmp_path, names)
    paths.pop(missing).unlink()
    with pytest.raises(ExportError, match=rf"part \d of 3.*no part {missing + 1} of 3") as caught:
        open_parts(paths[0])
    assert str(paths[0]) in str(caught.value)


def test_a_damaged_part_is_named(tmp_path: Path) -> None:
    paths = write_parts(tmp_path, NUMBERED)
    paths[1].write_bytes(paths[1].read_bytes()[:100])
    with pytest.raises(ExportError, match=rf"{paths[1].name}: cut short"):
        open_parts(paths[0])


def test_a_tensor_in_two_parts_is_refused(tmp_path: Path) -> None:
    paths = write_parts(tmp_path, NUMBERED)
    write_parts(tmp_path / "more", NUMBERED)
    content = (tmp_path / "more" / NUMBERED[1]).read_bytes()
    number = content.index(b"split.no") + len("split.no") + 4
    paths[2].write_bytes(content[:number] + (2).to_bytes(2, "little") + content[number + 2 :])
    with pytest.raises(ExportError, match=r"m-00003.*is also in another part"):
        open_parts(paths[0])


@pytest.mark.parametrize("count", [1 << 63, 1 << 15])
def test_a_count_of_parts_that_cannot_be_is_refused_at_once(count: int, tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_uint64("split.count", count)
    writer.add_tensor("blk.0.attn_q.weight", np.zeros((2, 2), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ExportError, match=rf"part 1 of {count}.*no part 2"):
        open_parts(tmp_path / "m.gguf")
