"""Makes `tests/support` importable, and keeps the runner's memory of hashes out of the home directory."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def _no_process_pool() -> Iterator[None]:
    """A command that runs inside the test process must not take ONNX Runtime's threads from all tests after it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("satchel.runtime.ort.session.share_thread_pool", lambda threads=None: None)
        yield
