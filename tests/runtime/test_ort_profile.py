"""Reading ONNX Runtime's profiles: runs, their kernels, and the layers of those that name none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from satchel.runtime.errors import SatchelError
from satchel.runtime.tools.profiling.ort_profile import AFTER, BEFORE, Place, place_kernels, read_runs

# A decode step of two layers as the profiler shows it, with the layer of each node.
STEP = [
    ("node_embedding", BEFORE),
    ("mul_23.norm", BEFORE),
    ("model.layers.0.self_attn.qkv_proj", 0),
    ("mask.shape", BEFORE),
    ("seqlens_k", BEFORE),
    ("MatMul_17", 0),
    ("attention.0", 0),
    ("model.layers.0.self_attn.o_proj", 0),
    ("mul_144.norm.skip", 0),
    ("model.layers.0.mlp.gate_up_proj.split", 0),
    ("node_silu/QuickGeluFusion/", 0),
    ("model.layers.0.mlp.down_proj", 0),
    ("mul_180.norm.skip", 1),  # the norm in front of layer 1
    ("attention.1", 1),
    ("model.layers.1.mlp.down_proj", 1),
    ("last_token.row", AFTER),
    ("mul_4733.norm", AFTER),
    ("lm_head.tied.codes", AFTER),
]


def test_a_node_without_a_layer_in_its_name_has_that_of_its_neighbors() -> None:
    names = [name for name, _ in STEP]
    found = place_kernels(names, 2)
    assert [place.layer for place in found] == [layer for _, layer in STEP]
    assert found[6] == Place(0, by_name=True)
    assert found[8] == Place(0, by_name=False)


def test_the_nodes_of_an_int8_cache_do_not_draw_others_into_their_layer() -> None:
    before = ["kv_cache.ids", "kv_cache.1.value.codes", "kv_cache.0.key.codes"]
    after = ["kv_cache.1.value.new", "present.1.value", "kv_cache.0.key.new", "present.0.key"]
    names = [*before, *(name for name, _ in STEP), *after]
    assert [place.layer for place in place_kernels(names, 2)] == [
        BEFORE,
        1,
        0,
        *(layer for _, layer in STEP),
        1,
        1,
        0,
        0,
    ]


def event(name: str, start: int, duration: int = 1, operator: str | None = None) -> dict[str, Any]:
    args = {} if operator is None else {"op_name": operator, "provider": "CPUExecutionProvider"}
    return {"cat": "Node" if operator else "Session", "name": name, "ts": start, "dur": duration, "args": args}


def test_a_run_has_the_kernels_that_came_before_it(tmp_path: Path) -> None:
    events = [
        event("session_initialization", 0, 9),
        event("a_kernel_time", 11, 2, "MatMul"),
        event("a_fence_after", 13, 2, "MatMul"),
        event("b_kernel_time", 14, 3, "Add"),
        event("SequentialExecutor::Execute", 10, 8),
        event("model_run", 10, 9),
        event("a_kernel_time", 21, 4, "MatMul"),
        event("model_run", 20, 9),
    ]
    (tmp_path / "profile.json").write_text(json.dumps(events), encoding="utf-8")
    first, second = read_runs(tmp_path / "profile.json")
    assert (first.start, first.duration, second.start) == (10, 9, 20)
    assert [(k.name, k.operator, k.start, k.duration) for k in first.kernels] == [
        ("a", "MatMul", 11, 2),
        ("b", "Add", 14, 3),
    ]
    assert [kernel.duration for kernel in second.kernels] == [4]
    assert second.kernels[0].facts == {"provider": "CPUExecutionProvider"}


@pytest.mark.parametrize(
    "content",
    [
        None,
        b"",
        b'[{"cat": "Node", "name": "a"b_kernel_time"}]',
        b'[{"cat": "Node", "name": "a_kernel_time", "ts": 1, "dur": 1, "args": {}}]',
        b'[{"cat": "Node", "name": "a_kernel_time", "ts": null, "dur": 1, "args": {"op_name": "Add"}}]',
        b"[1]",
        b"7",
    ],
)
def test_what_is_no_profile_is_refused(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "profile.json").write_bytes(content)
    with pytest.raises(SatchelError, match="cannot be read" if content is None else r"profile\.json: .*is invalid"):
        read_runs(tmp_path / "profile.json")
