"""The adapters of a bundle: tensors for optional inputs of its graphs, read when a request first names one."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from satchel.runtime.bundle.manifest import AdapterSpec
from satchel.runtime.bundle.reader import Bundle
from satchel.runtime.errors import BundleError, PromptError
from satchel.runtime.ort.session import ORT_ERRORS

Tensors = Mapping[str, NDArray[Any]]


class Adapters:
    """The tensors of each adapter, by the names of the graphs' inputs; read once, and kept. Threads may share it."""

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle
        self._specs = {spec.name: spec for spec in bundle.manifest.adapters}
        self._read: dict[str, Tensors] = {}
        self._lock = threading.Lock()

    def check(self, name: str | None) -> None:
        """Raise PromptError if the bundle has no adapter of this name; None is the base model."""
        if name is not None and name not in self._specs:
            known = ", ".join(self._specs) or "none"
            raise PromptError(f"--adapter {name}: this bundle has no adapter of this name; its adapters: {known}")

    def tensors(self, name: str | None) -> Tensors:
        """What to bind for an adapter, nothing for None. Raises PromptError, and BundleError for a damaged file."""
        self.check(name)
        if name is None:
            return {}
        with self._lock:
            if name not in self._read:
                self._read[name] = self._load(self._specs[name])
            return self._read[name]

    def _load(self, spec: AdapterSpec) -> Tensors:
        place = self._bundle.folder / spec.file
        try:
            content = self._content(spec.file)  # its tensors are views of memory that goes with it
            stored = {key: np.array(value.numpy(), order="C") for key, value in content.get_parameters().items()}
        except (*ORT_ERRORS, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise BundleError(f"{place}: is no adapter of ONNX Runtime ({reason}): export the bundle again") from None
        except OSError as error:
            raise BundleError(f"{place}: cannot be read ({error.strerror}): check its permissions") from None
        found = {name: (array.dtype.name, array.shape) for name, array in stored.items()}
        wanted = {tensor.name: (tensor.dtype, tensor.shape) for tensor in spec.inputs}
        differing = sorted({*found.items()} ^ {*wanted.items()})
        if differing:
            raise BundleError(
                f"{place}: its tensors are not those in the manifest (first difference: {differing[0][0]}): "
                "export the bundle again"
            )
        return stored

    def _content(self, file: str) -> ort.AdapterFormat:
        """An adapter file as ONNX Runtime reads it, which takes a path: one in a packed bundle is copied out."""
        span = self._bundle.span(file)
        if span.whole:
            return ort.AdapterFormat.read_adapter(str(span.path))
        with tempfile.TemporaryDirectory(prefix="satchel-adapter-") as folder:
            path = Path(folder) / Path(file).name
            path.write_bytes(span.read())
            return ort.AdapterFormat.read_adapter(str(path))
