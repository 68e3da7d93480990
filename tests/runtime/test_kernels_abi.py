"""The function indices of `abi.h`: each function that it names is called in the installed ONNX Runtime."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from support.kernels import Product, needs_kernels

ABI = Path(__file__).parents[2] / "runtime" / "kernels" / "abi.h"
# Not in abi.h: what the test needs to make the arguments.
HELPERS = {
    "GetErrorMessage": 2,
    "CreateSessionOptions": 10,
    "CreateTensorWithDataAsOrtValue": 49,
    "CreateCpuMemoryInfo": 69,
}
FLOAT, POINTER = 1, ctypes.c_void_p
# Called by satchel's operators alone, since ONNX Runtime makes their arguments.
BY_KERNELS = {
    "KernelInfoGetAttribute_float", "KernelInfoGetAttribute_int64", "KernelInfoGetAttribute_string",
    "KernelContext_GetInputCount", "KernelContext_GetInput", "KernelContext_GetOutput", "KernelContext_ParallelFor",
    "CustomOpDomain_Add", "GetSessionConfigEntry", "KernelInfoGetConstantInput_tensor",
}  # fmt: skip


def indices() -> dict[str, int]:
    """The functions of abi.h, by name."""
    found = re.findall(r"^ORT_FUNCTION\((\w+), (\d+),", ABI.read_text(), re.MULTILINE)
    return {name: int(index) for name, index in found}


class Api:
    """The vtable of the installed ONNX Runtime; functions are called by name, at the index that abi.h has."""

    def __init__(self) -> None:
        folder = Path(ort.__file__).parent / "capi"
        library = ctypes.CDLL(str(next(folder.glob("libonnxruntime.so.*"))))
        library.OrtGetApiBase.restype = POINTER
        base = ctypes.cast(library.OrtGetApiBase(), ctypes.POINTER(POINTER))
        get_api = ctypes.CFUNCTYPE(POINTER, ctypes.c_uint32)(base[0])
        self.table = ctypes.cast(get_api(20), ctypes.POINTER(POINTER))
        self.indices = indices() | HELPERS
        self.called: set[str] = set()

    def __call__(self, name: str, *arguments: Any, result: Any = POINTER) -> Any:
        self.called.add(name)
        function = ctypes.CFUNCTYPE(result, *[type(argument) for argument in arguments])
        return function(self.table[self.indices[name]])(*arguments)

    def make(self, name: str, *arguments: Any) -> ctypes.c_void_p:
        """Call a function whose last parameter receives a new object."""
        made = POINTER()
        assert self(name, *arguments, ctypes.cast(ctypes.byref(made), POINTER)) is None
        return made


@pytest.fixture
def api() -> Iterator[Api]:
    if not list((Path(ort.__file__).parent / "capi").glob("libonnxruntime.so.*")):
        pytest.skip("this ONNX Runtime has no libonnxruntime.so")
    yield Api()


def test_functions_of_the_vtable_do_what_their_names_say(api: Api) -> None:
    status = POINTER(api("CreateStatus", ctypes.c_int(2), ctypes.c_char_p(b"a message")))
    assert api("GetErrorMessage", status, result=ctypes.c_char_p) == b"a message"
    api("ReleaseStatus", status, result=None)

    domain = api.make("CreateCustomOpDomain", ctypes.c_char_p(b"tests"))
    options = api.make("CreateSessionOptions")
    assert api("AddCustomOpDomain", options, domain) is None

    array = np.arange(6, dtype=np.float32)
    shape = (ctypes.c_int64 * 2)(2, 3)
    memory = api.make("CreateCpuMemoryInfo", ctypes.c_int(1), ctypes.c_int(0))
    size = ctypes.c_size_t(array.nbytes)
    dims = ctypes.cast(shape, POINTER)
    value = api.make(
        "CreateTensorWithDataAsOrtValue",
        memory,
        POINTER(array.ctypes.data),
        size,
        dims,
        ctypes.c_size_t(2),
        ctypes.c_int(FLOAT),
    )
    assert api.make("GetTensorMutableData", value).value == array.ctypes.data
    info = api.make("GetTensorTypeAndShape", value)
    kind, count, found = ctypes.c_int(), ctypes.c_size_t(), (ctypes.c_int64 * 2)()
    assert api("GetTensorElementType", info, ctypes.cast(ctypes.byref(kind), POINTER)) is None
    assert api("GetDimensionsCount", info, ctypes.cast(ctypes.byref(count), POINTER)) is None
    assert api("GetDimensions", info, ctypes.cast(found, POINTER), ctypes.c_size_t(2)) is None
    assert (kind.value, count.value, list(found)) == (FLOAT, 2, [2, 3])
    api("ReleaseTensorTypeAndShapeInfo", info, result=None)
    own = ctypes.POINTER(ctypes.c_int64)()
    arguments = [ctypes.cast(ctypes.byref(each), POINTER) for each in (kind, own, count)]
    kind.value = count.value = 0
    assert api("GetTensorElementTypeAndShapeDataReference", value, *arguments) is None
    assert (kind.value, count.value, own[:2]) == (FLOAT, 2, [2, 3])

    assert indices().keys() - api.called == BY_KERNELS


@needs_kernels
def test_functions_that_only_a_kernel_can_call_are_called_by_an_operator() -> None:
    product = Product(64, 64, epsilon=1e-5, hadamard=32, gate="silu", optional="brg")
    feeds = product.feeds(200, seed=3)  # float, int64 and string attributes, inputs left out, rows for two threads
    found = product.session(1, feeds, threads=2).run(None, feeds)[0]
    wanted = product.expected(1, feeds)
    assert np.abs(found - wanted).max() < 2e-5 * np.abs(wanted).max()
    sources = "".join(path.read_text() for path in ABI.parent.glob("*.c"))
    assert {name for name in BY_KERNELS if f"{name})(" not in sources} == set()
