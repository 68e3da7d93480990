"""An inspection as titled tables, for a terminal or for a page of its own."""

from __future__ import annotations

import textwrap
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from satchel.runtime.bundle.certificate import SATCHEL, Certificate
from satchel.runtime.bundle.checks import PREPARED
from satchel.runtime.bundle.contract import lora_names
from satchel.runtime.bundle.manifest import AdapterSpec, LayerPrecision, ModelFacts
from satchel.runtime.tools.inspection.inspection import Inspection, PassFacts
from satchel.runtime.tools.profiling.layer_names import layer_of, pattern_of
from satchel.runtime.util.kl import FIGURES, KL_MEANING, grade
from satchel.runtime.util.sizes import binary, decimal
from satchel.runtime.util.terminal import columns, printable

TEMPLATE = "inspection.html.jinja"
WIDEST_BITS = 8  # of a quantized weight
WRAP = 96  # columns
LORA_FIRST = lora_names("")[0]


@dataclass(frozen=True)
class Table:
    """A titled table. `header` is empty where the first column names the rows; `right` are columns of numbers.

    All cells are already escaped for display. `note` is printed below the table.
    """

    title: str
    rows: tuple[tuple[str, ...], ...]
    header: tuple[str, ...] = ()
    right: tuple[int, ...] = ()
    note: str = ""


@dataclass(frozen=True)
class Bar:
    """A part of a whole, or a number within its range: `share` is from 0 to 1."""

    name: str
    text: str
    share: float


@dataclass(frozen=True)
class BitsGrid:
    """Bits per weight by layer: for each layer number a cell per kind of weight, None for float weights."""

    kinds: tuple[str, ...]
    rows: tuple[tuple[int, tuple[Bar | None, ...]], ...]


def as_text(inspection: Inspection) -> str:
    """The inspection as text for a terminal; equal layers and equal refusals share a line."""
    lines = [printable(inspection.bundle)]
    tables = [
        _overview(inspection), _files(inspection), _cache(inspection), _grouped_layers(inspection),
        _graphs(inspection), _pass_counts(inspection), _grouped_refusals(inspection),
    ]  # fmt: skip
    for table in [*tables, *_certificate(inspection), *_provenance(inspection)]:
        rows = [table.header, *table.rows] if table.header else list(table.rows)
        lines += ["", table.title, *(f"  {line}" for line in columns(rows, table.right))]
        lines += [f"  {table.note}"] if table.note else []
    return "\n".join(lines)


def as_page(inspection: Inspection) -> str:
    """The inspection as a self-contained HTML page with every layer, pass and refusal."""
    from jinja2 import Environment

    template = resources.files("satchel.runtime.tools.inspection").joinpath(TEMPLATE).read_text(encoding="utf-8")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    biggest = max(inspection.bytes, 1)
    sizes = [Bar(printable(name), decimal(size), size / biggest) for name, size in inspection.files.items()]
    page = environment.from_string(template).render(
        name=printable(inspection.bundle),
        overview=_overview(inspection),
        files=_files(inspection),
        sizes=sizes,
        grid=_bits_grid(inspection.layers),
        tables=[
            _cache(inspection), _all_layers(inspection), _graphs(inspection),
            *_certificate(inspection), *_provenance(inspection), _all_passes(inspection), _all_refusals(inspection),
        ],
    )  # fmt: skip
    return page.lstrip()


