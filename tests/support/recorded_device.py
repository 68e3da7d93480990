"""A stand-in for ONNX Runtime on a device: it runs on the CPU, notes all that is asked of it, and is as strict.

What "cann" cannot do fails here, too, and so does a CUDA graph that is replayed over other addresses than it was
captured with. Values of the device are copies: nothing but a transfer brings numbers there or back.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

ORT_NAMES = {"cuda": "CUDAExecutionProvider", "cann": "CANNExecutionProvider"}
GRAPH_ID = "gpu_graph_id"


@dataclass
class Run:
    """A run of a session: what was bound, by name, as (device, identity), and of which shape; where; the graph's id."""

    session: int
    bound: dict[str, tuple[str, object]]
    shapes: dict[str, tuple[int, ...]]
    folder: str
    graph: str | None


@dataclass
class Device:
    """What was asked of a device, and what it will answer about placement: operator, name, domain, provider."""

    name: str
    runs: list[Run] = field(default_factory=list)
    opened: list[dict[str, Any]] = field(default_factory=list)
    reads: list[tuple[int, ...]] = field(default_factory=list)
    values: list[tuple[str, int]] = field(default_factory=list)
    placed: list[tuple[str, str, str, str]] = field(default_factory=list)
    tells_placement: bool = True
    starts: bool = True


class Value:
    """An OrtValue on the device."""

    def __init__(self, device: Device, array: np.ndarray, kind: str, number: int) -> None:
        assert kind == device.name
        device.values.append((kind, number))
        self._device = device
        self.real = REAL_VALUE.ortvalue_from_numpy(np.array(array))
        self.held = self.real.numpy()  # for writing: of the CPU it is no copy

    def numpy(self) -> np.ndarray:
        self._device.reads.append(self.held.shape)
        return self.held.copy()

    def update_inplace(self, array: np.ndarray) -> None:
        if self._device.name == "cann":
            raise RuntimeError("Unsupported device: Cannot update the OrtValue on this device")
        self.real.update_inplace(array)

    def tensor_size_in_bytes(self) -> int:
        return int(self.held.nbytes)


REAL_VALUE, REAL_SESSION = ort.OrtValue, ort.InferenceSession


class Binding:
    def __init__(self, real: ort.IOBinding, device: Device) -> None:
        self.real, self._device = real, device
        self.bound: dict[str, tuple[str, object]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._alive: dict[str, object] = {}

    def bind_ortvalue_input(self, name: str, value: Value) -> None:
        self._note(name, self._device.name, id(value), value.held.shape, value)
        self.real.bind_ortvalue_input(name, value.real)

    def bind_ortvalue_output(self, name: str, value: Value) -> None:
        self._note(name, self._device.name, id(value), value.held.shape, value)
        self.real.bind_ortvalue_output(name, value.real)

    def bind_cpu_input(self, name: str, array: np.ndarray) -> None:
        copy = np.array(array)  # ONNX Runtime copies to the device when it binds
        self._note(name, "cpu", "copied", copy.shape, copy)
        self.real.bind_cpu_input(name, copy)

    def bind_input(self, name: str, *_: object) -> None:
        raise AssertionError(f"input {name} is bound by an address of the CPU")

    def bind_output(self, name: str, kind: str, number: int, dtype: type, shape: tuple[int, ...], at: int) -> None:
        self._note(name, kind, at, tuple(shape), None)
        self.real.bind_output(name, kind, number, dtype, shape, at)

    def _note(self, name: str, kind: str, which: object, shape: tuple[int, ...], alive: object) -> None:
        self.bound[name], self.shapes[name], self._alive[name] = (kind, which), shape, alive


class Session:
    def __init__(self, device: Device, path: object, options: ort.SessionOptions, providers: Sequence[Any]) -> None:
        name, chosen = providers[0]
        device.opened.append({
            "path": str(path),
            "provider": name,
            "options": dict(chosen),
            "level": options.graph_optimization_level,
            "record": options.get_session_config_entry("session.record_ep_graph_assignment_info"),
            "folder": os.getcwd(),
        })  # fmt: skip
        self._device, self._number = device, len(device.opened) - 1
        self._names = [name, "CPUExecutionProvider"] if device.starts else ["CPUExecutionProvider"]
        self._captures = chosen.get("enable_cuda_graph") == "1"
        self._captured: dict[str, dict[str, tuple[str, object]]] = {}
        self._real = REAL_SESSION(path, options, providers=["CPUExecutionProvider"])
        if device.tells_placement:
            self.get_provider_graph_assignment_info = self._placement

    def get_providers(self) -> list[str]:
        return self._names

    def get_inputs(self) -> Any:
        return self._real.get_inputs()

    def get_overridable_initializers(self) -> Any:
        return self._real.get_overridable_initializers()

    def get_outputs(self) -> Any:
        return self._real.get_outputs()

    def io_binding(self) -> Binding:
        return Binding(self._real.io_binding(), self._device)

    def run_with_iobinding(self, binding: Binding, options: ort.RunOptions | None = None) -> None:
        graph = None if options is None else options.get_run_config_entry(GRAPH_ID)
        run = Run(self._number, dict(binding.bound), dict(binding.shapes), os.getcwd(), graph)
        self._device.runs.append(run)
        if self._captures:
            assert graph not in (None, "0"), "a run would be captured under the id that all runs share"
            if graph != "-1":
                assert all(kind == self._device.name for kind, _ in run.bound.values()), "captured over the CPU"
                assert self._captured.setdefault(graph, run.bound) == run.bound, "replayed over other addresses"
        self._real.run_with_iobinding(binding.real)

    def _placement(self) -> list[SimpleNamespace]:
        kinds: dict[str, list[SimpleNamespace]] = {ORT_NAMES[self._device.name]: []}
        for operator, name, domain, provider in self._device.placed:
            kinds.setdefault(provider, []).append(SimpleNamespace(op_type=operator, name=name, domain=domain))
        return [SimpleNamespace(ep_name=key, get_nodes=lambda found=found: found) for key, found in kinds.items()]


def record_device(monkeypatch: pytest.MonkeyPatch, name: str) -> Device:
    """Let ONNX Runtime have the device "cuda" or "cann" for a test."""
    device = Device(name)

    def opened(path: object, options: ort.SessionOptions, *, providers: Sequence[Any], **_: object) -> Session:
        return Session(device, path, options, providers)

    def made(array: np.ndarray, kind: str = "cpu", number: int = 0) -> Value | ort.OrtValue:
        return REAL_VALUE.ortvalue_from_numpy(array) if kind == "cpu" else Value(device, array, kind, number)

    monkeypatch.setattr(ort, "InferenceSession", opened)
    monkeypatch.setattr(ort, "OrtValue", SimpleNamespace(ortvalue_from_numpy=made))
    monkeypatch.setattr(ort, "get_available_providers", lambda: [ORT_NAMES[name], "CPUExecutionProvider"])
    return device
