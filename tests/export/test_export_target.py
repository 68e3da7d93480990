"""Where a bundle may be written: nowhere that holds anything but a bundle, and over a bundle only when told to."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from support.command import Said, Satchel
from support.export_command import tree

from satchel.export import ExportConfig, ExportError, export_bundle
from satchel.export.writing.publish import staged
from satchel.runtime.bundle.manifest import MANIFEST_NAME, Manifest


def test_a_bundle_that_is_there_is_kept_without_force(
    refused: Callable[..., None], tiny_checkpoint: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    target = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    refused(tiny_checkpoint, output=target, says=(str(target), "already exists", "--force"))


def test_force_replaces_a_bundle_whole(
    export: Callable[..., Said], tiny_checkpoint: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    target = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    (target / "left over").touch()
    assert export(tiny_checkpoint, "-o", target, "--max-context", 64, "--force", "--quiet") == ("", "")
    assert Manifest.read(target / MANIFEST_NAME).model.max_context == 64
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    assert not (target / "left over").exists()


def test_force_does_not_replace_what_is_no_bundle(
    refused: Callable[..., None], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    folder, file = tmp_path / "thesis", tmp_path / "notes"
    folder.mkdir()
    (folder / "chapter 1").write_text("It was")
    file.write_text("Buy milk")
    for target in (folder, file):
        says = (str(target), "is not a bundle", "choose another place", "--force")
        refused(tiny_checkpoint, "--force", output=target, says=says)


def test_a_place_below_a_file_is_refused(refused: Callable[..., None], tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "notes").touch()
    says = (f"{tmp_path / 'notes'} is not a folder", "choose another place")
    refused(tiny_checkpoint, output=tmp_path / "notes" / "bundle", says=says)


def test_a_bundle_that_fails_its_check_is_not_published(
    tiny_checkpoint: Path, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    before = tree(tmp_path)

    def fail(folder: Path, config: object, check: object) -> None:
        assert (folder / "weights.bin").is_file()
        raise ExportError("the check says no")

    monkeypatch.setattr("satchel.export.compile.self_check", fail)
    with pytest.raises(ExportError, match="the check says no"):
        export_bundle(tiny_checkpoint, ExportConfig(target, precision="fp32", force=True, certificate=False))
    assert tree(tmp_path) == before


def test_what_a_killed_export_left_is_removed_by_the_next_one(
    export: Callable[..., Said], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    gone, living = (tmp_path / f".bundle.partial-{pid}" for pid in ((1 << 22) + 1, os.getppid()))
    for folder in (gone, living):
        folder.mkdir()
        (folder / "weights.bin").write_bytes(b"half")
    export(tiny_checkpoint, "-o", tmp_path / "bundle", "--quiet")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([living.name, "bundle"])


def test_a_bundle_that_a_killed_export_had_moved_away_comes_back(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = tmp_path / f".bundle.old-{(1 << 22) + 1}"
    moved.mkdir()
    (moved / "manifest.json").write_text("the only one")

    def fail(folder: Path, config: object, check: object) -> None:
        raise ExportError("the check says no")

    monkeypatch.setattr("satchel.export.compile.self_check", fail)
    with pytest.raises(ExportError, match="the check says no"):
        export_bundle(tiny_checkpoint, ExportConfig(tmp_path / "bundle", precision="fp32", certificate=False))
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    assert (tmp_path / "bundle" / "manifest.json").read_text() == "the only one"


def test_force_through_a_link_replaces_the_bundle_that_it_leads_to(tiny_checkpoint: Path, tmp_path: Path) -> None:
    real, link = tmp_path / "real", tmp_path / "link"
    real.mkdir()
    (real / "manifest.json").write_text("old")
    link.symlink_to(real)
    export_bundle(tiny_checkpoint, ExportConfig(link, precision="fp32", force=True, certificate=False))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]
    assert link.is_symlink()
    assert (real / "manifest.json").read_text() != "old"


def test_a_bundle_that_came_meanwhile_is_kept(tmp_path: Path) -> None:
    output = tmp_path / "bundle"
    with pytest.raises(ExportError, match="already exists"), staged(output, force=False):
        output.mkdir()
        (output / "manifest.json").write_text("another's")
    assert (output / "manifest.json").read_text() == "another's"
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


@pytest.mark.parametrize("packed", [False, True])
def test_a_bundle_is_not_a_checkpoint(
    refused: Callable[..., None], satchel: Satchel, packed: bool, tiny_bundle: Path, tmp_path: Path
) -> None:
    source = tiny_bundle
    if packed:
        source = tmp_path / "bundle.pyz"
        satchel("pack", tiny_bundle, "-o", source)
    before = tree(tiny_bundle)
    refused(source, output=tmp_path / "new", says=(str(source), "already a bundle", "satchel run"))
    assert tree(tiny_bundle) == before
