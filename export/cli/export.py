"""`satchel export`: flags -> ExportConfig -> export_bundle. Imports nothing heavy before it runs."""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import signal
import sys
import time
from pathlib import Path

from satchel.export.cli.shard import add_division, cut_bundle, division_of, is_asked
from satchel.export.config import (
    ADAPTER_FORMS,
    DEFAULT_CONTEXT,
    EFFORTS,
    KV_CACHES,
    LATENT_CACHES,
    POOLINGS,
    PRECISIONS,
    PREFILL_LENGTHS,
    TARGETS,
    ExportConfig,
)
from satchel.export.errors import ExportError
from satchel.export.writing.report import report, row
from satchel.runtime.bundle.manifest import Manifest
from satchel.runtime.bundle.ranks import RANKS_NAME
from satchel.runtime.util import interrupt
from satchel.runtime.util.progress import waiting

COLLECT_EVERY = (10_000, 20, 20)
"""How often garbage is looked for, as `gc.set_threshold` counts: a tracer makes many objects that stay for a while."""

EXAMPLE = """\
example:
  satchel export SmolLM2-135M-Instruct/
  satchel export model.gguf -o bundle -p fp32 --max-context 2048
  satchel export SmolLM2-135M-Instruct/ -o smollm2-int4 -p int4 --kv-cache int8
  satchel export SmolLM2-135M-Instruct/ -o smollm2-5 --bits 5
  satchel export my_model.py:build -o bundle --tokenizer tokenizer.json"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags; the defaults are those of ExportConfig."""
    parser.description = (
        "Export a causal language model as a bundle: a folder that satchel runs with ONNX Runtime, without torch. "
        "The bundle is checked, and its accuracy is measured against the float model, before it appears."
    )
    parser.epilog = EXAMPLE
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="a Hugging Face folder, a GGUF file, or file.py:factory"
    )
    parser.add_argument(
        "-o", "--output", metavar="BUNDLE", type=Path,
        help="the folder to write (default: ./NAME-PRECISION, after the checkpoint)",
    )  # fmt: skip
    parser.add_argument(
        "-p",
        "--precision",
        metavar="P",
        default=ExportConfig.precision,
        help=f"the number format of weights and activations: {', '.join(PRECISIONS)} (default int8; cuda, cann: fp16)",
    )
    parser.add_argument(
        "--effort",
        metavar="E",
        help=f"how weights are rounded: {' or '.join(EFFORTS)}; quick needs no text, normal calibrates on one "
        "and takes longer (default: quick for 8 bits; normal for 4 bits, and with --recipe or --calibrate)",
    )
    parser.add_argument(
        "--kv-cache",
        metavar="FORM",
        default=ExportConfig.kv_cache,
        help=f"how the KV cache is stored: {' or '.join(KV_CACHES)} (default %(default)s)",
    )
    parser.add_argument(
        "--latent-cache",
        metavar="FORM",
        help=f"what latent attention keeps of a token: {' or '.join(LATENT_CACHES)} (default: the smaller)",
    )
    parser.add_argument(
        "--recipe", metavar="FILE", help="the precision of each layer: a TOML file, or the name of a shipped recipe"
    )
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument(
        "--bits",
        metavar="N",
        type=float,
        help="find the recipe that loses least with at most N bits per weight, such as 5.5, and keep it in the bundle",
    )
    budget.add_argument("--size", metavar="MB", type=float, help="the same with at most so many megabytes of weights")
    parser.add_argument("--calibrate", metavar="TEXT", type=Path, help="the calibration text (default: a shipped one)")
    parser.add_argument(
        "--eval-text",
        metavar="TEXT",
        type=Path,
        help="the text to measure the bundle on (default: a shipped one)",
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
        help=f"the context length in tokens (default: the model's, at most {DEFAULT_CONTEXT})",
    )
    parser.add_argument(
        "--target",
        metavar="T",
        default=ExportConfig.target,
        help=f"the device to export for: {' or '.join(TARGETS)} (default %(default)s)",
    )
    parser.add_argument(
        "--prefill-lengths",
        metavar="N,N,...",
        type=_lengths,
        default=ExportConfig.prefill_lengths,
        help="for cann: the prompt chunk lengths that get a prefill graph "
        f"(default {','.join(map(str, PREFILL_LENGTHS))}, up to the context)",
    )
    parser.add_argument(
        "--tokenizer", metavar="PATH", type=Path, help="a tokenizer.json, SentencePiece .model or folder to use"
    )
    parser.add_argument(
        "--adapter",
        dest="adapters",
        metavar="FOLDER",
        action="append",
        default=[],
        help="a LoRA adapter in PEFT's format to merge, or a share of it, such as FOLDER=0.5; with --adapters separate "
        "NAME=FOLDER; may be repeated",
    )
    parser.add_argument(
        "--adapters",
        dest="adapter_form",
        metavar="FORM",
        default=ExportConfig.adapter_form,
        help=f"what becomes of the adapters: {' or '.join(ADAPTER_FORMS)}, of which each request chooses one by name "
        "(default %(default)s)",
    )
    parser.add_argument(
        "--embeddings",
        metavar="POOLING",
        help=f"add a graph for satchel embed; one vector of a text is the {' or the '.join(POOLINGS)} of the hidden "
        "states of its tokens",
    )
    parser.add_argument(
        "--as",
        dest="layout",
        metavar="TYPE",
        help="read a folder of unknown model_type as this one, such as llama; names and shapes must fit",
    )
    parser.add_argument(
        "--weights",
        metavar="FILE",
        type=Path,
        help="for file.py:factory: the tensors to load into the module, a torch.save or safetensors file",
    )
    parser.add_argument(
        "--pass",
        dest="passes",
        metavar="M:F",
        action="append",
        default=[],
        help="a custom graph pass: module:function or file.py:function; may be repeated",
    )
    parser.add_argument(
        "--custom-ops",
        metavar="LIBRARY",
        type=Path,
        action="append",
        default=[],
        help="a shared library with operators that your passes use; may be repeated",
    )
    parser.add_argument("--force", action="store_true", help="replace an existing bundle")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on with an export to BUNDLE that was interrupted while it rounded the weights; the bytes are the same",
    )
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    add_division(parser)


