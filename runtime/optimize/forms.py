"""The forms that specialized graphs can have, and their manifest entries."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import onnxruntime as ort

from satchel.runtime.bundle.checks import PREPARED
from satchel.runtime.bundle.graph_specs import Variant
from satchel.runtime.bundle.hash_cache import sha256_of
from satchel.runtime.bundle.manifest import FileRecord, Manifest, PreparedGraph, Specialized
from satchel.runtime.bundle.reader import Bundle
from satchel.runtime.util.cpu import processor_features, processor_name
from satchel.runtime.util.defaults import PROVIDER

PREFIX = "specialized-"

STORED = "stored"
"""The name of the layout in which a bundle stores weights; the other layouts are those of variants."""

Made = tuple[Specialized, dict[str, Path]]
"""The manifest entry of a form, and the paths of its files by their names in the bundle."""


@dataclass(frozen=True)
class Form:
    """One set of specialized graphs: the source graph of each phase; only that of prefill if it runs decode too."""

    sources: dict[str, str]


def portable_form(manifest: Manifest) -> Form:
    """The form with the weights as the bundle stores them."""
    together = manifest.graph("decode").session_of is not None
    return Form({"prefill": "prefill"} if together else {"prefill": "prefill", "decode": "decode"})


def form_of(variant: Variant) -> Form:
    """The form in which a variant runs its phases, and the portable graph runs any other."""
    if set(variant.runs) == set(PREPARED):
        return Form({"prefill": variant.name})
    return Form({phase: variant.name if phase in variant.runs else phase for phase in PREPARED})


def serves(manifest: Manifest, made: Specialized, layout: str, kernels: str) -> bool:
    """Whether existing specialized graphs match these options of `specialize`."""
    used = [manifest.variant(name) for name in made.variants]
    own = any(variant.kernel_abi is not None for variant in used)
    if kernels != "auto" and own != (kernels == "satchel"):
        return False
    layouts = {variant.weights.layout for variant in used}
    return layout == "auto" or (not own and layouts == (set() if layout == STORED else {layout}))


def described(bundle: Bundle, form: Form, graphs: dict[str, str], files: dict[str, Path]) -> Specialized:
    """The manifest entry of a form; `graphs` are its graph files by phase, `files` the paths of all files by name."""
    variants = {variant.name for variant in bundle.manifest.variants}
    sources = {phase: source if source in variants else None for phase, source in form.sources.items()}
    return Specialized(
        onnxruntime=ort.__version__,
        provider=PROVIDER,
        processor=processor_name(),
        features=processor_features(),
        tiled_attention=True,
        graphs={phase: PreparedGraph(file, sources[phase]) for phase, file in graphs.items()},
        files={name: FileRecord(path.stat().st_size, sha256_of(path, lambda _: None)) for name, path in files.items()},
    )


def token_of(bundle: Bundle, form: Form) -> str:
    """A short hash that identifies a form of this bundle on this machine in file names."""
    hashes = [record.sha256 for record in bundle.manifest.files.values()]
    facts = [ort.__version__, *processor_features(), *form.sources.values(), *hashes]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:8]
