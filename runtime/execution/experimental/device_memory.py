"""Memory that graphs read and write: on the CPU, on a CUDA device, on an Ascend device.

Each kind of memory makes three things: a `Buffer` that stays on the device from step to step (keys and values, results
that one part of a graph passes to the next), a `Feed` that the host fills before a run, and a `Result` that the host
may read after it. They bind themselves to a graph's inputs and outputs by name. The Python interface of ONNX Runtime
supports less for "cann" than for "cuda" (no uninitialized values, no update in place), hence two classes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from satchel.runtime.ort.providers import ProviderChoice

Array = NDArray[Any]
Shape = tuple[int, ...]


class Buffer(ABC):
    """Memory of the device, of one shape and type, initially zero."""

    shape: Shape
    nbytes: int

    @abstractmethod
    def read(self) -> Array:
        """The contents: on the CPU the memory itself, elsewhere a copy."""

    @abstractmethod
    def write(self, values: Array) -> None:
        """Set the contents to `values`, of the same shape and type."""

    @abstractmethod
    def bind_input(self, binding: ort.IOBinding, name: str) -> None:
        """Bind it as input `name` of a graph."""

    @abstractmethod
    def bind_output(self, binding: ort.IOBinding, name: str) -> None:
        """Bind it as output `name` of a graph."""


class Feed(ABC):
    """An input that the host fills: `array`, which `send` copies to the device."""

    array: Array

    @abstractmethod
    def bind(self, binding: ort.IOBinding, name: str) -> None:
        """Bind it once, if the device supports that."""

    @abstractmethod
    def send(self, binding: ort.IOBinding, name: str) -> None:
        """Make the contents of `array` visible to the next run."""


class Result(ABC):
    """An output that the host may read."""

    @abstractmethod
    def bind(self, binding: ort.IOBinding, name: str) -> None:
        """Bind it as output `name` of a graph."""

    @abstractmethod
    def read(self) -> Array:
        """The values that the last run wrote."""


class Memory(ABC):
    """One kind of memory. `keeps_addresses`: writing to a buffer does not change its address."""

    keeps_addresses = True

    @abstractmethod
    def buffer(self, shape: Shape, dtype: str) -> Buffer:
        """A new buffer of zeros. Raises MemoryError, or ONNX Runtime's error, if there is not enough memory."""

    @abstractmethod
    def feed(self, shape: Shape, dtype: str) -> Feed:
        """A new input of zeros."""

    @abstractmethod
    def result(self, array: Array) -> Result:
        """An output of the shape and type of `array`, a host array that it may be read into."""


class HostMemory(Memory):
    """Memory of the CPU: graphs use the arrays themselves; nothing is copied."""

    def buffer(self, shape: Shape, dtype: str) -> Buffer:
        return _HostBuffer(np.zeros(shape, dtype))

    def feed(self, shape: Shape, dtype: str) -> Feed:
        return _HostFeed(np.zeros(shape, dtype))

    def result(self, array: Array) -> Result:
        return _HostResult(array)


class CudaMemory(Memory):
    """Memory of a CUDA device: everything is bound once, at fixed addresses, as CUDA graphs require."""

    def __init__(self, device: int = 0) -> None:
        self.device = device

    def buffer(self, shape: Shape, dtype: str) -> Buffer:
        return _CudaBuffer(self._value(np.zeros(shape, dtype)), shape)

    def feed(self, shape: Shape, dtype: str) -> Feed:
        array = np.zeros(shape, dtype)
        return _CudaFeed(array, self._value(array))

    def result(self, array: Array) -> Result:
        return _CudaResult(self._value(np.zeros(array.shape, array.dtype)))

    def _value(self, array: Array) -> ort.OrtValue:
        return ort.OrtValue.ortvalue_from_numpy(array, "cuda", self.device)


class CannMemory(Memory):
    """Memory of an Ascend device. Results are copied to the CPU by the run; inputs are bound before each run."""

    keeps_addresses = False

    def __init__(self, device: int = 0) -> None:
        self.device = device

    def buffer(self, shape: Shape, dtype: str) -> Buffer:
        return _CannBuffer(np.zeros(shape, dtype), self.device)

    def feed(self, shape: Shape, dtype: str) -> Feed:
        return _CannFeed(np.zeros(shape, dtype))

    def result(self, array: Array) -> Result:
        return _HostResult(array)


