"""States of layers with a convolution or a recurrence in a manifest: read as written, and refused where impossible."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from support.tiny_bundle import read_manifest
from support.tiny_hybrid import write_hybrid

from satchel.runtime.bundle.manifest import Manifest
from satchel.runtime.errors import BundleError


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return read_manifest(write_hybrid(tmp_path_factory.mktemp("states") / "bundle"))


@pytest.fixture
def document(written: dict[str, Any]) -> dict[str, Any]:
    return copy.deepcopy(written)


def test_states_are_read_as_written_and_their_bytes_counted(document: dict[str, Any]) -> None:
    manifest = Manifest.from_json(document)
    assert manifest.to_json() == document
    assert [(state.layer, state.kind) for state in manifest.states] == [
        (0, "conv"), (0, "recurrent"), (1, "conv"), (3, "conv"), (3, "recurrent"),
    ]  # fmt: skip
    assert manifest.state_bytes == 4 * (2 * (64 * 3 + 2 * 8 * 16) + 64 * 3)
    assert [layer.past_key for layer in manifest.kv_cache.layers] == ["past_key_values.2.key"]


def test_a_model_that_only_attends_has_none(tiny: Path) -> None:
    document = read_manifest(tiny)
    assert "states" not in document
    manifest = Manifest.from_json(document)
    assert (manifest.states, manifest.state_bytes) == ((), 0)


@pytest.mark.parametrize(
    ("index", "changes", "key"),
    [
        (0, {"kind": "rolling"}, "states[0].kind"),
        (1, {"dtype": "float8"}, "states[1].dtype"),
        (1, {"layer": -1}, "states[1].layer"),
        (1, {"shape": []}, "states[1].shape"),
        (1, {"shape": [2, 0, 16]}, "states[1].shape"),
        (3, {"layer": 0}, "'states'"),
        (3, {"past": "past.0.conv"}, "states.past"),
        (3, {"present": "present.0.conv"}, "states.present"),
        (1, {"shape": [2, 8, 17]}, "graphs.prefill.past.0.recurrent"),
        (1, {"dtype": "float16"}, "graphs.prefill.past.0.recurrent"),
        (1, {"past": "past.9.recurrent"}, "graphs.prefill.inputs"),
        (1, {"present": "present.9.recurrent"}, "graphs.prefill.outputs"),
        (1, {"shape": [1 << 20, 1 << 20]}, "numbers in states"),
    ],
)
def test_a_promise_that_the_graphs_do_not_keep_is_named(
    document: dict[str, Any], index: int, changes: dict[str, Any], key: str
) -> None:
    document["states"][index] |= changes
    with pytest.raises(BundleError) as caught:
        Manifest.from_json(document)
    assert key in str(caught.value)


@pytest.mark.parametrize("phase", ["prefill", "decode", "score"])
def test_each_graph_has_every_state(document: dict[str, Any], phase: str) -> None:
    for tensor in document["graphs"][phase]["outputs"]:
        if tensor["name"] == "present.1.conv":
            tensor["shape"] = ["batch", 64, 4]
    with pytest.raises(BundleError, match=rf"graphs\.{phase}\.present\.1\.conv"):
        Manifest.from_json(document)


def test_a_state_without_an_entry_is_named(document: dict[str, Any]) -> None:
    del document["states"][2]
    with pytest.raises(BundleError, match=r"graphs\.prefill\.inputs.*past\.1\.conv"):
        Manifest.from_json(document)
