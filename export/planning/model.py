"""What a plan asks of a model, whether its sizes come from a config or from a bundle."""

from __future__ import annotations

import dataclasses
import re
from typing import Protocol

from satchel.export.config import FLOAT_PRECISIONS
from satchel.export.errors import ExportError
from satchel.export.planning import stored
from satchel.export.planning.shape import FLOAT_BYTES, Shape, most_devices
from satchel.export.planning.stored import Precision
from satchel.runtime.bundle.contract import WEIGHTS_NAME
from satchel.runtime.bundle.dtypes import DTYPES
from satchel.runtime.bundle.onnx_wire import external_tensors
from satchel.runtime.bundle.reader import Bundle
from satchel.runtime.execution.spans import OWN_CHUNK
from satchel.runtime.tools.bench.decode_traffic import norm_width, weight_bytes

BY_INPUT = (".o_proj", ".out_proj", ".down_proj")
"""The layers behind those that devices divide by output."""


class Model(Protocol):
    """A model: sizes in numbers, and in bytes on the device that has most of several."""

    @property
    def name(self) -> str: ...
    @property
    def precision(self) -> str: ...
    @property
    def hidden(self) -> int: ...
    @property
    def vocabulary(self) -> int: ...
    @property
    def context(self) -> int: ...
    @property
    def layers(self) -> int: ...
    @property
    def parameters(self) -> int: ...
    @property
    def active_parameters(self) -> int: ...
    @property
    def reductions(self) -> int:
        """All-reduces of one step."""

    @property
    def joined(self) -> tuple[int, ...]:
        """The inputs of the layers in front of and behind which devices hand each other what they have, in place of an
        all-reduce."""

    @property
    def embedding_reductions(self) -> int:
        """Those that a table of tokens takes which is cut by its rows."""

    @property
    def most_devices(self) -> int:
        """How many devices can have a part of each layer."""

    def weights(self, devices: int = 1, stages: int = 1) -> int:
        """Bytes of weights."""

    def stage_layers(self, stages: int) -> int:
        """How many layers the stage with most of them has."""

    def states(self, devices: int = 1, stages: int = 1) -> int:
        """Bytes of the states of one sequence."""

    def read(self, devices: int = 1) -> int:
        """Bytes of weights that a decode step reads."""

    def cache(self, devices: int = 1) -> int:
        """Bytes of the KV cache for one token."""

    def cache_read(self, length: int, devices: int = 1) -> int:
        """Bytes of the KV cache that a decode step reads at this length."""

    def attention_sums(self, tokens: int) -> float:
        """Floating-point operations between the queries of a prompt and its keys and values."""

    def activations(self, devices: int = 1) -> int:
        """Bytes of what one run of prefill holds between layers, about."""