def _overview(found: Inspection) -> Table:
    model = found.model
    rows = [
        ("source", f"{found.source.name} ({found.source.kind}, {found.source.model_type})"),
        ("target", found.target),
        ("precision", found.precision + (f", recipe {found.recipe}" if found.recipe else "")),
        ("parameters", f"{model.parameters:,}"),
        ("vocabulary", f"{model.vocab_size:,}"),
        ("context", f"{model.max_context:,} positions{_two_sides(model)}"),
        ("layers", _shapes(found)),
        ("tokenizer", found.tokenizer or "none"),
        ("templates", ", ".join(found.templates) or "none"),
        ("end tokens", ", ".join(map(str, model.eos_token_ids)) or "none"),
        ("made with", ", ".join(f"{name} {version}" for name, version in found.producer.items())),
    ]
    if found.embeddings is not None:
        rows.append(("embeddings", f"{found.embeddings}, {found.embedding_size:,} numbers"))
    rows += [("adapter", f"{adapter.name}: {_described(adapter, found)}") for adapter in found.adapters]
    if found.custom_ops:
        rows.append(("needs", ", ".join(f"{file.name}, SHA-256 {file.sha256}" for file in found.custom_ops)))
    if found.specialized:
        machine = found.specialized
        attention = "tiled" if machine.tiled_attention else "plain"
        runs = ", ".join(f"{phase} by {machine.variant(phase) or 'the portable graph'}" for phase in PREPARED)
        rows.append(
            (
                "specialized",
                f"for ONNX Runtime {machine.onnxruntime}, {machine.provider}, {machine.processor}: {runs}, "
                f"{attention} attention, {decimal(machine.bytes)} more",
            )
        )
    return Table("Bundle", _clean(rows))


def _two_sides(model: ModelFacts) -> str:
    border = model.rotary_border
    return "" if border is None else f"; texts of up to {border:,} tokens have rotary angles of their own"


def _described(adapter: AdapterSpec, found: Inspection) -> str:
    """The ranks of an adapter, its layers and its size."""
    ranks = sorted({tensor.shape[1] for tensor in adapter.inputs if tensor.name.endswith(LORA_FIRST)})
    layers = {tensor.name.rpartition(".lora_")[0] for tensor in adapter.inputs}
    several = "rank " if len(ranks) == 1 else "ranks "
    return f"{several}{', '.join(map(str, ranks))} on {len(layers)} layers, {decimal(found.files[adapter.file])}"


def _shapes(found: Inspection) -> str:
    shapes = Counter((layer.kv_heads, layer.key_dim, layer.value_dim) for layer in found.kv_cache.layers)
    parts = []
    for (kv_heads, key_dim, value_dim), count in shapes.items():
        width = str(key_dim) if value_dim == key_dim else f"{key_dim} (keys) and {value_dim} (values)"
        latent = f"a latent of {key_dim}, keys and values in one"
        parts.append(f"{count} with {f'{kv_heads} KV heads of {width}' if value_dim else latent}")
    kinds: dict[int, list[str]] = defaultdict(list)
    for state in found.states:
        kinds[state.layer].append(state.kind)
    parts += [f"{' and '.join(each)} states in {count}" for each, count in Counter(map(tuple, kinds.values())).items()]
    return "; ".join(parts) or "none"


def _files(found: Inspection) -> Table:
    whole = max(found.bytes, 1)
    rows = [(name, f"{size:,}", f"{size / whole:.1%}") for name, size in found.files.items()]
    rows.append(("all", f"{found.bytes:,}", ""))
    note = "" if found.bits_per_weight is None else f"; {found.bits_per_weight:.2f} bits per weight"
    return Table("Files", _clean(rows), ("file", "bytes", "share"), (1, 2), decimal(found.bytes) + note)


def _cache(found: Inspection) -> Table:
    cache, context = found.kv_cache, found.model.max_context
    rows = []
    if cache.layers:
        rows = [
            ("values", f"{cache.dtype}, {'written in place' if cache.mode == 'shared' else cache.mode}"),
            ("per token", f"{found.cache_bytes_per_token:,} bytes"),
            (f"{context:,} tokens", binary(found.cache_bytes)),
        ]
    for (kind, dtype, shape), count in Counter((s.kind, s.dtype, s.shape) for s in found.states).items():
        size = " x ".join(map(str, shape))
        rows.append((f"{kind} states", f"{dtype}, {count} of {size}"))
    if found.states:
        rows.append(("states per sequence", f"{found.state_bytes:,} bytes, of any length"))
    title = f"KV cache{' and states' if found.states else ''}" if cache.layers else "States"
    return Table(title, _clean(rows))


