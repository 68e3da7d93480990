"""One tiny bundle for all tests that only read it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from support.chat_bundle import write_chat_bundle
from support.tiny_bundle import VOCABULARY, change_manifest, write_bundle

from satchel.runtime.bundle import strict_json
from satchel.runtime.evaluation.certify import make_certificate
from satchel.runtime.execution.engine import Engine
from satchel.runtime.generation.generator import Generator
from satchel.runtime.ort.open_bundle import open_bundle


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("bundles") / "tiny")


@pytest.fixture(scope="session")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny bundle with a chat template."""
    return write_chat_bundle(tmp_path_factory.mktemp("bundles") / "chatty")


@pytest.fixture(scope="module")
def plain(chatty: Path) -> Iterator[Generator]:
    """A generator with a chat template that keeps nothing: what it gives is right."""
    generator = Generator.open(chatty, threads=1, prefix_cache_mib=0)
    yield generator
    generator.template.close()


@pytest.fixture(scope="session")
def engine(tiny: Path) -> Engine:
    return Engine.open(open_bundle(tiny), threads=1)


@pytest.fixture(scope="session")
def generator(tiny: Path) -> Generator:
    return Generator.open(tiny, threads=1)


@pytest.fixture(scope="session")
def certified(tiny: Path, engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny bundle with a certificate of itself."""
    folder = tmp_path_factory.mktemp("bundles") / "certified"
    shutil.copytree(tiny, folder)
    windows = [np.random.default_rng(2).integers(3, VOCABULARY, 20)]
    certificate = make_certificate(engine, engine.score, None, windows, [(0, 4, 16), (0, 9, 8)], skip=4)
    change_manifest(folder, "certificate", to=strict_json.to_json(certificate))
    return folder
