"""Packing: one file that Python runs, from which the bundle comes back byte for byte."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from support.command import Satchel
from support.custom_ops import LIBRARY
from support.full_disk import largest_file
from support.packed import MISSING, run_packed
from support.tiny_bundle import read_manifest
from support.tiny_custom_bundle import write_custom_bundle

from satchel.runtime.errors import BundleError, SatchelError
from satchel.runtime.generation.generator import Generator
from satchel.runtime.ort.custom_ops import Custom
from satchel.runtime.ort.open_bundle import open_bundle
from satchel.runtime.tools.pack import pack, unpack


@pytest.fixture(scope="module")
def packed(chatty: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("packed") / "model.pyz"
    pack(open_bundle(chatty), file)
    return file


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_packed_bundle_gives_the_same_text_and_keeps_its_fingerprint(chatty: Path, packed: Path) -> None:
    folder, file = Generator.open(chatty, threads=1), Generator.open(packed, threads=1)
    options = {"max_new_tokens": 12, "temperature": 0.8, "seed": 3}
    assert file.generate("the cat", **options).token_ids == folder.generate("the cat", **options).token_ids
    assert file.engine.bundle.fingerprint == folder.engine.bundle.fingerprint
    assert file.engine.bundle.digest == folder.engine.bundle.digest == read_manifest(chatty)["digest"]
    assert file.prompt_logprobs("the cat") == folder.prompt_logprobs("the cat")  # by the score graph


def test_the_same_bundle_gives_the_same_bytes(chatty: Path, packed: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(chatty, tmp_path / "copy", copy_function=shutil.copyfile))
    os.utime(copy / "weights.bin", ns=(1, 1))
    pack(open_bundle(copy), tmp_path / "again.pyz")
    assert (tmp_path / "again.pyz").read_bytes() == packed.read_bytes()


def test_unpacking_gives_the_folder_back_byte_for_byte(chatty: Path, packed: Path, tmp_path: Path) -> None:
    unpack(open_bundle(packed), tmp_path / "folder")
    assert contents(tmp_path / "folder") == contents(chatty)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    with pytest.raises(SatchelError, match="already exists"):
        unpack(open_bundle(packed), tmp_path / "folder")
    with pytest.raises(SatchelError, match="is a folder already: give a file made by satchel pack"):
        unpack(open_bundle(chatty), tmp_path / "other")


def test_files_lie_as_they_are_and_on_pages_and_other_zip_readers_read_them(packed: Path, chatty: Path) -> None:
    spans, content = open_bundle(packed).packed, packed.read_bytes()
    assert spans is not None
    for name, span in spans.items():
        assert span.offset % 4096 == 0
        assert content[span.offset : span.offset + span.length] == (chatty / name).read_bytes()
    with zipfile.ZipFile(packed) as file:
        assert file.testzip() is None
        assert file.read("bundle/weights.bin") == (chatty / "weights.bin").read_bytes()
        names = set(file.namelist())
    assert not [name for name in names if "__pycache__" in name or name.endswith((".pyc", ".c", ".h", ".so", "/"))]
    assert packed.read_bytes().startswith(b"#!/usr/bin/env python3\n")
    assert packed.stat().st_mode & stat.S_IXUSR


def test_it_runs_with_numpy_onnx_runtime_and_tokenizers_alone(chatty: Path, packed: Path) -> None:
    done = run_packed(packed, "the cat", "--raw", "--max-new-tokens", "5", "--threads", "1", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    expected = Generator.open(chatty, threads=1).generate("the cat", 5)
    assert json.loads(done.stdout)["text"] == expected.text


def test_it_renders_chat_templates_in_a_child_that_imports_from_the_file(packed: Path) -> None:
    missing = [name for name in MISSING if name != "jinja2"]
    arguments = ("chat", "--threads", "1", "--temperature", "0", "--max-new-tokens", "3")
    done = run_packed(packed, *arguments, text="hello\n", missing=missing)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_without_jinja2_a_chat_says_what_to_install(packed: Path) -> None:
    done = run_packed(packed, "chat", "--threads", "1", text="hello\n")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "pip install jinja2" in done.stderr


def test_graphs_with_and_without_passes_of_a_users_own_travel_along(chatty: Path, tmp_path: Path) -> None:
    folder = write_custom_bundle(tmp_path / "custom", chatty)
    packed = tmp_path / "custom.pyz"
    pack(open_bundle(folder, custom=None), packed)
    plain = Generator.open(chatty, threads=1).prompt_logprobs("the cat")
    cut = Generator.open(folder, threads=1, custom=Custom((LIBRARY,))).prompt_logprobs("the cat")
    assert plain != cut
    for chosen, expected in ((Custom(passes=False), plain), (Custom((LIBRARY,)), cut)):
        assert Generator.open(packed, threads=1, custom=chosen).prompt_logprobs("the cat") == expected
    unpack(open_bundle(packed, custom=None), tmp_path / "folder")
    assert contents(tmp_path / "folder") == contents(folder)

    arguments = ("the cat", "--raw", "--max-new-tokens", "5", "--threads", "1", "--json")
    text = Generator.open(chatty, threads=1).generate("the cat", 5).text
    for flags, warned in ((("--no-custom-passes",), 0), ((), 1), (("--custom-ops", str(LIBRARY)), 0)):
        done = run_packed(packed, *arguments, *flags)
        assert (done.returncode, done.stderr.count("\n")) == (0, warned)
        assert ("the plain graphs run" in done.stderr) == bool(warned)
        assert json.loads(done.stdout)["text"] == text  # what is cut is never the most likely
    done = run_packed(packed, *arguments, "--custom-ops", str(packed))
    assert (done.returncode, done.stdout) == (2, "")
    assert "its SHA-256 is" in done.stderr


def test_without_a_package_that_it_needs_it_says_what_to_install(packed: Path) -> None:
    done = run_packed(packed, "the cat", missing=[*MISSING, "onnxruntime"])
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("satchel: error: onnxruntime is not installed: pip install 'onnxruntime>=")


def test_its_first_argument_may_be_a_command(packed: Path) -> None:
    done = run_packed(packed, "inspect", "--json")
    assert json.loads(done.stdout)["source"]["name"] == "tiny"
    assert "satchel 0" in run_packed(packed, "--version").stdout
    assert "BUNDLE" not in run_packed(packed, "verify", "--help").stdout


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_weights_are_mapped_from_the_file(packed: Path) -> None:
    code = """
