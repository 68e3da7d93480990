"""More formats of tiny checkpoints that are quantized already: compressed-tensors, FP8, bitsandbytes."""

from __future__ import annotations

import json

import numpy as np
import torch
from numpy.typing import NDArray
from support.quantized import Tensors, Writer, grid, words

FP8_MAX, INT8_MAX = 448.0, 127
NF4 = np.asarray(
    [-1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0,
     0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0], np.float32,
)  # fmt: skip
FP4 = np.asarray([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], np.float32)

Array = NDArray[np.float32]


def packed(bits: int, size: int, *, symmetric: bool = True, act_order: bool = False) -> Writer:
    """compressed-tensors "pack-quantized": values and zero points plus half the range, along inputs and outputs."""

    def write(name: str, weight: Array) -> tuple[Tensors, Array]:
        inputs = weight.shape[1]
        group_of = np.arange(inputs) // (inputs if size == -1 else size)
        if act_order:
            group_of = np.random.default_rng(inputs).permutation(group_of)
        codes, scales, zeros, widened = grid(weight, bits, size, symmetric=symmetric, group_of=group_of)
        made = {
            "weight_packed": words(codes, bits, 1),
            "weight_scale": torch.from_numpy(scales),
            "weight_shape": torch.tensor(weight.shape),
        }
        if not symmetric:
            made["weight_zero_point"] = words(zeros, bits, 0)
        if act_order:
            made["weight_g_idx"] = torch.from_numpy(group_of.astype(np.int32))
        return made, widened

    return write


def int8(*, symmetric: bool = True) -> Writer:
    """compressed-tensors "int-quantized", a scale for each output."""

    def write(name: str, weight: Array) -> tuple[Tensors, Array]:
        codes, scales, zeros, widened = grid(weight, 8, -1, symmetric=symmetric)
        made = {
            "weight": torch.from_numpy((codes - 128).astype(np.int8)),
            "weight_scale": torch.from_numpy(scales),
        }
        return made if symmetric else made | {
            "weight_zero_point": torch.from_numpy((zeros - 128).astype(np.int8))
        }, widened

    return write


def fp8(block: tuple[int, int], scale_name: str = "weight_scale_inv") -> Writer:
    """8-bit floats with a scale for each block of outputs and inputs, the last of which may be cut off."""

    def write(name: str, weight: Array) -> tuple[Tensors, Array]:
        outputs, inputs = weight.shape
        rows, columns = min(block[0], outputs), min(block[1], inputs)
        scales = np.zeros((-(-outputs // rows), -(-inputs // columns)), np.float32)
        stored = np.zeros_like(weight)
        for i in range(scales.shape[0]):
            for j in range(scales.shape[1]):
                place = (slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns))
                scales[i, j] = np.abs(weight[place]).max() / FP8_MAX
                stored[place] = weight[place] / scales[i, j]
        tensor = torch.from_numpy(stored).to(torch.float8_e4m3fn)
        wide = scales.repeat(rows, 0)[:outputs].repeat(columns, 1)[:, :inputs]
        return {"weight": tensor, scale_name: torch.from_numpy(scales)}, tensor.float().numpy() * wide

    return write


def nf4(size: int = 64, *, nested: bool = False) -> Writer:
    """bitsandbytes nf4: blocks of the flattened weight, the first of two values in the high half of a byte."""

    def write(name: str, weight: Array) -> tuple[Tensors, Array]:
        flat = np.pad(weight.reshape(-1), (0, -weight.size % size)).reshape(-1, size)
        largest = np.abs(flat).max(1).astype(np.float32)
        made: Tensors = {}
        state = {"quant_type": "nf4", "blocksize": size, "dtype": "float32", "shape": list(weight.shape)}
        if nested:
            offset = float(largest.mean())
            book = np.linspace(-1, 1, 256).astype(np.float32)
            top = np.abs(largest - np.float32(offset)).max(keepdims=True)
            codes = np.abs((largest - np.float32(offset))[:, None] / top - book).argmin(1).astype(np.uint8)
            largest = (book[codes] * top + np.float32(offset)).astype(np.float32)
            state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
            made = {
                "weight.absmax": torch.from_numpy(codes),
                "weight.nested_absmax": torch.from_numpy(top.repeat(-(-len(codes) // 256))),
                "weight.nested_quant_map": torch.from_numpy(book),
            }
        else:
            made = {"weight.absmax": torch.from_numpy(largest)}
        values = np.abs(flat[..., None] / largest[:, None, None] - NF4).argmin(-1)
        widened = (NF4[values] * largest[:, None]).reshape(-1)[: weight.size].reshape(weight.shape)
        pairs = values.reshape(-1)[: weight.size].reshape(-1, 2)
        text = np.frombuffer(json.dumps(state).encode(), np.uint8).copy()
        return made | {
            "weight": torch.from_numpy((pairs[:, :1] << 4 | pairs[:, 1:]).astype(np.uint8)),
            "weight.quant_map": torch.from_numpy(NF4),
            "weight.quant_state.bitsandbytes__nf4": torch.from_numpy(text),
        }, np.asarray(widened, np.float32)

    return write


def llm_int8() -> Writer:
    """bitsandbytes int8: rows of int8 and the largest magnitude of each."""

    def write(name: str, weight: Array) -> tuple[Tensors, Array]:
        largest = np.abs(weight).max(1).astype(np.float32)
        codes = np.rint(weight * (INT8_MAX / largest[:, None])).astype(np.int8)
        made = {
            "weight": torch.from_numpy(codes),
            "SCB": torch.from_numpy(largest),
            "weight_format": torch.tensor(0, dtype=torch.uint8),
        }
        return made, (codes * (largest[:, None] / np.float32(INT8_MAX))).astype(np.float32)

    return write


def fp4(size: int, *, nv: bool) -> Writer:
    """compressed-tensors' NVFP4 (8-bit float scales over one for all) and MXFP4 (powers of two)."""

    def write(name: str, weight: Array) -> tuple[Tensors, Array]:
        outputs = len(weight)
        groups = weight.reshape(outputs, -1, size)
        ideal = np.abs(groups).max(-1) / 6
        made: Tensors
        if nv:
            whole = np.float32(FP8_MAX / ideal.max())
            stored = torch.from_numpy(ideal * whole).to(torch.float8_e4m3fn)
            scales = (stored.float().numpy() / whole).astype(np.float32)
            made = {"weight_scale": stored, "weight_global_scale": torch.tensor([whole])}
        else:
            exponents = np.ceil(np.log2(ideal))
            scales = np.exp2(exponents).astype(np.float32)
            made = {"weight_scale": torch.from_numpy((exponents + 127).astype(np.uint8))}
        values = np.abs(np.abs(groups)[..., None] / scales[..., None, None] - FP4).argmin(-1)
        widened = (np.sign(groups) * FP4[values] * scales[..., None]).reshape(weight.shape).astype(np.float32)
        codes = (values + 8 * (groups < 0)).reshape(outputs, -1, 2)
        return made | {
            "weight_packed": torch.from_numpy((codes[..., 0] | codes[..., 1] << 4).astype(np.uint8))
        }, widened

    return write
