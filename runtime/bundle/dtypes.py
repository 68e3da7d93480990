"""Element types: their names in manifests, in ONNX files and in ONNX Runtime, and their sizes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DType:
    """An element type.

    Attributes:
        name: As manifests and numpy call it.
        onnx: Its number in TensorProto.DataType.
        bits: The size of one element.
        ort: As ONNX Runtime calls it in the type of an input or output: tensor(`ort`).
    """

    name: str
    onnx: int
    bits: int
    ort: str

    @property
    def nbytes(self) -> int:
        """Bytes of one element; 0 for types of less than a byte."""
        return self.bits // 8

    @property
    def tensor(self) -> str:
        """The type of an input or output in ONNX Runtime."""
        return f"tensor({self.ort})"


FLOAT32 = DType("float32", 1, 32, "float")
UINT8 = DType("uint8", 2, 8, "uint8")
INT8 = DType("int8", 3, 8, "int8")
INT32 = DType("int32", 6, 32, "int32")
INT64 = DType("int64", 7, 64, "int64")
BOOL = DType("bool", 9, 8, "bool")
FLOAT16 = DType("float16", 10, 16, "float16")
UINT4 = DType("uint4", 21, 4, "uint4")
INT4 = DType("int4", 22, 4, "int4")

DTYPES = {dtype.name: dtype for dtype in (FLOAT32, FLOAT16, INT64, INT32, INT8, UINT8, BOOL)}
"""Name -> type of what a manifest declares: inputs, outputs, caches and lookup tables."""

BY_ONNX = {dtype.onnx: dtype for dtype in (*DTYPES.values(), UINT4, INT4)}
"""Number in TensorProto.DataType -> type."""

QUANTIZED = {(8, True): INT8, (8, False): UINT8, (4, True): INT4, (4, False): UINT4}
"""(bits, symmetric) -> type of quantized values as DequantizeLinear reads them; asymmetric ones have zero points."""
