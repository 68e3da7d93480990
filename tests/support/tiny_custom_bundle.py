"""The tiny bundle as passes and operators of a user's own would leave it: its graphs cut negative logits off."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
from onnx import helper
from support.custom_ops import DOMAIN, LIBRARY
from support.tiny_bundle import read_manifest, write_manifest

PHASES = ("prefill", "decode", "score")


def write_custom_bundle(
    folder: Path, tiny: Path, *, libraries: Sequence[Path] = (LIBRARY,), operators: bool = True, plain: bool = True
) -> Path:
    """A copy of the tiny bundle with other graphs.

    Args:
        folder: Where to; made here.
        tiny: The tiny bundle.
        libraries: What the manifest says that the graphs need.
        operators: Cut by an operator of a library, or by a standard one.
        plain: Keep the graphs as they were beside the others.
    """
    shutil.copytree(tiny, folder)
    document = read_manifest(folder)
    graphs: dict[str, Any] = {**document["graphs"]}
    for phase in PHASES:
        model = onnx.load(folder / f"{phase}.onnx", load_external_data=False)
        if plain:
            onnx.save(model, folder / f"plain_{phase}.onnx")
            graphs[phase] = {**graphs[phase], "file": f"plain_{phase}.onnx"}
        _cut(model, operators)
        onnx.save(model, folder / f"{phase}.onnx")
    document["plain"] = {"graphs": graphs, "static": None} if plain else None
    document["custom_ops"] = [{"name": library.name, "sha256": digest(library)} for library in libraries]
    for path in folder.glob("*.onnx"):
        document["files"][path.name] = {"bytes": path.stat().st_size, "sha256": digest(path)}
    write_manifest(folder, document)
    return folder


def digest(path: Path) -> str:
    """The SHA-256 of a file, as 64 hex digits."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _cut(model: onnx.ModelProto, operators: bool) -> None:
    """Put 0 in the place of each negative logit."""
    for node in model.graph.node:
        node.output[:] = ["uncut" if name == "logits" else name for name in node.output]
    if operators:
        model.graph.node.append(helper.make_node("NegPos", ["uncut"], ["below", "logits"], "cut", domain=DOMAIN))
        model.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    else:
        model.graph.node.append(helper.make_node("Relu", ["uncut"], ["logits"], "cut"))
