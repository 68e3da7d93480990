"""What the export command says of input that it cannot use: exit code 2, one line, and nothing written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from support.checkpoints import tiny_model


def test_a_bad_checkpoint_is_refused(refused: Callable[..., None], tmp_path: Path) -> None:
    """The others are in test_checkpoint_refusals and test_checkpoint_gguf."""
    tiny_model("llama").save_pretrained(tmp_path / "source", max_shard_size="200KB")
    path = sorted((tmp_path / "source").glob("model-*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-100])
    refused(tmp_path / "source", says=("model-00002-of-", "cut short", "download it again"))


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("--precision", "int3", ("--precision int3", "int8 or int4")),
        ("--target", "abacus", ("--target abacus", "choose cpu")),
        ("--max-context", "129", ("--max-context 129", "128 positions", "give at most 128")),
        ("--max-context", "0", ("--max-context 0", "at least 1 position")),
        ("--tokenizer", "nowhere.json", ("nowhere.json", "no such file", "--tokenizer")),
    ],
)
def test_a_wrong_option_is_refused(
    refused: Callable[..., None], tiny_checkpoint: Path, option: str, value: str, says: tuple[str, ...]
) -> None:
    refused(tiny_checkpoint, option, value, says=says)


def test_too_small_a_disk_is_refused_before_the_work(
    refused: Callable[..., None], tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda place: type("Usage", (), {"free": 1 << 20}))
    says = (str(tmp_path), "MiB are needed and 1 MiB are free", "free some space")
    refused(tiny_checkpoint, output=tmp_path / "new" / "bundle", says=says)
