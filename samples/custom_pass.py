"""A graph pass of your own that uses an operator from a library: exported, run, and switched off.

    pip install onnxruntime-extensions
    python samples/custom_pass.py out/custom

It exports the model of own_module.py with the pass `cut_negatives` below, and prints

    passes: prefill 4, decode 4, score 4
    with the pass:    ' on the lid. Every m'
    without the pass: ' on the lid. Every m'
    largest change of a logit: 2.4

The same with commands, where LIBRARY is the path that `onnxruntime_extensions.get_library_path()` returns:

    satchel export samples/own_module.py:build -o out/custom --tokenizer out/own-tokenizer.json -p fp32 \\
        --pass samples/custom_pass.py:cut_negatives --custom-ops LIBRARY
    satchel run out/custom "A gull sat" --custom-ops LIBRARY
    satchel run out/custom "A gull sat" --no-custom-passes
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import own_module
from new_path import new_path

from satchel.graphs.ir.contract import Report, graph_pass
from satchel.graphs.ir.values import Builder, nodes, only_user, replace
from satchel.runtime import Custom, Generator

DOMAIN = "ai.onnx.contrib"
PROMPT = "A gull sat"


@graph_pass
def cut_negatives(model: ir.Model, report: Report) -> None:
    """Set negative outputs of an MLP's activation to zero.

    NegPos of onnxruntime-extensions splits numbers into those below zero and those above.

    before: x -> Gelu -> MatMul
    after:  x -> NegPos -> (below, above); above -> MatMul
    refuses when: more than one node reads the activation.
    """
    for gelu in nodes(model, "Gelu"):
        activation = gelu.outputs[0]
        if only_user(activation) is None:
            report.refuse(gelu, "more than one node reads it")
            continue
        split = Builder(model, gelu).node("NegPos", [gelu.inputs[0]], f"{gelu.name}.cut", domain=DOMAIN, outputs=2)
        replace(activation, split.outputs[1])
        report.count += 1


def main(bundle: Path) -> None:
    import onnxruntime_extensions

    from satchel.export import ExportConfig, export_bundle

    library = Path(onnxruntime_extensions.get_library_path())
    tokenizer = new_path(new_path(bundle).with_name(f"{bundle.name}-tokenizer.json"))
    own_module.make_tokenizer().save(str(tokenizer))
    config = ExportConfig(bundle, "fp32", tokenizer=tokenizer, passes=(cut_negatives,), custom_ops=(library,))
    manifest = export_bundle(own_module.build(), config)
    counts = [f"{done['graph']} {done['count']}" for done in manifest.passes if "cut_negatives" in done["pass"]]
    print(f"wrote {bundle} and {tokenizer}")
    print(f"passes: {', '.join(counts)}")

    logits = []
    for label, custom in (("with the pass:   ", Custom((library,))), ("without the pass:", Custom(passes=False))):
        generator = Generator.open(bundle, custom=custom)
        print(label, repr(generator.generate(PROMPT, max_new_tokens=12).text))
        logits.append(generator.engine.score(generator.encode(PROMPT)))
    print(f"largest change of a logit: {np.abs(logits[0] - logits[1]).max():.1f}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python samples/custom_pass.py BUNDLE")
    main(Path(sys.argv[1]))
