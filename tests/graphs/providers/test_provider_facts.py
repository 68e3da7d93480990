"""The data files say what their sources say, and kernels match as ONNX Runtime matches them."""

from __future__ import annotations

import pytest
from support.provider_graphs import view

from satchel.graphs.providers.facts import VERSIONS, cann_facts, covers, cuda_ir_version, cuda_kernels
from satchel.graphs.providers.kernels import KernelTable, Match

OLD, NEW = VERSIONS
EXPERIMENTS = {"Affine", "Crop", "DynamicSlice", "ImageScaler", "ParametricSoftplus", "ScaledTanh"}
"""Operators that ONNX has taken back; tables still list them."""


def without_kernel(table: KernelTable, opset: int) -> set[str]:
    """The standard operators of a table that have no kernel for the definition that a graph of this opset uses."""
    missing = set()
    for key, kernels in table.kernels.items():
        version = table.version(key, opset)
        if (
            kernels
            and "::" not in key
            and version is not None
            and not any(kernel.is_for(version) for kernel in kernels)
        ):
            missing.add(key)
    return missing


@pytest.mark.parametrize("opset", [17, 18])
def test_every_operator_of_the_cuda_tables_has_a_kernel_at_the_recommended_opsets(opset: int) -> None:
    gone = {"Scatter", "Upsample", *EXPERIMENTS}
    assert without_kernel(cuda_kernels(NEW), opset) <= gone
    assert without_kernel(cuda_kernels(OLD), opset) <= gone | {"RoiAlign"}


def test_the_list_of_the_cann_provider_is_whole() -> None:
    facts = cann_facts()
    assert len(facts.whitelist) == 134
    assert facts.opsets == (8, 18)
    assert facts.no_int64 == {"CumSum", "Expand", "Pow"}
    assert not {"QuantizeLinear", "DequantizeLinear", "Attention", "Gelu", "RMSNormalization"} & set(facts.parser)
    assert facts.parser["ScatterND"] == ("8-18", "8,10-18")
    assert facts.parser["Gemm"] == ("8-18", "")


def test_only_the_older_version_has_a_known_limit_of_ir_versions() -> None:
    assert [cuda_ir_version(version) for version in VERSIONS] == [13, None]


@pytest.mark.parametrize(("opset", "inside"), [(7, False), (8, True), (9, False), (12, True), (18, True), (19, False)])
def test_a_list_of_opsets_is_read(opset: int, inside: bool) -> None:
    assert covers("8,12-18", opset) is inside
    assert not covers("", opset)


def fit(text: str, version: str = NEW, opset: int = 17) -> Match:
    found = view(text, kernels=cuda_kernels(version), opset=opset)
    return found.fits[found.nodes[0]].match


DEQUANTIZE = "g ({0}[4, 2] w, {1}[2] s) => ({1}[4, 2] y) {{ y = DequantizeLinear<axis = 1>(w, s) }}"


@pytest.mark.parametrize(
    ("codes", "scales", "opset", "match"),
    [
        ("int8", "float", 17, Match.FITS),
        ("int32", "float", 17, Match.NO_TYPE),
        ("int8", "float16", 19, Match.FITS),
        ("int4", "float16", 21, Match.FITS),
        ("int4", "float16", 24, Match.FITS),
        ("int16", "float16", 21, Match.NO_TYPE),
        ("int8", "bfloat16", 24, Match.NO_TYPE),
    ],
)
def test_dequantizing_is_matched_by_the_definition_of_its_opset(
    codes: str, scales: str, opset: int, match: Match
) -> None:
    assert fit(DEQUANTIZE.format(codes, scales), opset=opset) is match


def test_every_input_of_an_operator_with_many_is_looked_at() -> None:
    text = "g (float[1] a, float[1] b, {0}[1] c) => (float[3] y) {{ y = Concat<axis = 0>(a, b, c) }}"
    assert fit(text.format("float")) is Match.FITS
    assert fit("g (float8e4m3fn[1] a, float8e4m3fn[1] b) => (float8e4m3fn[2] y) { y = Concat<axis = 0>(a, b) }") is (
        Match.NO_TYPE
    )


def test_a_kernel_with_an_open_end_is_for_its_version_alone() -> None:
    text = "g (float[2] x) => (float[2] y) { y = Identity(x) }"
    assert fit(text, OLD, opset=20) is Match.FITS
    assert fit(text, OLD, opset=21) is Match.NO_VERSION
    assert fit(text, NEW, opset=21) is Match.FITS