import sys
from satchel.runtime import Generator
generator = Generator.open(sys.argv[1], threads=1)
print(sum(sys.argv[1] in line for line in open("/proc/self/maps")))
"""
    done = subprocess.run([sys.executable, "-c", code, packed], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 0


def test_specialized_parts_stay_behind_and_the_digest_with_them(chatty: Path, tmp_path: Path) -> None:
    from satchel.runtime.optimize.specialize import specialize

    copy = Path(shutil.copytree(chatty, tmp_path / "copy"))
    specialize(open_bundle(copy), threads=1)
    pack(open_bundle(copy), tmp_path / "model.pyz")
    bundle = open_bundle(tmp_path / "model.pyz")
    assert bundle.manifest == open_bundle(chatty).manifest
    assert bundle.digest == open_bundle(copy).digest == open_bundle(chatty).digest
    assert not [name for name in bundle.packed or () if "specialized" in name]


def test_the_commands_pack_and_unpack(satchel: Satchel, chatty: Path, tmp_path: Path) -> None:
    file, folder = tmp_path / "m.pyz", tmp_path / "folder"
    digest = read_manifest(chatty)["digest"]
    assert digest in satchel("pack", chatty, "-o", file).out
    before = file.read_bytes()
    assert "already exists" in satchel.refuses("pack", chatty, "-o", file)
    assert satchel.json("pack", chatty, "-o", file, "--force", "--quiet")["digest"] == digest
    satchel("unpack", file, "-o", folder)
    assert contents(folder) == contents(chatty)
    assert file.read_bytes() == before


def test_a_disk_that_is_full_leaves_nothing(chatty: Path, packed: Path, tmp_path: Path) -> None:
    for size in (10, 5000, packed.stat().st_size - 10):
        with largest_file(size), pytest.raises(SatchelError, match=r"--output .*m\.pyz: cannot be written \(File too"):
            pack(open_bundle(chatty), tmp_path / "m.pyz")
        with largest_file(min(size, 100_000)), pytest.raises(SatchelError, match=r"--output .*: cannot be written"):
            unpack(open_bundle(packed), tmp_path / "folder")
        assert list(tmp_path.iterdir()) == []


def test_a_packed_bundle_that_is_damaged_is_noticed(packed: Path, tmp_path: Path) -> None:
    spans = open_bundle(packed).packed
    assert spans is not None
    for name, message in (("weights.bin", r"weights\.bin: damaged"), ("manifest.json", r"manifest\.json: ")):
        content = bytearray(packed.read_bytes())
        content[spans[name].offset + 100] ^= 1
        (tmp_path / "m.pyz").write_bytes(content)
        with pytest.raises(BundleError, match=message):
            open_bundle(tmp_path / "m.pyz")
