"""`satchel export`: flags -> ExportConfig -> export_bundle. Loads nothing heavy until it runs."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from pathlib import Path
from types import FrameType

from satchel.export.config import DEFAULT_CONTEXT, KV_CACHES, PRECISIONS, PREFILL_LENGTHS, TARGETS, ExportConfig
from satchel.export.writing.report import report, row
from satchel.runtime.util.progress import waiting

EXAMPLE = """\
example:
  satchel export SmolLM2-135M-Instruct/ -o smollm2
  satchel export model.gguf -o bundle --precision fp16 --max-context 2048
  satchel export SmolLM2-135M-Instruct/ -o smollm2-int4 --precision int4 --kv-cache int8
  satchel export my_model.py:build -o bundle --tokenizer tokenizer.json"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags; the defaults are those of ExportConfig."""
    parser.description = (
        "Compile a causal language model into a bundle: a folder that satchel runs through ONNX Runtime, without "
        "torch. It is checked and measured against the model before it is there."
    )
    parser.epilog = EXAMPLE
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="a Hugging Face folder, a GGUF file, or file.py:factory"
    )
    parser.add_argument("-o", "--output", metavar="BUNDLE", type=Path, required=True, help="the folder to make")
    parser.add_argument(
        "--precision",
        metavar="P",
        default=ExportConfig.precision,
        help=f"how weights and activations are stored: {', '.join(PRECISIONS)} (default fp32; for other targets fp16)",
    )
    parser.add_argument(
        "--kv-cache",
        metavar="FORM",
        default=ExportConfig.kv_cache,
        help=f"how the KV cache is stored: {' or '.join(KV_CACHES)} (default %(default)s)",
    )
    parser.add_argument(
        "--recipe", metavar="FILE", help="which layer is stored how: a TOML file, or the name of a recipe that ships"
    )
    parser.add_argument(
        "--calibrate", metavar="TEXT", type=Path, help="a text like those the model will see (default: one that ships)"
    )
    parser.add_argument(
        "--certificate-text",
        metavar="TEXT",
        type=Path,
        help="the text to measure the bundle on (default: one that ships)",
    )
    parser.add_argument(
        "--no-certificate",
        dest="certificate",
        action="store_false",
        help="do not measure the bundle against the float model",
    )
    parser.add_argument(
        "--max-context",
        metavar="N",
        type=int,
        default=ExportConfig.max_context,
        help=f"positions that the bundle allows (default: the model's, at most {DEFAULT_CONTEXT})",
    )
    parser.add_argument(
        "--target",
        metavar="T",
        default=ExportConfig.target,
        help=f"what the graphs are made for: {' or '.join(TARGETS)} (default %(default)s)",
    )
    parser.add_argument(
        "--prefill-lengths",
        metavar="N,N,...",
        type=_lengths,
        default=ExportConfig.prefill_lengths,
        help="for cann: numbers of tokens that have a prefill graph "
        f"(default {','.join(map(str, PREFILL_LENGTHS))}, up to the context)",
    )
    parser.add_argument(
        "--tokenizer", metavar="PATH", type=Path, help="a tokenizer.json, SentencePiece .model or folder to use"
    )
    parser.add_argument(
        "--pass",
        dest="passes",
        metavar="M:F",
        action="append",
        default=[],
        help="a graph pass of your own: module:function or file.py:function; may be given several times",
    )
    parser.add_argument(
        "--custom-ops",
        metavar="LIBRARY",
        type=Path,
        action="append",
        default=[],
        help="a shared library with operators that your passes use; may be given several times",
    )
    parser.add_argument("--force", action="store_true", help="replace a bundle that is there already")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object on standard output")


def _lengths(text: str) -> tuple[int, ...]:
    """Whole numbers with commas between them."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: give whole numbers with commas between them") from None


def main(args: argparse.Namespace) -> int:
    """Run the command. Raises ExportError for what the user has to mend."""
    signal.signal(signal.SIGTERM, _terminate)
    with waiting("loading torch and transformers", shown=not args.quiet):
        from satchel.export.compile import export_bundle

    config = ExportConfig(
        output=args.output, precision=args.precision, max_context=args.max_context, target=args.target,
        force=args.force, tokenizer=args.tokenizer, kv_cache=args.kv_cache, recipe=args.recipe,
        calibrate=args.calibrate, certificate=args.certificate, certificate_text=args.certificate_text,
        passes=tuple(args.passes), custom_ops=tuple(args.custom_ops),
        prefill_lengths=args.prefill_lengths,
    )  # fmt: skip
    start = time.monotonic()
    manifest = export_bundle(args.checkpoint, config, progress=not args.quiet)
    facts = {"bundle": str(args.output), **report(manifest), "seconds": round(time.monotonic() - start, 1)}
    if args.json:
        print(json.dumps(facts))
    elif not args.quiet:
        print(row(facts), file=sys.stderr)
    return 0


def _terminate(signum: int, frame: FrameType | None) -> None:
    """End as Ctrl-C does, so that what is half written goes away."""
    raise KeyboardInterrupt
