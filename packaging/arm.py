"""Makes an Arm system in a folder, which runs on this x86-64 Linux machine by emulation; changes nothing elsewhere.

    python packaging/arm.py DIRECTORY WHEEL

DIRECTORY gets qemu's user-mode emulator and an arm64 Python with its libraries, from Debian (qemu of Debian 12 is too
old for ONNX Runtime), and satchel's wheel for Arm with what it and the tests of the kernels require, from the package
index. `packaged_python(DIRECTORY)` is the command that runs that Python. Exits with 1 if something cannot be had.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SUITE = "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://deb.debian.org/debian trixie main\n"
PYTHON, EMULATOR = "python3.13", "qemu-aarch64"
DEBIAN = (PYTHON, "libstdc++6", "qemu-user:amd64")
TESTS = ("pytest", "onnx", "onnx-ir")
GLIBC = (17, 24, 26, 27, 28, 31, 34)  # of the tags of wheels; pip wants each that it may take


def packaged_python(folder: Path) -> list[str]:
    """The command that runs the arm64 Python in a folder that this program made."""
    root = folder / "root"
    return [str(folder / "emulator" / "usr" / "bin" / EMULATOR), "-L", str(root), str(root / "usr" / "bin" / PYTHON)]


def main() -> None:
    """Make the folder that the command line names, or bring its satchel up to date if it is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="where the system is made")
    parser.add_argument("wheel", type=Path, help="satchel's wheel for Linux on Arm")
    asked = parser.parse_args()
    folder = asked.directory.resolve()
    try:
        if not (folder / "root").is_dir():
            install_debian(folder)
        install_packages(folder, asked.wheel)
        subprocess.run([*packaged_python(folder), "-c", ""], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"no Arm system could be made in {folder}: {error}")


def install_debian(folder: Path) -> None:
    """Fetch Debian's packages with apt, which keeps its lists in the folder, and unpack them there."""
    apt = folder / "apt"
    for name in ("lists/partial", "cache/archives/partial"):
        (apt / name).mkdir(parents=True, exist_ok=True)
    (apt / "sources.list").write_text(SUITE)
    options = {
        "Dir::State": apt, "Dir::State::lists": apt / "lists", "Dir::State::status": "/dev/null",
        "Dir::Cache": apt / "cache", "Dir::Etc::sourcelist": apt / "sources.list", "Dir::Etc::sourceparts": "/dev/null",
        "APT::Architecture": "arm64", "APT::Architectures": "arm64,amd64", "APT::Sandbox::User": "",
        "Acquire::Languages": "none",
    }  # fmt: skip
    command = ["apt-get", "--quiet=2", *(f"--option={key}={value}" for key, value in options.items())]
    subprocess.run([*command, "update"], check=True)
    fetch = ["install", "--yes", "--no-install-recommends", "--download-only"]
    subprocess.run([*command, *fetch, *DEBIAN], check=True, stdout=subprocess.DEVNULL)
    made = folder / "root.new"
    shutil.rmtree(made, ignore_errors=True)
    for package in sorted((apt / "cache" / "archives").glob("*.deb")):
        place = folder / "emulator" if package.stem.endswith("_amd64") else made
        place.mkdir(exist_ok=True)
        subprocess.run(["dpkg-deb", "--extract", str(package), str(place)], check=True)
    for emulator in (folder / "emulator").rglob("qemu-*"):
        if emulator.is_file() and emulator.name != EMULATOR:
            emulator.unlink()
    (made / "lib").symlink_to("usr/lib")
    made.rename(folder / "root")
    shutil.rmtree(apt)


def install_packages(folder: Path, wheel: Path) -> None:
    """Install the wheel, and what it and the tests of the kernels require, where that Python finds them."""
    site = folder / "root" / "usr" / "local" / "lib" / PYTHON / "dist-packages"
    python_version = PYTHON.removeprefix("python")
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--upgrade"]
    options = ["--target", str(site), "--only-binary", ":all:", "--python-version", python_version]
    platforms = [f"--platform=manylinux_2_{minor}_aarch64" for minor in GLIBC]
    constraints = ["--constraint", str(ROOT / "constraints.txt")]
    if not (site / "onnxruntime").is_dir():
        subprocess.run([*command, *options, *platforms, *constraints, str(wheel), *TESTS], check=True)
    else:
        subprocess.run([*command, *options, *platforms, "--no-deps", str(wheel)], check=True)


if __name__ == "__main__":
    main()