def _grouped_layers(found: Inspection) -> Table:
    groups: dict[tuple[str, LayerPrecision], list[str]] = defaultdict(list)
    for name, precision in found.layers.items():
        groups[pattern_of(name), precision].append(name)
    patterns = Counter(pattern for pattern, _ in groups)
    rows = []
    for (pattern, precision), names in groups.items():
        where = f"x {len(names)}" if len(names) > 1 else ""
        if patterns[pattern] > 1:
            where += f" (layers {_ranges(layer_of(name) for name in names)})"
        rows.append((pattern, describe(precision), where.strip()))
    rows.append(("all other weights" if rows else "all weights", found.float_weights, ""))
    return Table("Weights", _clean(rows))


def _all_layers(found: Inspection) -> Table:
    rows = [
        (
            name,
            str(layer.bits),
            "per channel" if layer.block is None else str(layer.block),
            "no" if layer.symmetric else "yes",
            layer.prefill_activations,
            layer.decode_activations,
        )
        for name, layer in found.layers.items()
    ]
    header = ("weight", "bits", "group size", "zero points", "activations in prefill", "in decode")
    rest = f"All {'other ' if rows else ''}weights: {found.float_weights}."
    return Table("Weights", _clean(rows), header if rows else (), (1, 2), rest)


def describe(precision: LayerPrecision) -> str:
    """The quantization of a weight and of its activations, in words."""
    scale = "per-channel" if precision.block is None else f"group size {precision.block}"
    zero = "symmetric" if precision.symmetric else "with zero points"
    prefill, decode = precision.prefill_activations, precision.decode_activations
    fed = "float activations" if prefill == "float" else f"int8 activations per {prefill}"
    if decode != prefill:
        fed += ", in decode " + ("float" if decode == "float" else f"per {decode}")
    return f"{precision.bits} bits, {scale}, {zero}, {fed}"


def _ranges(layers: Iterable[int | None]) -> str:
    """Numbers as "0-3, 7"."""
    spans: list[list[int]] = []
    for number in sorted({layer for layer in layers if layer is not None}):
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)


def _bits_grid(layers: dict[str, LayerPrecision]) -> BitsGrid:
    bits = {
        (layer_of(name), pattern_of(name)): Bar(
            name, str(layer.bits), min(max(layer.bits, 0), WIDEST_BITS) / WIDEST_BITS
        )
        for name, layer in layers.items()
    }
    kinds = tuple(dict.fromkeys(pattern for number, pattern in bits if number is not None))
    numbers = sorted({number for number, _ in bits if number is not None})
    rows = tuple((number, tuple(bits.get((number, kind)) for kind in kinds)) for number in numbers)
    return BitsGrid(tuple(map(printable, kinds)), rows)


def _graphs(found: Inspection) -> Table:
    rows = []
    for phase, graph in found.graphs.items():
        session = f"that of {graph.session_of}" if graph.session_of else "its own"
        settings = ", ".join(f"{key} = {value}" for key, value in graph.session.items()) or "none"
        rows.append((phase, graph.file, session, settings))
    return Table("Graphs", _clean(rows), ("phase", "file", "session", "settings"))


def _pass_counts(found: Inspection) -> Table:
    by_graph: dict[str, list[str]] = defaultdict(list)
    for done in found.passes:
        by_graph[done.graph] += [f"{done.name} {done.count:,}"] if done.count else []
    rows = []
    for graph, parts in by_graph.items():
        first, *more = textwrap.wrap(", ".join(parts) or "nothing", WRAP)
        rows += [(graph, first), *(("", line) for line in more)]
    return Table("What passes changed", _clean(rows) or (("not recorded",),))


def _all_passes(found: Inspection) -> Table:
    rows = [(done.graph, done.name, f"{done.count:,}", f"{len(done.refusals):,}") for done in found.passes]
    header = ("graph", "pass", "changes", "refusals")
    return Table("What passes changed", _clean(rows), header if rows else (), (2, 3))


def _refusals(found: Inspection) -> list[tuple[PassFacts, str, str]]:
    return [(done, refused.node, refused.reason) for done in found.passes for refused in done.refusals]


