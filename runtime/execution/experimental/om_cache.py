"""Where ONNX Runtime keeps what it compiled for Ascend devices: one folder for each bundle, options and versions.

ONNX Runtime writes compiled graphs (`.om`) into the current directory, and loads one from there whose name fits. That
name tells of the graph's name and shapes and of nothing else: neither of weights nor of options or versions. So each
set of those gets a folder of its own, which is the working directory while sessions are opened and while a graph runs
for the first time, which is when it is compiled.

The working directory is that of the whole process. A lock keeps two of these from meeting. A thread of the program that
opens a file by a relative path at the same time would look in the wrong place: give absolute ones, or open the engine
and generate once before there are other threads.
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
"""Where the toolkit that compiles is; its path has its version in it."""

_lock = threading.RLock()


class Workplace:
    """Makes the right folder the working directory for what compiles graphs, and does nothing for other providers."""

    def __init__(self, folder: Path | None) -> None:
        """`folder` None compiles nothing."""
        self._folder = folder
        self._compiled: set[object] = set()

    @classmethod
    def of(cls, bundle: Bundle, choice: ProviderChoice) -> Workplace:
        """That of a bundle and a provider with its options."""
        return cls(om_folder(bundle, choice) if choice.name == COMPILING_PROVIDER else None)

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Be there. Raises SatchelError where the folder cannot be made."""
        if self._folder is None:
            yield
            return
        with _lock:
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise SatchelError(
                    f"{self._folder}: cannot be made ({error.strerror}): set XDG_CACHE_HOME to a folder for caches"
                ) from None
            with contextlib.chdir(self._folder):
                yield

    def first_run(self, graph: object) -> contextlib.AbstractContextManager[None]:
        """Be there for the first run of a graph."""
        if self._folder is None or graph in self._compiled:
            return contextlib.nullcontext()
        return self._compiling(graph)

    @contextlib.contextmanager
    def _compiling(self, graph: object) -> Iterator[None]:
        with self.entered():
            yield
            self._compiled.add(graph)


def om_folder(bundle: Bundle, choice: ProviderChoice) -> Path:
    """`$XDG_CACHE_HOME/satchel/om/<key>` (or under `~/.cache`); the key is a hash of all that decides the code."""
    facts = {
        "bundle": bundle.fingerprint,
        "options": choice.session_options(bundle.manifest),
        "onnxruntime": ort.__version__,
        "toolkit": [os.path.realpath(os.environ[name]) for name in TOOLKIT_VARIABLES if os.environ.get(name)],
    }
    import hashlib  # as in hash_memory

    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base).absolute() / "satchel" / "om" / key
