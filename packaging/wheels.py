"""Builds satchel's wheels on one Linux machine: one for each platform, with the kernels inside, and a pure one.

    python packaging/wheels.py DIRECTORY [PLATFORM ...]

The kernels do not use Python's C API, so one library serves all Python versions of a platform: its wheel is the pure
one and that file. `ziglang` brings a C compiler with the headers and libraries of all platforms; `wheel` writes the
archives. The same sources and versions of these give the same bytes.
"""

from __future__ import annotations

import argparse
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("runtime", "graphs", "export", "setup.py", "pyproject.toml", "README.md", "LICENSE")
CACHE = ROOT / "build" / "zig"  # C libraries that the compiler builds once for each platform


@dataclass(frozen=True)
class Platform:
    """A platform that has a wheel of its own.

    Attributes:
        tag: Its name in the wheel's file name, with the oldest system that the library runs on.
        target: The same in the compiler's words.
        suffix: What Python, and so satchel, appends to the file name of a library for all its versions.
    """

    tag: str
    target: str
    suffix: str


PLATFORMS = (
    Platform("manylinux_2_17_x86_64", "x86_64-linux-gnu.2.17", ".so"),
    Platform("manylinux_2_17_aarch64", "aarch64-linux-gnu.2.17", ".so"),
    Platform("macosx_11_0_x86_64", "x86_64-macos.11.0", ".so"),
    Platform("macosx_11_0_arm64", "aarch64-macos.11.0", ".so"),
    Platform("win_amd64", "x86_64-windows-gnu", ".pyd"),
    Platform("win_arm64", "aarch64-windows-gnu", ".pyd"),
)


def main() -> None:
    """Build the wheels that the command line asks for, and print their paths."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="where the wheels are written")
    names = [platform.tag for platform in PLATFORMS]
    parser.add_argument("platforms", nargs="*", metavar="PLATFORM", help=f"all of {', '.join(names)} if none is named")
    asked = parser.parse_args()
    if unknown := sorted({*asked.platforms} - {*names}):
        parser.error(f"{', '.join(unknown)}: no such platform; there are {', '.join(names)}")
    directory = asked.directory.resolve()
    directory.mkdir(parents=True, exist_ok=True)
    os.umask(0o022)  # archives hold the files' modes,
    os.environ.setdefault("SOURCE_DATE_EPOCH", "315532800")  # and their times: 1980, as early as they can say
    os.chdir(ROOT)
    pure = build_pure(directory)
    print(pure, flush=True)
    for platform in PLATFORMS:
        if platform.tag in (asked.platforms or names):
            print(build(platform, pure, directory), flush=True)


def build_pure(directory: Path) -> Path:
    """Build the wheel without a library from a copy of the sources. Returns its path."""
    with tempfile.TemporaryDirectory() as scratch:
        for name in SOURCES:
            if Path(name).is_dir():
                unwanted = shutil.ignore_patterns("__pycache__", "*.so", ".*")
                shutil.copytree(name, Path(scratch, name), ignore=unwanted, copy_function=shutil.copyfile)
            else:
                shutil.copyfile(name, Path(scratch, name))
        pip = [sys.executable, "-m", "pip", "wheel", "--disable-pip-version-check", "--no-deps", "--no-build-isolation"]
        run([*pip, "--wheel-dir", scratch, scratch], SATCHEL_KERNELS="off")
        (found,) = Path(scratch).glob("*.whl")
        return Path(shutil.copy(found, directory))


def build(platform: Platform, pure: Path, directory: Path) -> Path:
    """Build the wheel of one platform from the pure one. Returns its path."""
    with tempfile.TemporaryDirectory() as scratch:
        run([sys.executable, "-m", "wheel", "unpack", "--dest", scratch, str(pure)])
        (tree,) = Path(scratch).iterdir()
        compile_library(platform, tree)
        (facts,) = tree.glob("*.dist-info/WHEEL")
        text = facts.read_text().replace("Root-Is-Purelib: true", "Root-Is-Purelib: false")
        facts.write_text(text.replace("Tag: py3-none-any", f"Tag: py3-none-{platform.tag}"))
        run([sys.executable, "-m", "wheel", "pack", "--dest-dir", scratch, str(tree)])
        (found,) = Path(scratch).glob("*.whl")
        return compress(found, directory / found.name)


def compress(wheel: Path, target: Path) -> Path:
    """Write a wheel anew, as small as its format can be. Returns the target."""
    with zipfile.ZipFile(wheel) as packed, zipfile.ZipFile(target, "w") as smaller:
        for entry in packed.infolist():
            smaller.writestr(entry, packed.read(entry), zipfile.ZIP_DEFLATED, compresslevel=9)
    return target


def compile_library(platform: Platform, tree: Path) -> None:
    """Compile the kernels, as setup.py describes them, and put the library into a tree of packages."""
    library = runpy.run_path("setup.py")["LIBRARY"]
    options = [*library.extra_compile_args, "-fPIC", "-shared", "-s", *(f"-l{name}" for name in library.libraries)]
    if platform.suffix == ".so":  # Windows needs tables to unwind the stack; elsewhere C has no use for them
        options += ["-fno-asynchronous-unwind-tables", "-fno-unwind-tables"]
    with tempfile.TemporaryDirectory() as scratch:
        # In that folder, since macOS libraries contain the path that they are written to.
        name = f"_library{platform.suffix}"
        sources = [str(ROOT / source) for source in library.sources]
        zig = [sys.executable, "-m", "ziglang", "cc", "-target", platform.target]
        run([*zig, "-o", name, *sources, *options], scratch, ZIG_GLOBAL_CACHE_DIR=str(CACHE))
        shutil.copy(Path(scratch, name), tree.joinpath(*library.name.split(".")).with_name(name))


def run(command: Sequence[str], folder: str | None = None, **variables: str) -> None:
    """Run a command in a folder with further environment variables. A failure shows its output and ends the program."""
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout}")


if __name__ == "__main__":
    main()
