"""The cache of graphs compiled for Ascend devices: one folder per bundle, options and versions.

ONNX Runtime writes compiled graphs (`.om`) into the current directory, and loads any from there whose name matches. The
name encodes the graph's name and shapes only, not weights, options or versions. Each combination of those therefore has
its own folder, which is the working directory while sessions are opened and while a graph runs for the first time, when
it is compiled.

The working directory belongs to the whole process. A lock serializes these changes. A thread of the program that opens
a relative path meanwhile would look in the wrong folder: use absolute paths, or open the engine and generate once
before other threads start.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import onnxruntime as ort

from satchel.runtime.bundle.reader import Bundle
from satchel.runtime.errors import SatchelError
from satchel.runtime.ort.providers import ProviderChoice

COMPILING_PROVIDER = "cann"
TOOLKIT_VARIABLES = ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME")
"""The path of the compiler toolkit, which contains its version."""

_lock = threading.RLock()


class Workplace:
    """Sets the working directory while graphs are compiled; does nothing for providers that do not compile."""

    def __init__(self, folder: Path | None) -> None:
        """`folder` None: nothing is compiled."""
        self._folder = folder
        self._compiled: set[object] = set()

    @classmethod
    def of(cls, bundle: Bundle, choice: ProviderChoice) -> Workplace:
        """The one for a bundle and a provider with its options."""
        return cls(om_folder(bundle, choice) if choice.name == COMPILING_PROVIDER else None)

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Work in the folder. Raises SatchelError if it cannot be created."""
        if self._folder is None:
            yield
            return
        with _lock:
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise SatchelError(
                    f"{self._folder}: cannot be created ({error.strerror}): set XDG_CACHE_HOME to a writable folder"
                ) from None
            with contextlib.chdir(self._folder):
                yield

    def first_run(self, graph: object) -> contextlib.AbstractContextManager[None]:
        """Work in the folder for the first run of a graph."""
        if self._folder is None or graph in self._compiled:
            return contextlib.nullcontext()
        return self._compiling(graph)

    @contextlib.contextmanager
    def _compiling(self, graph: object) -> Iterator[None]:
        with self.entered():
            yield
            self._compiled.add(graph)


def om_folder(bundle: Bundle, choice: ProviderChoice) -> Path:
    """`$XDG_CACHE_HOME/satchel/om/<key>` (or under `~/.cache`); the key hashes what the code depends on."""
    facts = {
        "bundle": bundle.fingerprint,
        "options": choice.session_options(bundle.manifest),
        "onnxruntime": ort.__version__,
        "toolkit": [os.path.realpath(os.environ[name]) for name in TOOLKIT_VARIABLES if os.environ.get(name)],
    }
    import hashlib  # heavy, and rarely needed

    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base).absolute() / "satchel" / "om" / key
