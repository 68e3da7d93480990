"""satchel as it is distributed: its wheel, and environments with it and the dependencies of some of its extras."""

from __future__ import annotations

import shutil
import subprocess
import sys
import venv
from importlib.metadata import Distribution, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from support.shared import made_once

CHECKOUT = Path(__file__).parents[2]
FOLDERS = ("export", "graphs", "runtime")


def wheel(places: pytest.TempPathFactory) -> Path:
    """The wheel of a copy of the tree, so that nothing that was built before gets into it."""

    def make(place: Path) -> None:
        for name in (*FOLDERS, "tests"):
            shutil.copytree(
                CHECKOUT / name, place / "tree" / name, ignore=shutil.ignore_patterns("__pycache__", "*.so")
            )
        for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
            shutil.copy(CHECKOUT / name, place / "tree")
        build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(place)]
        subprocess.run([*build, str(place / "tree")], check=True, capture_output=True)

    (found,) = made_once(places, "wheel", make).glob("*.whl")
    return found


def environment(places: pytest.TempPathFactory, extra: str = "", built: Path | None = None) -> Path:
    """A virtual environment with a wheel (`built`, or the tree's), what it or an extra requires, and nothing else.

    The dependencies are links to those of this environment: no network is needed.
    """

    def make(place: Path) -> None:
        venv.create(place / "env", symlinks=True)
        site = site_packages(place / "env")
        install = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "install", "--no-deps"]
        subprocess.run([*install, "--no-index", "--target", str(site), str(built or wheel(places))], check=True)
        found: dict[str, Distribution] = {}
        for line in distribution("satchel").requires or ():
            if needed(Requirement(line), extra):
                _collect(Requirement(line), found)
        for dependency in found.values():
            for top in {file.parts[0] for file in dependency.files or () if file.parts[0] not in ("..", "__pycache__")}:
                if not (site / top).exists():
                    (site / top).symlink_to(dependency.locate_file(top))

    return made_once(places, f"environment-{extra or 'base'}-{built.stem if built else ''}", make) / "env"


def site_packages(environment: Path) -> Path:
    (found,) = environment.glob("lib/python*/site-packages")
    return found


def run(environment: Path, *arguments: str | Path, typed: str = "") -> subprocess.CompletedProcess[str]:
    """That environment's Python."""
    command = [str(environment / "bin" / "python"), *map(str, arguments)]
    return subprocess.run(
        command, input=typed, capture_output=True, text=True, timeout=300, check=False, cwd=environment
    )


def needed(requirement: Requirement, extra: str = "") -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def _collect(requirement: Requirement, found: dict[str, Distribution]) -> None:
    """An installed distribution and all that it requires, by name."""
    name, extras = requirement.name.lower().replace("_", "-"), ("", *requirement.extras)
    if name in found and not requirement.extras:
        return
    found[name] = distribution(requirement.name)
    for line in found[name].requires or ():
        inner = Requirement(line)
        if any(needed(inner, extra) for extra in extras):
            _collect(inner, found)
