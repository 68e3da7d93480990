"""Custom passes and operators: which graphs of a bundle run, and with which libraries.

A bundle never contains or loads native code: the user names the library, and its digest must be the recorded one.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from satchel.runtime.bundle.hash_cache import sha256_of
from satchel.runtime.bundle.manifest import NamedFile
from satchel.runtime.bundle.plain_graphs import without_custom
from satchel.runtime.errors import BundleError, SatchelWarning

if TYPE_CHECKING:
    from satchel.runtime.bundle.reader import Bundle


@dataclasses.dataclass(frozen=True)
class Custom:
    """Which custom passes and operators are to run.

    Attributes:
        libraries: Shared libraries with the operators that a bundle's graphs need.
        operators: False selects the graphs that need no custom operators.
        passes: False selects the graphs without custom passes.
    """

    libraries: tuple[Path, ...] = ()
    operators: bool = True
    passes: bool = True


DEFAULT_CUSTOM = Custom()


def choose(bundle: Bundle, custom: Custom) -> Bundle:
    """The bundle with the graphs that are to run and the libraries they need.

    If libraries are needed and none is named, the plain graphs run, with a SatchelWarning.

    Raises:
        BundleError: A library is missing, not needed or not the recorded one, or the bundle has no such graphs.
    """
    needed, folder = bundle.manifest.custom_ops, bundle.folder
    if not (custom.operators and custom.passes):
        flag = "--no-custom-ops" if custom.passes else "--no-custom-passes"
        if custom.libraries:
            raise BundleError(f"--custom-ops and {flag} are mutually exclusive")
        if custom.passes and not needed:
            raise BundleError(f"{folder}: needs no custom operators: leave {flag} out")
        if not custom.passes and bundle.manifest.plain is None and not needed:
            raise BundleError(f"{folder}: was exported without --pass: leave {flag} out")
        return _plain(bundle)
    if custom.libraries:
        check_libraries(custom.libraries, needed, str(folder))
        return dataclasses.replace(bundle, custom_ops=tuple(path.resolve() for path in custom.libraries))
    if not needed:
        return bundle
    chosen = _plain(bundle)
    warnings.warn(
        f"{folder}: the plain graphs run, without custom passes, since those need the operators of "
        f"{_names(needed)}: pass it with --custom-ops, or pass --no-custom-ops",
        SatchelWarning,
        stacklevel=3,
    )
    return chosen


def check_libraries(libraries: Sequence[Path], needed: Sequence[NamedFile], bundle: str) -> None:
    """Check by their digests that the libraries are those that a bundle needs.

    Raises:
        BundleError: A library cannot be read or is not needed, or a needed one is not named.
    """
    if not needed:
        raise BundleError(f"{bundle}: needs no custom operators: leave --custom-ops out")
    left = list(needed)
    for library in libraries:
        digest = digest_of(library)
        matching = next((file for file in left if file.sha256 == digest), None)
        if matching is None:
            wanted = ", ".join(f"{file.name} with {file.sha256}" for file in left) or "no other"
            raise BundleError(
                f"--custom-ops {library}: its SHA-256 is {digest}, but {bundle} was made with {wanted}: pass that one, "
                "or export again"
            )
        left.remove(matching)
    if left:
        raise BundleError(f"{bundle}: also needs the operators of {_names(left)}: pass another --custom-ops")


def digest_of(library: Path) -> str:
    """The SHA-256 of a library, as 64 hex digits. Raises BundleError if it cannot be read."""
    try:
        return sha256_of(library, lambda read: None)
    except OSError as error:
        raise BundleError(
            f"--custom-ops {library}: cannot be read ({error.strerror}): pass a shared library with operators"
        ) from None


def _plain(bundle: Bundle) -> Bundle:
    if bundle.manifest.plain is None:
        raise BundleError(
            f"{bundle.folder}: needs the operators of {_names(bundle.manifest.custom_ops)}, and has no graphs without "
            "them: pass the library with --custom-ops"
        )
    return dataclasses.replace(bundle, manifest=without_custom(bundle.manifest), specialized=None, whole=False)


def _names(files: Sequence[NamedFile]) -> str:
    return ", ".join(f"{file.name} (SHA-256 {file.sha256[:12]}...)" for file in files)