def _grouped_refusals(found: Inspection) -> Table:
    groups: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for done, node, reason in _refusals(found):
        groups[done.graph, done.name, reason].append(node)
    rows = []
    for (graph, name, reason), nodes in groups.items():
        more = f" and {len(nodes) - 1} more" if len(nodes) > 1 else ""
        rows.append((graph, name, nodes[0] + more, reason))
    return Table("What passes refused", _clean(rows) or (("nothing",),))


def _all_refusals(found: Inspection) -> Table:
    rows = [(done.graph, done.name, node, reason) for done, node, reason in _refusals(found)]
    header = ("graph", "pass", "node", "reason")
    return Table("What passes refused", _clean(rows) or (("nothing",),), header if rows else ())


def _certificate(found: Inspection) -> list[Table]:
    certificate = found.certificate
    if certificate is None:
        return [Table("Certificate", (("none: the export measured no accuracy",),))]
    figures = []
    for label, field, form in FIGURES:
        values = [getattr(phase, field) for phase in (certificate.prefill, certificate.decode)]
        figures.append((label, *("" if value is None else f"{value:{form}}" for value in values)))
    return [
        Table("Certificate", _clean(_measured(certificate))),
        Table("Against the float model", _clean(figures), ("", "prefill", "decode"), (1, 2), _meaning(certificate)),
    ]


def _meaning(certificate: Certificate) -> str:
    kl = certificate.prefill.kl_mean
    return "" if kl is None else f"{KL_MEANING}. {kl:.5f} is {grade(kl)}."


def _measured(certificate: Certificate) -> list[tuple[str, str]]:
    text, margin, speed = certificate.text, certificate.margin, certificate.speed
    windows = f"{certificate.windows} windows of {certificate.window_tokens} tokens"
    if certificate.decode_windows != certificate.windows:
        windows += f" ({certificate.decode_windows} in decode)"
    rows = [
        ("text", "random ids" if text is None else f"{text.name}, {text.tokens:,} tokens, SHA-256 {text.sha256}"),
        ("measured on", f"{windows}, the first {certificate.skip} of each not counted"),
        ("where", f"ONNX Runtime {certificate.onnxruntime}, {certificate.provider}, {certificate.processor}"),
        ("kernels", "satchel's own" if certificate.kernels == SATCHEL else "ONNX Runtime's"),
        ("golden prompts", str(len(certificate.prompts))),
        (
            "margin",
            f"KL x {1 + margin.kl_relative:g} + {margin.kl_absolute:g} nats; "
            f"a token may differ if its two best logits are less than {margin.logit:g} apart",
        ),
    ]
    if speed is not None:
        rows.append(
            (
                "speed",
                f"prefill {speed.prefill:,.0f} and decode {speed.decode:,.0f} tokens/s "
                f"({speed.prompt_tokens} and {speed.new_tokens} tokens, {speed.threads} threads)",
            )
        )
    return rows


def _provenance(found: Inspection) -> list[Table]:
    provenance = found.provenance
    if provenance is None:
        return [Table("Export", (("not recorded",),))]
    made = [(name, text) for name, value in provenance.options.items() if (text := _option(value))]
    made += [("processor", ", ".join(provenance.processor)), ("threads", str(provenance.threads))]
    files = [(name, f"{record.bytes:,}", record.sha256) for name, record in provenance.source.items()]
    header = ("file", "bytes", "SHA-256") if files else ()
    return [
        Table("Export", _clean(made)),
        Table("Source files", _clean(files) or (("a module in memory",),), header, (1,)),
    ]


def _option(value: Any) -> str:
    """An export option as text; empty if it was not set."""
    if isinstance(value, list):
        return "; ".join(map(_option, value))
    if isinstance(value, dict):
        digest = value.get("sha256")
        return f"{value.get('name')}" + (f", SHA-256 {digest}" if digest else "")
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "" if value is None else str(value)


def _clean(rows: Iterable[Sequence[str]]) -> tuple[tuple[str, ...], ...]:
    """The rows escaped for display, since names and reasons come from the bundle."""
    return tuple(tuple(map(printable, row)) for row in rows)
