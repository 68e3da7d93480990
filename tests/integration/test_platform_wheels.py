"""The wheels of platforms: names, tags and contents; what their libraries export and need; and one of them runs.

Compiling for all of them takes many minutes, which `make test-wheels` does. Other runs take one for this system and one
for another processor and system.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
from packaging.tags import Tag
from packaging.utils import parse_wheel_filename
from support.installed import CHECKOUT, environment, run
from support.kernels import needs_kernels
from support.shared import made_once
from support.tiny_native_bundle import write_native_bundle

for module in ("ziglang", "wheel", "auditwheel", "lief"):
    pytest.importorskip(module, reason=f"{module} is not installed: pip install '.[dev]'")

pytestmark = pytest.mark.slow

LIBRARY = "satchel/runtime/kernels/_library"
ENTRY_POINTS = {"RegisterCustomOps", "satchel_join", "satchel_traffic", "satchel_drain_helpers"}
ENTRY_POINTS |= {
    "satchel_products_per_second",
    "satchel_choose_scales",
    "satchel_round_inputs",
    "satchel_descend_inputs",
}
ENTRY_POINTS |= {f"satchel_{verb}_instruction_set" for verb in ("announced", "choose", "try")}
OF_LINKER = {"__dso_handle", "_mh_dylib_header"}
"""What the linker exports from every library for macOS."""
LARGEST = 2_000_000

GLIBC = ["libc.so.6", "libm.so.6", "libpthread.so.0"]
MACOS = ["/usr/lib/libSystem.B.dylib"]
WINDOWS = ["KERNEL32.dll", "api-ms-win-crt-*.dll"]
LIBRARIES = {
    "manylinux_2_17_x86_64": (".so", "X86_64", GLIBC),
    "manylinux_2_17_aarch64": (".so", "AARCH64", GLIBC),
    "macosx_11_0_x86_64": (".so", "X86_64", MACOS),
    "macosx_11_0_arm64": (".so", "ARM64", MACOS),
    "win_amd64": (".pyd", "AMD64", WINDOWS),
    "win_arm64": (".pyd", "ARM64", WINDOWS),
}
"""By platform: the library's suffix, its processor, and the libraries of the system that it may need."""
HERE = f"manylinux_2_17_{os.uname().machine}"
BUILT = list(LIBRARIES) if os.environ.get("SATCHEL_TEST_WHEELS") == "all" else [HERE, "win_arm64"]
PLATFORMS = pytest.mark.parametrize("platform", BUILT)


def build(checkout: Path, folder: Path, *platforms: str) -> dict[str, Path]:
    """The wheels that packaging/wheels.py of a checkout builds, by platform."""
    command = [sys.executable, str(checkout / "packaging" / "wheels.py"), str(folder), *platforms]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(map(Path, done.stdout.split())) == sorted(folder.glob("*"))
    return by_platform(folder)


def by_platform(folder: Path) -> dict[str, Path]:
    return {tag.platform: path for path in folder.glob("*.whl") for tag in parse_wheel_filename(path.name)[3]}


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return by_platform(made_once(tmp_path_factory, "wheels", lambda folder: build(CHECKOUT, folder, *BUILT)))


def library(wheel: Path, folder: Path) -> Any:
    """The library in a wheel, as lief reads it."""
    import lief

    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.startswith(LIBRARY))
        return lief.parse(archive.extract(name, folder))


def described(found: Any) -> tuple[str, set[str], set[str]]:
    """The processor that a library is for, the libraries that it needs, and the names that it exports."""
    match found.format.name:
        case "ELF":
            exported = {symbol.name for symbol in found.exported_symbols}
            return found.header.machine_type.name, set(found.libraries), exported
        case "MACHO":
            exported = {symbol.name.removeprefix("_") for symbol in found.symbols if symbol.has_export_info} - OF_LINKER
            own = LIBRARY.split("/")[-1] + ".so"
            return found.header.cpu_type.name, {each.name for each in found.libraries} - {own}, exported
        case _:
            exported = {entry.name for entry in found.get_export().entries}
            return found.header.machine.name, {each.name for each in found.imports}, exported


def test_there_is_one_for_each_platform_and_a_pure_one(wheels: dict[str, Path]) -> None:
    assert wheels.keys() == {*BUILT, "any"}
    for platform, wheel in wheels.items():
        name, _, build_number, tags = parse_wheel_filename(wheel.name)
        assert (name, build_number, tags) == ("satchel", (), {Tag("py3", "none", platform)})
        assert wheel.stat().st_size < LARGEST


