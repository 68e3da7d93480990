"""Goes on with an export that was interrupted while it rounded: what it left, and whether that is of an equal one."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from satchel.export.checkpoint import Checkpoint
from satchel.export.config import ExportConfig
from satchel.export.errors import ExportError
from satchel.export.writing.provenance import producer, recorded_options
from satchel.export.writing.publish import left_behind, scratch_folder
from satchel.runtime.bundle.hash_cache import file_identity
from satchel.runtime.util.cpu import machine_cores

ROUNDING, FACTS = "rounding", "export.json"
"""The folder of a scratch folder that outlives an interrupt, and the file in it that says what was exported."""


def check_resumes(checkpoint: Checkpoint, config: ExportConfig) -> Path | None:
    """The scratch folder of the export that this one goes on with, or None if none was interrupted.

    Raises:
        ExportError: The export that was interrupted had another checkpoint, other options or other versions; or the
            weights of this one are not in files.
    """
    if not config.resume:
        return None
    if not checkpoint.sources:
        raise ExportError("--resume: the weights of a module are not in files, so that a change of them is not seen")
    left = interrupted(config.output)
    if left is None:
        return None
    before, now = json.loads((left / ROUNDING / FACTS).read_text()), json.loads(json.dumps(facts(checkpoint, config)))
    for kind, what in (("source", "another checkpoint"), ("options", "other options"), ("made_with", "other versions")):
        names = [name for name in sorted({*before[kind], *now[kind]}) if before[kind].get(name) != now[kind].get(name)]
        if names:
            raise ExportError(
                f"--resume: the export to {config.output} that was interrupted had {what} ({', '.join(names)}): "
                "give the same, or leave out --resume to start anew"
            )
    return left


def facts(checkpoint: Checkpoint, config: ExportConfig) -> dict[str, dict[str, Any]]:
    """What the bytes of a bundle depend on, as JSON data; the checkpoint's files by size and time of change."""
    return {
        "source": {path.name: file_identity(path) for path in checkpoint.sources},
        "options": recorded_options(checkpoint, config),
        "made_with": {**producer(), "threads": machine_cores()},
    }


def interrupted(output: Path) -> Path | None:
    """The newest scratch folder of a dead export to `output` that has something rounded, or None."""
    return max(filter(_has_rounded, left_behind(output)), key=lambda path: path.stat().st_mtime, default=None)


@contextlib.contextmanager
def scratch(
    checkpoint: Checkpoint, config: ExportConfig, left: Path | None, say: Callable[[str], None]
) -> Iterator[Path]:
    """A folder for temporary files, empty but for what `left` has in `ROUNDING`; it is removed at the end.

    What a resumable export has rounded stays in it after an interrupt, and `say` is told so.
    """

    def keeps(folder: Path) -> bool:
        kept = _has_rounded(folder)
        if kept:
            say("what is rounded is kept: the same command with --resume goes on from there")
        return kept

    with scratch_folder(config.output, left, keeps) as folder:
        for path in folder.iterdir():
            if path.name != ROUNDING:
                shutil.rmtree(path)
        (folder / ROUNDING).mkdir(exist_ok=True)
        if config.resumable and checkpoint.sources:
            (folder / ROUNDING / FACTS).write_text(json.dumps(facts(checkpoint, config)))
        yield folder


def _has_rounded(folder: Path) -> bool:
    return (folder / ROUNDING / FACTS).is_file() and any((folder / ROUNDING).rglob("*.npz"))
