"""The forms that specialized graphs can have, and what the manifest says of each."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import onnxruntime as ort

from satchel.runtime.bundle.hash_cache import sha256_of
from satchel.runtime.bundle.manifest import FileRecord, Specialized
from satchel.runtime.bundle.reader import Bundle
from satchel.runtime.kernels.library import VERSION
from satchel.runtime.util.cpu import processor_features, processor_name
from satchel.runtime.util.defaults import PROVIDER

PREFIX = "specialized-"

Made = tuple[Specialized, dict[str, Path]]
"""What the manifest is to say of a form, and where its files lie by their names in the bundle."""


@dataclass(frozen=True)
class Form:
    """One set of specialized graphs: the graph that each phase is made of; prefill's alone where it serves both."""

    sources: dict[str, str]

    @property
    def blocks(self) -> bool:
        """Whether decode runs over weights in blocks."""
        return "decode_blocks" in self.sources.values()

    @property
    def int8(self) -> bool:
        """Whether prefill runs over int8 weights made of those in 4 bits."""
        return "prefill_int8" in self.sources.values()

    @property
    def native(self) -> bool:
        """Whether both phases run on satchel's own kernels."""
        return "native" in self.sources.values()


NATIVE = Form({"prefill": "native"})


def described(form: Form, graphs: dict[str, str], files: dict[str, Path]) -> Specialized:
    """What the manifest is to say of a form; `graphs` are its files by phase, `files` all of them by name."""
    return Specialized(
        onnxruntime=ort.__version__,
        provider=PROVIDER,
        processor=processor_name(),
        features=processor_features(),
        int8_prefill=form.int8,
        decode_blocks=form.blocks,
        tiled_attention=True,
        graphs=graphs,
        files={name: FileRecord(path.stat().st_size, sha256_of(path, lambda _: None)) for name, path in files.items()},
        native=form.native,
        kernels=VERSION if form.native else None,
    )


def token_of(bundle: Bundle, form: Form) -> str:
    """A short name for a form of this bundle on this machine, so that files of two are not taken for each other."""
    hashes = [record.sha256 for record in bundle.manifest.files.values()]
    facts = [ort.__version__, *processor_features(), *form.sources.values(), *hashes]
    if form.native:
        facts.append(str(VERSION))
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:8]