@pytest.mark.parametrize("platform", ["any", *BUILT])
def test_its_records_agree_with_its_name_and_its_contents(
    wheels: dict[str, Path], platform: str, tmp_path: Path
) -> None:
    unpack = [sys.executable, "-m", "wheel", "unpack", "--dest", str(tmp_path), str(wheels[platform])]
    subprocess.run(unpack, check=True, capture_output=True)  # checks each file against RECORD
    (facts,) = tmp_path.glob("*/*.dist-info/WHEEL")
    lines = facts.read_text().splitlines()
    assert [line for line in lines if line.startswith("Tag: ")] == [f"Tag: py3-none-{platform}"]
    assert f"Root-Is-Purelib: {str(platform == 'any').lower()}" in lines


@PLATFORMS
def test_it_is_the_pure_one_and_a_library(wheels: dict[str, Path], platform: str) -> None:
    with zipfile.ZipFile(wheels["any"]) as pure, zipfile.ZipFile(wheels[platform]) as compiled:
        assert {*compiled.namelist()} - {*pure.namelist()} == {LIBRARY + LIBRARIES[platform][0]}
        for name in pure.namelist():
            if not name.endswith(("/WHEEL", "/RECORD")):
                assert pure.read(name) == compiled.read(name)


@PLATFORMS
def test_the_library_fits_its_platform(wheels: dict[str, Path], platform: str, tmp_path: Path) -> None:
    processor, needed, exported = described(library(wheels[platform], tmp_path))
    _, wanted, system = LIBRARIES[platform]
    assert (processor, exported) == (wanted, ENTRY_POINTS)
    assert needed, "not even a C library"
    assert {name for name in needed if not any(fnmatch(name, pattern) for pattern in system)} == set()


@pytest.mark.parametrize("platform", [name for name in BUILT if name.startswith("manylinux")])
def test_auditwheel_finds_nothing_newer_than_the_tag(wheels: dict[str, Path], platform: str) -> None:
    show = [sys.executable, "-m", "auditwheel", "show", "--json", str(wheels[platform])]
    found = json.loads(subprocess.run(show, check=True, capture_output=True, text=True).stdout)
    assert (found["overall_tag"], found["external_libs"], found["unsupported_isa"]) == (platform, {}, False)
    assert found["versioned_symbols"].keys() <= {*GLIBC}


@pytest.mark.parametrize("platform", [name for name in BUILT if name.startswith("macosx")])
def test_macos_loads_it_from_the_version_of_the_tag_on(wheels: dict[str, Path], platform: str, tmp_path: Path) -> None:
    found = library(wheels[platform], tmp_path)
    assert found.build_version.minos == [11, 0, 0]
    assert found.has_code_signature or not platform.endswith("arm64"), "processors of Apple load nothing unsigned"


def test_the_same_sources_elsewhere_give_the_same_bytes(wheels: dict[str, Path], tmp_path: Path) -> None:
    other = tmp_path / "another folder"
    for name in ("export", "graphs", "packaging", "runtime"):
        unwanted = shutil.ignore_patterns("__pycache__", "*.so")
        shutil.copytree(CHECKOUT / name, other / name, ignore=unwanted, copy_function=shutil.copyfile)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copyfile(CHECKOUT / name, other / name)
    mask = os.umask(0o077)
    try:
        again = build(other, tmp_path / "wheels", HERE)
    finally:
        os.umask(mask)
    assert len(again) == 2
    for platform, wheel in again.items():
        assert wheel.read_bytes() == wheels[platform].read_bytes()


@needs_kernels
def test_an_installed_wheel_runs_its_kernels_without_a_compiler(
    wheels: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = wheels[HERE]
    there = environment(tmp_path_factory, built=wheel)
    bundle = write_native_bundle(tmp_path / "bundle")
    monkeypatch.setenv("PATH", "")
    for command in (["specialize", bundle, "--kernels", "satchel"], ["run", bundle, "the cat"], ["doctor", "--json"]):
        done = run(there, "-m", "satchel", *command)
        assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["kernels"]["run"]
    specialized = json.loads((bundle / "manifest.json").read_text())["specialized"]
    assert specialized["graphs"]["prefill"]["variant"] == "native"
