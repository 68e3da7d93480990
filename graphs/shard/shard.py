"""Cuts a bundle into the bundles of several ranks, from its files alone."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from satchel.graphs.shard.adapters import kept, kept_differently
from satchel.graphs.shard.collectives import Place
from satchel.graphs.shard.pipeline import StageError, cut_stage, divide
from satchel.graphs.shard.slices import NotCutError, Ranges, taken
from satchel.graphs.shard.tensor_parallel import Cut, HalfCutError, check_alike, cut_tensors, rounds
from satchel.graphs.shard.write import recorded, write_graphs
from satchel.runtime.bundle.errors import BundleError
from satchel.runtime.bundle.graph_specs import GraphSpec, TensorSpec, Variant
from satchel.runtime.bundle.manifest import MANIFEST_NAME, AdapterSpec, CacheLayer, FileRecord, Manifest
from satchel.runtime.bundle.ranks import (
    COLLECTED,
    MPI,
    RANKS_NAME,
    WIRES,
    RanksFile,
    RankSpec,
    StageSpec,
    rank_folder,
)
from satchel.runtime.bundle.reader import Bundle

LEFT_OUT = {"genai_config.json", "bom.json"}
"""Files of a bundle that are true of the whole only."""

Say = Callable[[str], None]
Tensors = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class AdapterFiles:
    """How files of adapters are read and written, whose format is ONNX Runtime's.

    Attributes:
        read: The tensors of the adapter of a name, by the graphs' inputs. Raises BundleError.
        write: Write those of an adapter into a folder, and return what a manifest says of it.
    """

    read: Callable[[str], Tensors]
    write: Callable[[Path, str, Tensors], AdapterSpec]


@dataclasses.dataclass(frozen=True)
class Division:
    """How to cut.

    Attributes:
        shares: What part of each layer each of the ranks that share it gets, in proportion.
        kernels: The version of satchel's kernels that run the parts.
        wire: One of `WIRES`.
        stages: What part of all layers each stage gets, in proportion.
        collectives: The library by which ranks exchange numbers, one of `COLLECTIVES`.
    """

    shares: tuple[float, ...]
    kernels: int
    wire: str = "float32"
    stages: tuple[float, ...] = (1.0,)
    collectives: str = MPI


def check_target(target: str, collectives: str) -> None:
    """Raise BundleError where ranks cannot exchange numbers so in a bundle for this target."""
    known = COLLECTED[collectives]
    if target == known:
        return
    other = next((name for name, where in COLLECTED.items() if where == target), None)
    advice = f"choose --collectives {other}" if other is not None else f"export it with --target {known}"
    raise BundleError(
        f"--collectives {collectives}: is for bundles for {known}, and this one is for {target}: {advice}"
    )


def check_divisible(manifest: Manifest, name: str) -> None:
    """Raise BundleError for a bundle that cannot be cut, and say why."""
    reasons = {
        "has static graphs: export it with --target cpu": manifest.static is not None,
        "has custom passes or operators: export it without them": bool(manifest.plain or manifest.custom_ops),
        "is one of several ranks' already: cut the whole bundle": manifest.rank is not None,
    }
    for reason, applies in reasons.items():
        if applies:
            raise BundleError(f"{name}: cannot be cut for several ranks: it {reason}")


def shard_bundle(
    bundle: Bundle, division: Division, output: Path, files: AdapterFiles, say: Say = lambda line: None
) -> RanksFile:
    """Write the bundles of all ranks into an empty folder, and the file that names them.

    Args:
        bundle: A whole bundle in a folder, checked.
        division: How to cut it.
        output: Where to.
        files: How files of adapters are read and written.
        say: Is told, a line each, what is cut unevenly or not at all.

    Raises:
        BundleError: The bundle cannot be cut, or its graphs are not what its manifest says.
        OSError: A file cannot be written.
    """
    check_target(bundle.manifest.target, division.collectives)
    check_divisible(bundle.manifest, str(bundle.folder))
    stages = _stages(bundle, division, say)
    digests: list[str] = []
    for stage, layers in enumerate(stages):
        tell = say if stage == 0 else lambda line: None
        for part, (models, rank) in enumerate(_parts(bundle, division, layers, len(stages), tell)):
            folder = rank_folder(output, stage * len(division.shares) + part)
            folder.mkdir()
            records = write_graphs(folder, models)
            adapters = _cut_adapters(bundle, models, files, folder)
            records |= {adapter.file: recorded(folder / adapter.file) for adapter in adapters}
            spec = dataclasses.replace(rank, rank=stage * len(division.shares) + part)
            manifest = _manifest(bundle, spec, models, records, folder, division.kernels)
            document = dataclasses.replace(manifest, adapters=adapters).to_json()
            _write_json(folder / MANIFEST_NAME, document)
            digests.append(document["digest"])
    parts = len(division.shares)
    layout = RanksFile(parts, len(stages), tuple(digests), _layout(stages, parts), division.collectives)
    _write_json(output / RANKS_NAME, layout.to_json())
    return layout


def _stages(bundle: Bundle, division: Division, say: Say) -> list[range | None]:
    """The layers of each stage; None for all."""
    if len(division.stages) == 1:
        return [None]
    models = {spec.file: ir.load(bundle.path(spec.file)) for spec in _specs(bundle.manifest)}
    try:
        found = divide(models, len(division.stages), division.stages)
    except StageError as error:
        raise BundleError(f"{bundle.folder}: {error}") from None
    for number, layers in enumerate(found):
        say(f"stage {number}: layers {layers.start} to {layers.stop - 1}")
    return list(found)


def _layout(stages: Sequence[range | None], parts: int) -> tuple[StageSpec, ...]:
    return tuple(
        StageSpec(layers.start, layers.stop, tuple(range(stage * parts, (stage + 1) * parts)))
        for stage, layers in enumerate(stages)
        if layers is not None
    )


def _parts(
    bundle: Bundle, division: Division, layers: range | None, stages: int, say: Say
) -> Iterator[tuple[dict[str, ir.Model], RankSpec]]:
    """The graphs of each rank of a stage.

    Raises:
        BundleError: They cannot be cut.
    """
    name, parts, first, uncut = str(bundle.folder), len(division.shares), dict[str, Cut](), set[str]()
    for part in range(parts):
        differing = {""}
        while differing:
            models = {spec.file: ir.load(bundle.path(spec.file)) for spec in _specs(bundle.manifest)}
            try:
                for model in models.values() if layers is not None else ():
                    cut_stage(model, layers)  # type: ignore[arg-type]
                cuts = _cut_parts(models, division, part, uncut) if parts > 1 else {}
                differing = kept_differently(list(models.values()))
                first = first if part else cuts
                for file, found in cuts.items() if not differing else ():
                    check_alike([first[file], found])
            except (StageError, HalfCutError) as error:
                raise BundleError(f"{name}: {error}: report this model to satchel") from None
            except NotCutError as error:
                raise BundleError(f"{name}: cannot be cut for {parts} ranks: {error}") from None
            uncut |= differing
        if part == 0 and first:
            _tell(first, bundle.manifest, say)
        _check_caches(models, name)
        span = () if layers is None else (layers.start, layers.stop)
        spec = RankSpec(0, parts, stages, division.shares, division.wire, bundle.digest, span, division.collectives)
        yield models, spec


def _cut_parts(models: Mapping[str, ir.Model], division: Division, part: int, uncut: set[str]) -> dict[str, Cut]:
    """Cut the graphs of one of the ranks that share layers; those that read inputs of these names stay whole."""
    wire = WIRES[division.wire]
    place = Place(part, division.shares, wire, division.collectives, _exact(models, division))
    return {file: cut_tensors(model, place, uncut) for file, model in models.items()}


def _exact(models: Mapping[str, ir.Model], division: Division) -> bool:
    """Whether parts are to compute the bits of the whole: in all graphs alike, which share their weights."""
    return (division.collectives, WIRES[division.wire]) == (MPI, 32) and any(map(rounds, models.values()))


def _specs(manifest: Manifest) -> list[GraphSpec]:
    graphs = manifest.graphs
    if graphs is None:
        return []
    found = [graphs.prefill, graphs.decode, graphs.score, *(v.graph for v in _variants(manifest))]
    return [*found, manifest.embeddings.graph] if manifest.embeddings is not None else found


def _variants(manifest: Manifest) -> list[Variant]:
    """Those that are cut: those of satchel's own kernels."""
    return [variant for variant in manifest.variants if variant.kernel_abi is not None]


