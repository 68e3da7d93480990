"""The wheel holds the three folders as they are in the tree, and nothing else: no file is listed by hand."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
from support.installed import CHECKOUT, FOLDERS, wheel

pytestmark = pytest.mark.slow

NOT_IN_THE_WHEEL = ("*.c", "*.h", "*.so", "ruff.toml")
"""The kernels' sources, of which the wheel has the library; the library in the tree; settings of the lint."""


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    with zipfile.ZipFile(wheel(tmp_path_factory)) as archive:
        return set(archive.namelist())


def in_tree() -> set[Path]:
    """Files of the three folders, caches of tools and the kernels left out."""
    paths = {path.relative_to(CHECKOUT) for folder in FOLDERS for path in (CHECKOUT / folder).rglob("*.*")}
    hidden = {path for path in paths if any(part.startswith((".", "__pycache__")) for part in path.parts)}
    return {
        path for path in paths - hidden if (CHECKOUT / path).is_file() and not any(map(path.match, NOT_IN_THE_WHEEL))
    }


def installed_as(path: Path) -> str:
    """runtime/entry is the package `satchel` itself."""
    return f"satchel/{path}".replace("satchel/runtime/entry/", "satchel/")


def test_every_file_of_the_tree_is_in_the_wheel(names: set[str]) -> None:
    found = {name for name in names if ".dist-info/" not in name and not name.endswith(".so")}
    assert found == {installed_as(path) for path in in_tree()}
    assert {f"satchel/{folder}/py.typed" for folder in FOLDERS} <= found
    assert {Path(name).suffix for name in found} > {".py", ".typed", ".toml", ".txt"}


def test_the_kernels_are_built(names: set[str]) -> None:
    assert [name for name in names if name.startswith("satchel/runtime/kernels/_library.") and name.endswith(".so")]


def test_it_installs_nothing_outside_its_package(names: set[str]) -> None:
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"satchel"}