def _lengths(text: str) -> tuple[int, ...]:
    """Comma-separated integers."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: give comma-separated integers") from None


def main(args: argparse.Namespace) -> int:
    """Run the command. Raises ExportError for user-correctable errors."""
    interrupt.handle(signal.SIGTERM)  # partial files are removed
    # numpy's and torch's threads would wait for more work by computing, which other threads then cannot.
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    gc.disable()  # what is imported stays: looking for garbage in it takes a second
    with waiting("loading torch and transformers", shown=not args.quiet):
        from satchel.export.compile import export_bundle
    gc.freeze()
    gc.set_threshold(*COLLECT_EVERY)
    gc.enable()

    config = ExportConfig(
        output=args.output or _default_name(args.checkpoint), append_precision=args.output is None,
        precision=args.precision, max_context=args.max_context, target=args.target, force=args.force,
        tokenizer=args.tokenizer, kv_cache=args.kv_cache, latent_cache=args.latent_cache, recipe=args.recipe,
        calibrate=args.calibrate, certificate=args.certificate, effort=args.effort, eval_text=args.eval_text,
        passes=tuple(args.passes), custom_ops=tuple(args.custom_ops), prefill_lengths=args.prefill_lengths,
        adapters=tuple(args.adapters), layout=args.layout, weights=args.weights, adapter_form=args.adapter_form,
        embeddings=args.embeddings, resume=args.resume, bits=args.bits, size=args.size,
    )  # fmt: skip
    start = time.monotonic()
    if not is_asked(args):
        manifest = export_bundle(args.checkpoint, config, progress=not args.quiet)
        written = dataclasses.replace(config, precision=manifest.precision).named_output
    else:
        manifest, written = _export_parts(args, config)
    facts = {"bundle": str(written), **report(manifest), "seconds": round(time.monotonic() - start, 1)}
    if args.json:
        print(json.dumps(facts))
    elif not args.quiet:
        print(row(facts), file=sys.stderr)
    gc.freeze()  # else all that is left is looked through once more as the process ends
    return 0


def _export_parts(args: argparse.Namespace, config: ExportConfig) -> tuple[Manifest, Path]:
    """Export a bundle beside the output, and cut it into those of several ranks.

    Raises:
        SatchelError: The bundle cannot be cut, or there is no -o.
    """
    from satchel.export.compile import export_bundle
    from satchel.export.writing.publish import check_target, scratch_folder
    from satchel.graphs.shard import shard

    division = division_of(args)
    shard.check_target(config.target, division.collectives)
    if args.output is None:
        raise ExportError("a bundle that is cut: name the folder of all parts with -o")
    check_target(args.output, args.force, RANKS_NAME)
    with scratch_folder(args.output) as scratch:
        whole = scratch / "whole"
        manifest = export_bundle(args.checkpoint, dataclasses.replace(config, output=whole), progress=not args.quiet)
        cut_bundle(whole, division, args.output, force=args.force, quiet=args.quiet)
    return manifest, args.output


def _default_name(checkpoint: str) -> Path:
    """A place in the current folder, called after a checkpoint's folder or file."""
    path = Path(checkpoint.rpartition(".py:")[0] or checkpoint)
    name = path.stem if path.suffix in (".gguf", ".py") else path.resolve().name
    return Path(name)