def _tell(cuts: Mapping[str, Cut], manifest: Manifest, say: Say) -> None:
    found = next(iter(cuts.values()))
    say(f"{len(found.layers)} layers are divided")
    for name, reason in found.whole.items():
        if "no linear layer is in front" not in reason and "needs all channels" not in reason:
            say(f"whole on every rank: {name}: {reason}")


def _cut_adapters(
    bundle: Bundle, models: Mapping[str, ir.Model], files: AdapterFiles, folder: Path
) -> tuple[AdapterSpec, ...]:
    """Write what a rank keeps of each adapter.

    Raises:
        BundleError: An adapter's file is damaged.
    """
    cuts = kept(next(iter(models.values())))  # all graphs keep the same parts
    read = {str(value.name) for model in models.values() for value in model.graph.inputs}
    return tuple(
        files.write(
            folder,
            adapter.name,
            {
                tensor.name: _part(tensors[tensor.name], cuts.get(tensor.name))
                for tensor in adapter.inputs
                if tensor.name in read
            },
        )
        for adapter in bundle.manifest.adapters
        for tensors in (files.read(adapter.name),)
    )


def _part(array: np.ndarray, cut: tuple[int, Ranges] | None) -> np.ndarray:
    return array if cut is None else np.ascontiguousarray(taken(array, *cut))


