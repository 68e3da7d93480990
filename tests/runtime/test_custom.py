"""Passes and operators of a user's own where a bundle runs: which graphs are taken, over which libraries."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.command import Satchel
from support.custom_ops import LIBRARY
from support.tiny_bundle import read_manifest, write_manifest
from support.tiny_custom_bundle import digest, write_custom_bundle

from satchel.runtime import Custom, Engine, Generator, open_bundle
from satchel.runtime.bundle.manifest import NamedFile
from satchel.runtime.bundle.reader import Bundle
from satchel.runtime.errors import BundleError
from satchel.runtime.ort.custom_ops import check_libraries

IDS = [3, 1, 4, 1, 5, 9, 2, 6]


@pytest.fixture(scope="module")
def custom(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that needs a library."""
    return write_custom_bundle(tmp_path_factory.mktemp("custom") / "bundle", tiny)


@pytest.fixture(scope="module")
def passes_only(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with passes of a user's own that needs no library."""
    return write_custom_bundle(tmp_path_factory.mktemp("passes") / "bundle", tiny, libraries=(), operators=False)


@pytest.fixture(scope="module")
def library_only(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that needs a library, and has no graphs without."""
    return write_custom_bundle(tmp_path_factory.mktemp("library") / "bundle", tiny, plain=False)


def another(folder: Path, name: str = "other.so") -> Path:
    """A library that works as LIBRARY does, with another digest."""
    path = folder / name
    path.write_bytes(LIBRARY.read_bytes() + b"\0")
    return path


def score(bundle: Bundle) -> np.ndarray:
    return Engine.open(bundle, threads=1).score(IDS)


def refused(satchel: Satchel, bundle: Path, *flags: str | Path) -> str:
    return satchel.refuses("run", bundle, "the cat", "--quiet", *flags)


def test_the_graphs_that_are_asked_for_run(custom: Path, engine: Engine) -> None:
    plain = engine.score(IDS)
    cut = np.maximum(plain, 0)
    assert not np.array_equal(plain, cut)
    np.testing.assert_array_equal(score(open_bundle(custom, custom=Custom((LIBRARY,)))), cut)
    np.testing.assert_array_equal(score(open_bundle(custom, custom=Custom(passes=False))), plain)
    np.testing.assert_array_equal(score(open_bundle(custom, custom=Custom(operators=False))), plain)


def test_a_generator_takes_the_same(custom: Path, passes_only: Path, generator: Generator) -> None:
    expected = generator.generate("the cat", 5).token_ids
    for folder, chosen in (
        (custom, Custom((LIBRARY,))),  # the largest logit is above 0, cut or not
        (custom, Custom(passes=False)),
        (passes_only, Custom()),
        (passes_only, Custom(passes=False)),
    ):
        assert Generator.open(folder, threads=1, custom=chosen).generate("the cat", 5).token_ids == expected


def test_passes_without_operators_run_unasked(passes_only: Path, engine: Engine) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(score(open_bundle(passes_only)), np.maximum(engine.score(IDS), 0))
    plain = open_bundle(passes_only, custom=Custom(passes=False))
    np.testing.assert_array_equal(score(plain), engine.score(IDS))
    assert not plain.whole


def test_another_library_is_refused_with_both_digests(satchel: Satchel, custom: Path, tmp_path: Path) -> None:
    other = another(tmp_path, LIBRARY.name)
    said = refused(satchel, custom, "--custom-ops", other)
    assert said == (
        f"--custom-ops {other}: its SHA-256 is {digest(other)}, but {custom} was made with {LIBRARY.name} with "
        f"{digest(LIBRARY)}: pass that one, or export again"
    )


def test_the_name_and_folder_of_a_library_do_not_matter(custom: Path, tmp_path: Path, engine: Engine) -> None:
    renamed = tmp_path / "renamed.so"
    renamed.write_bytes(LIBRARY.read_bytes())
    found = score(open_bundle(custom, custom=Custom((renamed,))))
    np.testing.assert_array_equal(found, np.maximum(engine.score(IDS), 0))


def test_a_library_that_is_missing_is_refused(satchel: Satchel, custom: Path, tmp_path: Path) -> None:
    for path, reason in ((tmp_path / "none.so", "No such file or directory"), (tmp_path, "Is a directory")):
        said = refused(satchel, custom, "--custom-ops", path)
        assert said == f"--custom-ops {path}: cannot be read ({reason}): pass a shared library with operators"


def test_a_file_that_is_no_library_is_refused(satchel: Satchel, tiny: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.so"
    text.write_text("no library")
    folder = write_custom_bundle(tmp_path / "bundle", tiny, libraries=(text,))
    said = refused(satchel, folder, "--custom-ops", text)
    assert said.startswith(f"--custom-ops {text}: ONNX Runtime cannot load it (")
    assert said.endswith("): pass a shared library with operators")


def test_without_a_library_the_plain_graphs_run_with_one_line(satchel: Satchel, custom: Path) -> None:
    command = ("run", custom, "the cat", "--max-new-tokens", 3)
    err = satchel(*command).err
    assert err.count("the plain graphs run") == 1
    assert f"{LIBRARY.name} (SHA-256 {digest(LIBRARY)[:12]}...)" in err
    for flag in ("--no-custom-ops", "--no-custom-passes"):
        assert "plain" not in satchel(*command, flag).err


def test_without_plain_graphs_there_must_be_a_library(satchel: Satchel, library_only: Path) -> None:
    library = f"{LIBRARY.name} (SHA-256 {digest(LIBRARY)[:12]}...)"
    for flags in ((), ("--no-custom-ops",), ("--no-custom-passes",)):
        assert refused(satchel, library_only, *flags) == (
            f"{library_only}: needs the operators of {library}, and has no graphs without them: "
            "pass the library with --custom-ops"
        )
    assert Engine.open(open_bundle(library_only, custom=Custom((LIBRARY,))), threads=1).score(IDS).min() == 0


def test_flags_that_have_nothing_to_do_are_refused(
    satchel: Satchel, tiny: Path, custom: Path, passes_only: Path
) -> None:
    library = ("--custom-ops", LIBRARY)
    for arguments, said in (
        ((tiny, *library), f"{tiny}: needs no custom operators: leave --custom-ops out"),
        ((passes_only, *library), f"{passes_only}: needs no custom operators: leave --custom-ops out"),
        ((tiny, "--no-custom-ops"), f"{tiny}: needs no custom operators: leave --no-custom-ops out"),
        ((passes_only, "--no-custom-ops"), f"{passes_only}: needs no custom operators: leave"),
        ((tiny, "--no-custom-passes"), f"{tiny}: was exported without --pass: leave --no-custom-passes out"),
        ((custom, *library, "--no-custom-ops"), "--custom-ops and --no-custom-ops"),
        ((custom, *library, "--no-custom-passes"), "--custom-ops and --no-custom-passes"),
        ((custom, *library, *library), f"--custom-ops {LIBRARY}: its SHA-256 is {digest(LIBRARY)}, but {custom} was "
         "made with no other"),
    ):  # fmt: skip
        assert refused(satchel, *arguments).startswith(said)


def test_all_of_several_libraries_are_needed_in_any_order(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("a.so", "b.so", "c.so")]
    for file in files:
        file.write_bytes(file.name.encode())
    first, second, third = files
    needed = tuple(NamedFile(file.name, digest(file)) for file in (first, second))
    check_libraries((second, first), needed, "bundle")
    with pytest.raises(BundleError, match=r"bundle: .*b.so \(SHA-256"):
        check_libraries((first,), needed, "bundle")
    with pytest.raises(BundleError, match=rf"c.so: its SHA-256 is {digest(third)}.*with b.so with"):
        check_libraries((first, third), needed, "bundle")
    with pytest.raises(BundleError, match=r"b.so: its SHA-256 is .* was made with a.so with"):
        check_libraries((second, second, first), needed, "bundle")


def test_a_bundle_keeps_absolute_paths_of_its_libraries(
    custom: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(LIBRARY.parent)
    bundle = open_bundle(custom, custom=Custom((Path(LIBRARY.name),)))
    monkeypatch.chdir(tmp_path)
    assert score(bundle).min() == 0


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda m: m["custom_ops"][0].update(sha256="0"), "'custom_ops[0].sha256' must be 64 lower-case hex digits"),
        (lambda m: m["custom_ops"][0].update(name=3), "'custom_ops[0].name' must be"),
        (lambda m: m["plain"]["graphs"]["decode"].update(file="other.onnx"), "must be listed in 'files'"),
        (lambda m: m["plain"].update(graphs=None), "'static' must be set"),
        (lambda m: m["plain"].update(more=None), "unknown key 'plain.more'"),
    ],
)
def test_a_manifest_that_does_not_fit_together_is_refused(
    spoil: Callable[[dict], None], says: str, custom: Path, tmp_path: Path
) -> None:
    document = json.loads(json.dumps(read_manifest(custom)))
    spoil(document)
    write_manifest(tmp_path, document)
    with pytest.raises(BundleError, match=says.replace("[", r"\[")):
        open_bundle(tmp_path)
