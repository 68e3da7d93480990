"""The steps of `satchel sensitivity`: open, trace, transform, try each layer, choose."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

from satchel.export.compile import lower, open_source, trace_source
from satchel.export.config import ExportConfig
from satchel.export.errors import ExportError
from satchel.export.quantize.quantize import quantizable, rules, transform
from satchel.export.quantize.sensitivity import (
    Sensitivity,
    count,
    measure,
    raise_most_sensitive,
    raised_recipe,
    raising_costs,
)
from satchel.export.quantize.texts import CERTIFICATE_WINDOWS, open_texts
from satchel.export.recipes import recipe_of
from satchel.export.recipes.fit import fit_recipe
from satchel.export.stages import STAGES, Stages
from satchel.export.threads import fixed_threads
from satchel.graphs.quant.recipe import write_recipe


@dataclasses.dataclass(frozen=True)
class Search:
    """The options of a search; see the command's flags."""

    precision: str
    recipe: str | None = None
    bits: float | None = None
    text: Path | None = None
    windows: int = 4
    tokenizer: Path | None = None


@dataclasses.dataclass(frozen=True)
class Found:
    """Every linear layer tried, those to raise to 8 bits, and the recipe that raises them."""

    layers: list[Sensitivity]
    raised: list[Sensitivity]
    recipe: str
    bits: float

    def as_json(self) -> dict[str, Any]:
        """Return the results as JSON data."""
        layers = [dataclasses.asdict(layer) | {"raised": layer in self.raised} for layer in self.layers]
        return {"layers": layers, "bits_per_weight": self.bits}


def find_sensitive(source: str | Path, search: Search, *, progress: bool = False) -> Found:
    """Measure the loss from quantizing each linear layer alone, and choose those to keep at 8 bits within a budget.

    Raises:
        ExportError: The checkpoint, the text or an option cannot be used.
    """
    config = ExportConfig(
        output=Path("unused"), precision=search.precision, recipe=search.recipe, tokenizer=search.tokenizer,
        eval_text=search.text,
    )  # fmt: skip
    recipe = recipe_of(config)
    if recipe is None:
        raise ExportError(f"--precision {search.precision} quantizes no layer; choose a 4-bit precision")
    if not 1 <= search.windows <= CERTIFICATE_WINDOWS:
        raise ExportError(f"--windows {search.windows}: must be between 1 and {CERTIFICATE_WINDOWS}")
    stages = Stages(progress, STAGES[:4])
    with stages.stage("opening the checkpoint"):
        checkpoint = open_source(source, config)
    recipe = fit_recipe(recipe, checkpoint)
    with fixed_threads(), tempfile.TemporaryDirectory(prefix="satchel-") as name:
        folder = Path(name)
        texts = open_texts(checkpoint, config, None, option="--text")
        with stages.stage("tracing the model"):
            model = trace_source(checkpoint, config)
        with stages.stage("optimizing the graphs"):
            common, _ = lower(model, checkpoint, config, recipe)
        with stages.stage("rounding the weights"), stages.steps(count(common), "trying") as bar:
            rotated, _ = transform(common, recipe)
            if texts.certificate is None:
                raise ValueError("no evaluation text")
            layers = measure(rotated, recipe, texts.certificate[: search.windows], folder, bar)
    bits_now = _bits(rotated, checkpoint.parameters)
    if not layers:
        raise ExportError(f"recipe {recipe.name}: no linear layer has fewer than 8 bits, so there is nothing to raise")
    raised = (
        [] if search.bits is None
        else raise_most_sensitive(recipe, layers, bits_now, search.bits, checkpoint.parameters)
    )  # fmt: skip
    if search.bits is not None and not raised:
        raise ExportError(
            f"--bits {search.bits:g}: the recipe already takes {bits_now:.2f} bits per weight; set a larger budget"
        )
    spent = sum(raising_costs(recipe, layer) for layer in raised) / checkpoint.parameters
    comment = f"As {recipe.name}, with the most sensitive layers in 8 bits."
    return Found(layers, raised, write_recipe(raised_recipe(recipe, raised), comment), bits_now + spent)


def _bits(model: Any, parameters: int) -> float:
    """Bits per weight of a model whose weights are marked with their rules; weights without a rule count as 32."""
    chosen, total, seen = rules(model), 0.0, set()
    for node, lazy in quantizable(model):
        if lazy.name in seen:
            continue
        seen.add(lazy.name)
        rule = chosen.get(lazy.name)
        inputs = lazy.dims[0] if node.op_type == "MatMul" else lazy.dims[-1]
        scheme = None if rule is None else rule.scheme(inputs)
        total += lazy.size * (32.0 if scheme is None else scheme.bits_per_weight)
    return total / parameters