def _check_caches(models: Mapping[str, ir.Model], name: str) -> None:
    """Raise BundleError unless all graphs of a rank have the same caches."""
    shapes = [
        {str(v.name): str(list(v.shape or [])[1:2]) for v in model.graph.inputs if str(v.name).startswith("past")}
        for model in models.values()
    ]
    for other in shapes[1:]:
        if other != shapes[0]:
            differing = next(key for key in shapes[0] if shapes[0][key] != other.get(key))
            raise BundleError(f"{name}: its graphs divide {differing} differently: report this model to satchel")


def _manifest(
    bundle: Bundle,
    spec: RankSpec,
    models: Mapping[str, ir.Model],
    records: dict[str, FileRecord],
    folder: Path,
    kernels: int,
) -> Manifest:
    manifest = bundle.manifest
    graphs = {name: _signature(model) for name, model in models.items()}

    def described(graph: GraphSpec) -> GraphSpec:
        inputs, outputs = graphs[graph.file]
        return dataclasses.replace(
            graph,
            inputs=tuple(_narrowed(tensor, inputs) for tensor in graph.inputs if tensor.name in inputs),
            outputs=tuple(_narrowed(tensor, outputs) for tensor in graph.outputs if tensor.name in outputs),
        )

    for name in manifest.files:
        if name not in records and name not in LEFT_OUT and not name.endswith(".onnx") and not name.endswith(".bin"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(bundle.path(name), folder / name)
            records[name] = manifest.files[name]
    whole, embeddings = manifest.graphs, manifest.embeddings
    inputs = graphs[next(iter(models))][0]
    return dataclasses.replace(
        manifest,
        kv_cache=dataclasses.replace(manifest.kv_cache, layers=_cached(manifest.kv_cache.layers, inputs)),
        states=tuple(
            dataclasses.replace(state, shape=tuple(_numbers(inputs[state.past][1:])))
            for state in manifest.states
            if state.past in inputs
        ),
        graphs=None
        if whole is None
        else dataclasses.replace(
            whole,
            prefill=described(whole.prefill),
            decode=described(whole.decode),
            score=described(whole.score),
        ),
        variants=tuple(
            dataclasses.replace(variant, graph=described(variant.graph), kernel_abi=kernels)
            for variant in _variants(manifest)
        ),
        embeddings=None if embeddings is None else dataclasses.replace(embeddings, graph=described(embeddings.graph)),
        files=records,
        specialized=None,
        rank=spec,
    )


Shapes = dict[str, tuple[int | str, ...]]


def _signature(model: ir.Model) -> tuple[Shapes, Shapes]:
    def shapes(values: Sequence[ir.Value]) -> Shapes:
        return {
            str(value.name): tuple(d if isinstance(d, int) else str(d.value) for d in value.shape or ())
            for value in values
        }

    return shapes(list(model.graph.inputs)), shapes(list(model.graph.outputs))


def _narrowed(tensor: TensorSpec, shapes: Shapes) -> TensorSpec:
    """The tensor with those of its sizes that are numbers as they are in the rank's graph."""
    found = shapes[tensor.name]
    sizes = (new if isinstance(old, int) else old for old, new in zip(tensor.shape, found, strict=True))
    return dataclasses.replace(tensor, shape=tuple(sizes))


def _cached(layers: Sequence[CacheLayer], inputs: Shapes) -> tuple[CacheLayer, ...]:
    return tuple(
        dataclasses.replace(layer, kv_heads=_numbers(inputs[layer.past_key][1:2])[0])
        for layer in layers
        if layer.past_key in inputs
    )


def _numbers(sizes: Sequence[int | str]) -> list[int]:
    return [size for size in sizes if isinstance(size, int)]


def _write_json(path: Path, document: object) -> None:
    path.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")