def memory_of(choice: ProviderChoice) -> Memory:
    """The memory that a provider's graphs use. Raises ProviderError for a device id that is not a number."""
    if choice.name == "cuda":
        return CudaMemory(choice.device)
    return CannMemory(choice.device) if choice.name == "cann" else HostMemory()


class _HostBuffer(Buffer):
    def __init__(self, array: Array) -> None:
        self._array = array
        self.shape, self.nbytes = array.shape, array.nbytes

    def read(self) -> Array:
        return self._array

    def write(self, values: Array) -> None:
        if values is not self._array:
            self._array[...] = values

    def bind_input(self, binding: ort.IOBinding, name: str) -> None:
        _bind_host_input(binding, name, self._array)

    def bind_output(self, binding: ort.IOBinding, name: str) -> None:
        _bind_host_output(binding, name, self._array)


class _HostFeed(Feed):
    def __init__(self, array: Array) -> None:
        self.array = array

    def bind(self, binding: ort.IOBinding, name: str) -> None:
        _bind_host_input(binding, name, self.array)

    def send(self, binding: ort.IOBinding, name: str) -> None:
        """Nothing to do: a run reads the array itself."""


class _HostResult(Result):
    def __init__(self, array: Array) -> None:
        self._array = array

    def bind(self, binding: ort.IOBinding, name: str) -> None:
        _bind_host_output(binding, name, self._array)

    def read(self) -> Array:
        return self._array


class _CudaBuffer(Buffer):
    def __init__(self, value: ort.OrtValue, shape: Shape) -> None:
        self._value = value
        self.shape, self.nbytes = shape, value.tensor_size_in_bytes()

    def read(self) -> Array:
        values: Array = self._value.numpy()
        return values

    def write(self, values: Array) -> None:
        self._value.update_inplace(np.ascontiguousarray(values))

    def bind_input(self, binding: ort.IOBinding, name: str) -> None:
        binding.bind_ortvalue_input(name, self._value)

    def bind_output(self, binding: ort.IOBinding, name: str) -> None:
        binding.bind_ortvalue_output(name, self._value)


class _CudaFeed(Feed):
    def __init__(self, array: Array, value: ort.OrtValue) -> None:
        self.array, self._value = array, value

    def bind(self, binding: ort.IOBinding, name: str) -> None:
        binding.bind_ortvalue_input(name, self._value)

    def send(self, binding: ort.IOBinding, name: str) -> None:
        self._value.update_inplace(self.array)


class _CudaResult(Result):
    def __init__(self, value: ort.OrtValue) -> None:
        self._value = value

    def bind(self, binding: ort.IOBinding, name: str) -> None:
        binding.bind_ortvalue_output(name, self._value)

    def read(self) -> Array:
        values: Array = self._value.numpy()
        return values


class _CannBuffer(Buffer):
    """A value of the device, replaced by a new one at each write: this device has no update in place."""

    def __init__(self, zeros: Array, device: int) -> None:
        self._device = device
        self.shape, self.nbytes = zeros.shape, zeros.nbytes
        self.write(zeros)

    def read(self) -> Array:
        values: Array = self._value.numpy()
        return values

    def write(self, values: Array) -> None:
        self._value = ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(values), "cann", self._device)

    def bind_input(self, binding: ort.IOBinding, name: str) -> None:
        binding.bind_ortvalue_input(name, self._value)

    def bind_output(self, binding: ort.IOBinding, name: str) -> None:
        binding.bind_ortvalue_output(name, self._value)


class _CannFeed(Feed):
    def __init__(self, array: Array) -> None:
        self.array = array

    def bind(self, binding: ort.IOBinding, name: str) -> None:
        """Nothing to do: ONNX Runtime copies to the device when an input is bound, so `send` binds it."""

    def send(self, binding: ort.IOBinding, name: str) -> None:
        binding.bind_cpu_input(name, self.array)


def _bind_host_input(binding: ort.IOBinding, name: str, array: Array) -> None:
    binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)


def _bind_host_output(binding: ort.IOBinding, name: str, array: Array) -> None:
    binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