@dataclasses.dataclass(frozen=True)
class Planned:
    """A model that is not exported yet. `positions` are those of the bundle."""

    name: str
    shape: Shape
    stored: Precision
    positions: int

    @property
    def precision(self) -> str:
        return self.stored.name

    @property
    def hidden(self) -> int:
        return self.shape.hidden

    @property
    def vocabulary(self) -> int:
        return self.shape.vocabulary

    @property
    def context(self) -> int:
        return self.positions

    @property
    def layers(self) -> int:
        return len(self.shape.layers)

    @property
    def parameters(self) -> int:
        return self.shape.parameters

    @property
    def active_parameters(self) -> int:
        return self.shape.active_parameters

    @property
    def reductions(self) -> int:
        return sum(layer.reductions for layer in self.shape.layers)

    @property
    def joined(self) -> tuple[int, ...]:
        if self.stored.recipe is None:
            return ()
        cut = (m for layer in self.shape.layers for m in layer.matrices if m.cut is not None and m.kind == "linear")
        return tuple(matrix.inputs for matrix in cut if matrix.layer.endswith(BY_INPUT))

    @property
    def embedding_reductions(self) -> int:
        return 1

    @property
    def most_devices(self) -> int:
        return most_devices(self.shape)

    def weights(self, devices: int = 1, stages: int = 1) -> int:
        return stored.weight_bytes(self.shape, self.stored, self.positions, devices, stages)

    def stage_layers(self, stages: int) -> int:
        return max(map(len, stored.stage_layers(self.shape, self.stored, stages)))

    def states(self, devices: int = 1, stages: int = 1) -> int:
        return stored.state_bytes(self.shape, self.stored, devices, stages)

    def read(self, devices: int = 1) -> int:
        return stored.read_bytes(self.shape, self.stored, devices)

    def cache(self, devices: int = 1) -> int:
        return stored.cache_bytes(self.shape, self.stored, devices)

    def cache_read(self, length: int, devices: int = 1) -> int:
        return stored.cache_read(self.shape, self.stored, length, devices)

    def attention_sums(self, tokens: int) -> float:
        queries = (m.outputs for layer in self.shape.layers for m in layer.matrices if m.layer.endswith(".q_proj"))
        return 2.0 * tokens**2 * sum(queries)

    def activations(self, devices: int = 1) -> int:
        widest = max((2 * m.outputs // devices for layer in self.shape.layers for m in layer.matrices), default=0)
        return FLOAT_BYTES * (OWN_CHUNK * (4 * self.hidden + widest) + self.vocabulary)


class Made:
    """A bundle. Nothing is read but its manifest and its decode graph.

    A manifest has no widths of queries, so a bundle is planned for no more devices than it has KV heads, and its
    matrices count as if each were cut evenly. Each device that shares a layer counts all of its states.

    Raises:
        ExportError: Its decode graph has no norm, from which the width of the residual stream is known.
    """

    embedding_reductions = 1

    def __init__(self, name: str, bundle: Bundle) -> None:
        manifest = bundle.manifest
        if manifest.graphs is None:
            raise ExportError(f"{name}: a bundle for {manifest.target} cannot be planned: give its checkpoint")
        self.name, self.precision = name, manifest.precision
        model, graph = bundle.read(manifest.graphs.decode.file), manifest.model
        hidden = norm_width(model)
        if hidden is None:
            raise ExportError(f"{name}: its decode graph has no norm that shows its width: give its checkpoint")
        self.hidden, self.vocabulary, self.context = hidden, graph.vocab_size, graph.max_context
        numbers = [int(n) for tensor in external_tensors(model) for n in re.findall(r"\.(\d+)\.", tensor)]
        self.layers = 1 + max(numbers, default=0)
        self.parameters, self.reductions = graph.parameters, 2 * self.layers
        self.joined = () if self.precision in FLOAT_PRECISIONS else (hidden,) * self.reductions
        self._states = manifest.state_bytes
        self._file = manifest.files[WEIGHTS_NAME].bytes
        self._read = min(weight_bytes(bundle), self._file)
        self.active_parameters = round(graph.parameters * self._read / self._file)
        native = [variant.name for variant in manifest.variants if variant.kernel_abi is not None]
        self._cache = manifest.cache_of(native[0]) if native else manifest.kv_cache
        self.most_devices = min((layer.kv_heads for layer in self._cache.layers), default=1)

    def weights(self, devices: int = 1, stages: int = 1) -> int:
        return round((self._file - self._read + self._read / devices) / stages)

    def stage_layers(self, stages: int) -> int:
        return -(-self.layers // stages)

    def states(self, devices: int = 1, stages: int = 1) -> int:
        return round(self._states / stages)

    def read(self, devices: int = 1) -> int:
        return round(self._read / devices)

    def cache(self, devices: int = 1) -> int:
        numbers = (-(-c.kv_heads // devices) * (c.key_dim + c.value_dim) for c in self._cache.layers)
        return sum(numbers) * DTYPES[self._cache.dtype].nbytes * (2 if self._cache.mode == "swapped" else 1)

    def cache_read(self, length: int, devices: int = 1) -> int:
        return self.cache(devices) * length // (2 if self._cache.mode == "swapped" else 1)

    def attention_sums(self, tokens: int) -> float:
        return 2.0 * tokens**2 * self.hidden * len(self._cache.layers)

    def activations(self, devices: int = 1) -> int:
        return FLOAT_BYTES * (OWN_CHUNK * (4 + 8 // devices) * self.hidden + self.vocabulary)
