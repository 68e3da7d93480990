"""What specialized graphs depend on beside the bundle, and where the user's cache has a bundle for this machine."""

from __future__ import annotations

import contextlib
import os
import zlib
from pathlib import Path

from satchel.runtime.bundle import user_cache
from satchel.runtime.bundle.reader import Bundle
from satchel.runtime.kernels import library
from satchel.runtime.util.cpu import processor_features


def machine_key() -> str:
    """Eight hex digits that differ between machines, or versions, for which graphs are specialized differently."""
    import onnxruntime

    kernels = "none" if library.reason() is not None else str(library.VERSION)
    facts = [onnxruntime.__version__, kernels, *processor_features()]
    return f"{zlib.crc32(' '.join(facts).encode()):08x}"


def cache_name(bundle: Bundle) -> str:
    """The name that a copy of this bundle, specialized for this machine, has in the user's cache."""
    return f"specialized-{bundle.digest[:32]}-{machine_key()}"


def is_in_place(bundle: Bundle) -> bool:
    """Whether what is specialized goes into the bundle itself: a folder that this user may write to."""
    return bundle.packed is None and os.access(bundle.folder, os.W_OK | os.X_OK)


def attempts_file(bundle: Bundle) -> Path:
    """Where it is noted how often specializing this bundle in the background was begun and did not succeed."""
    return user_cache.bundles_folder() / f"{cache_name(bundle)}.attempts"


def attempts(bundle: Bundle) -> tuple[int, str]:
    """How often it was begun without success, and what went wrong the last time, as far as that is known."""
    with contextlib.suppress(OSError, ValueError):
        count, _, reason = attempts_file(bundle).read_text(encoding="utf-8").partition("\n")
        return int(count), reason
    return 0, ""


def note_attempts(bundle: Bundle, count: int, reason: str = "") -> bool:
    """Note it, 0 for a success. Returns False where nothing can be noted."""
    path = attempts_file(bundle)
    try:
        if count == 0:
            path.unlink(missing_ok=True)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{count}\n{reason}", encoding="utf-8", newline="\n")
    except OSError:
        return False
    return True
