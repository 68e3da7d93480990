"""`satchel sensitivity`: measures which layers are most sensitive to quantization, and writes a recipe."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from satchel.export.config import FLOAT_PRECISIONS, PRECISIONS, STORED
from satchel.runtime.util.progress import waiting

EXAMPLE = """\
example:
  satchel sensitivity model.gguf --precision int4 --bits 6.3 -o mixed.toml
  satchel export model.gguf -o bundle --precision int4 --recipe mixed.toml"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.description = (
        "Find the layers of a model that are most sensitive to quantization: quantize each layer alone, and measure "
        "the change in the model's predictions. Then write a recipe for satchel export that keeps those layers at "
        "8 bits."
    )
    parser.epilog = EXAMPLE
    quantized = [p for p in PRECISIONS if p not in (*FLOAT_PRECISIONS, STORED)]
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="a Hugging Face folder, a GGUF file, or file.py:factory"
    )
    parser.add_argument("-o", "--output", metavar="FILE", type=Path, help="the recipe to write (default: none)")
    parser.add_argument("--precision", metavar="P", default="int4", help=f"one of {', '.join(quantized)} (%(default)s)")
    parser.add_argument("--recipe", metavar="FILE", help="the recipe to start from (default: that of the precision)")
    parser.add_argument("--bits", metavar="N", type=float, help="max bits per weight of the whole model")
    parser.add_argument("--text", metavar="TEXT", type=Path, help="the evaluation text (default: the built-in text)")
    parser.add_argument(
        "--windows", metavar="N", type=int, default=4, help="number of windows of 256 tokens (%(default)s)"
    )
    parser.add_argument(
        "--tokenizer", metavar="PATH", type=Path, help="the tokenizer to use instead of the checkpoint's"
    )
    parser.add_argument("--force", action="store_true", help="replace an existing recipe")
    parser.add_argument("--json", action="store_true", help="print one JSON object on one line")


def main(args: argparse.Namespace) -> int:
    """Run the command. Raises ExportError for user-correctable errors."""
    from satchel.export.errors import ExportError

    if (args.output is None) != (args.bits is None):
        raise ExportError("--bits and --output must be used together: the budget determines the recipe")
    if args.output is not None and args.output.exists() and not args.force:
        raise ExportError(f"{args.output} already exists: choose another name, or replace it with --force")
    with waiting("loading torch and transformers", shown=not args.quiet):
        from satchel.export.find_sensitive import Search, find_sensitive

    search = Search(
        precision=args.precision, recipe=args.recipe, bits=args.bits, text=args.text, windows=args.windows,
        tokenizer=args.tokenizer,
    )  # fmt: skip
    result = find_sensitive(args.checkpoint, search, progress=not args.quiet)
    if args.output is not None:
        stage = args.output.with_name(f".{args.output.name}.partial")
        stage.write_text(result.recipe, encoding="utf-8", newline="\n")
        stage.replace(args.output)
    if args.json:
        print(json.dumps(result.as_json()))
        return 0
    for layer in sorted(result.layers, key=lambda s: s.kl / s.weights, reverse=True):
        mark = "8 bits" if layer in result.raised else ""
        print(f"{layer.kl:10.5f}  {layer.weights / 1e6:8.2f} M  {', '.join(layer.layers)}  {mark}".rstrip())
    if args.output is not None:
        print(
            f"{args.output}: {len(result.raised)} of {len(result.layers)} linear layers at 8 bits, "
            f"{result.bits:.2f} bits per weight",
            file=sys.stderr,
        )
    return 0
