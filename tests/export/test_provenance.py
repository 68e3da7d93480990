"""The manifest says what a bundle was made from and how, by names and digests."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support.checkpoints import gguf_metadata, tiny_model, write_gguf
from support.command import Said
from support.gguf_families import to_gguf

from satchel.export import ExportConfig, export_bundle
from satchel.export.checkpoint import open_checkpoint
from satchel.export.config import ExportConfig as Config
from satchel.export.quantize.texts import CALIBRATION, CERTIFICATE
from satchel.export.recipes import FOLDER as RECIPES
from satchel.export.writing.provenance import provenance, source_records
from satchel.runtime.bundle import strict_json
from satchel.runtime.bundle.manifest import Manifest
from satchel.runtime.util.cpu import machine_cores, processor_features


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def named(path: Path) -> dict[str, str]:
    return {"name": path.name, "sha256": sha256(path)}


def found(source: Path | str, **options: Any) -> dict[str, Any]:
    """The provenance of an export that is not made, as JSON."""
    options = options if {"precision", "target"} & set(options) else {"precision": "fp32", **options}
    checkpoint = open_checkpoint(source, tokenizer=options.get("tokenizer"))
    config = Config(Path("/somewhere/out"), **options)
    document: dict[str, Any] = strict_json.to_json(provenance(checkpoint, config, source_records(checkpoint)))
    json.dumps(document)
    return document


def test_a_bundle_has_it(tiny_checkpoint: Path, tiny_bundle: Path) -> None:
    manifest = Manifest.read(tiny_bundle / "manifest.json")
    made = manifest.provenance
    assert made is not None
    assert made.source["model.safetensors"].sha256 == sha256(tiny_checkpoint / "model.safetensors")
    assert made.source["config.json"].bytes == (tiny_checkpoint / "config.json").stat().st_size
    assert set(made.source) == {path.name for path in tiny_checkpoint.iterdir()}
    assert (made.options["precision"], made.options["kv_cache"], made.options["passes"]) == ("fp32", "float", [])
    assert made.options["eval_text"] == named(CERTIFICATE)
    assert (made.options["recipe"], made.options["calibrate"], made.options["tokenizer"]) == (None, None, None)
    assert not {"output", "force"} & set(made.options)
    assert (made.processor, made.threads) == (processor_features(), machine_cores())


def test_no_path_is_in_a_manifest(export: Callable[..., Said], tiny_checkpoint: Path, tmp_path: Path) -> None:
    text = tmp_path / "mine.txt"
    text.write_bytes(CERTIFICATE.read_bytes())
    export(tiny_checkpoint, "-o", tmp_path / "out", "--eval-text", text, "--quiet")
    manifest = (tmp_path / "out" / "manifest.json").read_text()
    assert str(tmp_path) not in manifest
    assert str(tiny_checkpoint.parent) not in manifest
    assert json.loads(manifest)["provenance"]["options"]["eval_text"] == named(text)


def test_a_recipe_and_the_text_behind_it_are_named(tiny_checkpoint: Path, tmp_path: Path) -> None:
    options = found(tiny_checkpoint, precision="int4")["options"]
    assert (options["recipe"], options["calibrate"]) == (named(RECIPES / "int4.toml"), named(CALIBRATION))
    mine, text = tmp_path / "mine.toml", tmp_path / "text.txt"
    shutil.copyfile(RECIPES / "int8.toml", mine)
    text.write_text("Once upon a time. " * 400)
    options = found(tiny_checkpoint, precision="int8", recipe=mine, calibrate=text, max_context=64)["options"]
    assert (options["recipe"], options["calibrate"], options["max_context"]) == (named(mine), named(text), 64)


def test_shards_and_their_index_are_listed(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path, max_shard_size="200KB")
    shards = [path.name for path in tmp_path.glob("*.safetensors")]
    assert len(shards) > 1
    source = found(tmp_path)["source"]
    assert set(source) == {"config.json", "generation_config.json", "model.safetensors.index.json", *shards}
    assert source[shards[0]]["sha256"] == sha256(tmp_path / shards[0])


def test_a_gguf_file_is_its_own_source(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", "llama", gguf_metadata("llama"), to_gguf("llama", tiny_model("llama")))
    assert found(path)["source"] == {"m.gguf": {"bytes": path.stat().st_size, "sha256": sha256(path)}}


def test_under_another_name_of_its_folder_only_the_name_differs(
    tiny_checkpoint: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    renamed = shutil.copytree(tiny_checkpoint, tmp_path / "renamed")
    export_bundle(renamed, ExportConfig(tmp_path / "out", precision="fp32"))
    first, second = (json.loads((folder / "manifest.json").read_text()) for folder in (tiny_bundle, tmp_path / "out"))
    assert second["source"].pop("name") == "renamed"
    del first["source"]["name"]
    first["certificate"].pop("speed"), second["certificate"].pop("speed")
    assert first.pop("digest") != second.pop("digest")
    assert first == second
