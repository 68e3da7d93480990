"""Benchmarks bundles against other engines on this machine: the same workload, interleaved, each in a fresh process.

    python samples/compare_peers.py --satchel int8=out/int8 --llama-bench llama.cpp/build/bin/llama-bench \\
        --gguf model-Q8_0.gguf --genai genai-int8/ --genai-python genai/bin/python

Engines: llama.cpp's `llama-bench` with GGUF files, onnxruntime-genai model folders, folders or GGUF files of OpenVINO
GenAI. Give models of the same weights and similar precision. The last two run in a Python that has them installed
(`--genai-python`, `--openvino-python`).

Workload: batch size 1, a prompt of random ids, then greedy tokens, after a short warm-up. llama-bench decodes random
ids instead, in a second process, from a context of the prompt's length. `prefill` and `decode` are tokens per second,
`load` is seconds from the import of the engine to a ready model, `rss_mb` the peak resident memory in MiB. `-` means
that the engine does not report the value. Figures are medians over the rounds; a ratio is the median of the ratios
within each round, so that it holds on a busy machine. An engine that fails is skipped with one line that says why, and
the exit code is then 1.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

FIGURES = ("prefill", "decode", "load", "rss_mb")
LOWEST_ID = 100  # ids below are often special tokens
WARM_UP_TOKENS = 16
KIB_PER_MIB = 1024

Figures = dict[str, Any]
"""By the names in FIGURES; None is what a peer does not tell."""


class NotMeasuredError(Exception):
    """Why there are no figures, in one line."""


@dataclass(frozen=True)
class Work:
    """Prompt and new tokens, threads, and the bound below which the prompt's ids are drawn."""

    prompt: int
    new: int
    threads: int
    vocabulary: int


def run(command: list[str]) -> tuple[str, float]:
    """The output of a command, and its peak resident memory in MiB. Raises NotMeasuredError."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        try:
            process = subprocess.Popen(command, stdout=out, stderr=err)
        except OSError as error:
            raise NotMeasuredError(f"{command[0]}: cannot be started ({error.strerror})") from None
        _, status, usage = os.wait4(process.pid, 0)  # tells the memory of this very process
        process.returncode = os.waitstatus_to_exitcode(status)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
    if process.returncode < 0:
        raise NotMeasuredError(f"{command[0]}: ended by {signal.Signals(-process.returncode).name}")
    if process.returncode > 0:
        lines = [line.strip() for line in texts[1].splitlines() if line.strip()]
        telling = [line for line in lines if "error" in line.lower()] or lines
        raise NotMeasuredError(telling[-1] if telling else f"{command[0]}: exit code {process.returncode}")
    return texts[0], usage.ru_maxrss / KIB_PER_MIB


def last_json(text: str, start: str) -> Any:
    """The JSON that begins at the last line that starts with `start`. Raises NotMeasuredError."""
    lines = text.splitlines()
    for number in range(len(lines) - 1, -1, -1):
        if lines[number].startswith(start):
            try:
                return json.loads("\n".join(lines[number:]))
            except ValueError:
                break
    raise NotMeasuredError("it printed no figures")


def satchel(bundle: str, work: Work) -> Figures:
    """A bundle by `satchel bench`."""
    command = [sys.executable, "-m", "satchel.runtime.cli.main", "bench", bundle, "--json", "--vocabulary"]
    command += [str(work.vocabulary), "--threads", str(work.threads)]
    out, rss = run([*command, "--prompt-tokens", str(work.prompt), "--new-tokens", str(work.new)])
    found = last_json(out, "{")
    return {**{name: found[name] for name in ("prefill", "decode", "load")}, "rss_mb": rss}


def llama_bench(binary: str, file: str, work: Work) -> Figures:
    """A GGUF file by `llama-bench`, which tells neither its load time nor what it decodes after a prompt of its own."""
    command = [binary, "--model", file, "--threads", str(work.threads), "--repetitions", "1", "--output", "json"]
    command += ["--n-gpu-layers", "0"]
    speeds, memory = [], []
    for tokens in (("-p", work.prompt, "-n", 0), ("-p", 0, "-n", work.new, "-d", work.prompt)):
        out, rss = run([*command, *map(str, tokens)])
        try:
            (test,) = last_json(out, "[")
            speeds.append(float(test["avg_ts"]))
        except (ValueError, TypeError, KeyError):
            raise NotMeasuredError(f"{binary}: its JSON has not one test with 'avg_ts'") from None
        memory.append(rss)
    return {"prefill": speeds[0], "decode": speeds[1], "load": None, "rss_mb": max(memory)}


def in_python(python: str, kind: str, path: str, work: Work) -> Figures:
    """A peer with a Python interface: this file, run as a worker by another interpreter."""
    numbers = (work.prompt, work.new, work.threads, work.vocabulary)
    out, rss = run([python, str(Path(__file__).resolve()), "--worker", kind, path, *map(str, numbers)])
    return {**last_json(out, "{"), "rss_mb": rss}


def genai(path: str, work: Work) -> Figures:
    """Worker: a model folder of onnxruntime-genai."""
    start = time.perf_counter()
    import numpy as np
    import onnxruntime_genai as og

    config = og.Config(path)
    threads = {"intra_op_num_threads": work.threads}
    config.overlay(json.dumps({"model": {"decoder": {"session_options": threads}}}))
    model = og.Model(config)
    load = time.perf_counter() - start
    ids = np.random.default_rng(0).integers(LOWEST_ID, work.vocabulary, work.prompt)

    def feed(tokens: Any, total: int) -> Any:
        """A generator that has been fed a prompt and has chosen one token; no end token stops it before `total`."""
        params = og.GeneratorParams(model)
        params.set_search_options(do_sample=False, min_length=total, max_length=total)
        generator = og.Generator(model, params)
        generator.append_tokens(tokens)
        generator.generate_next_token()
        return generator

    feed(ids[:WARM_UP_TOKENS], WARM_UP_TOKENS + 1).get_next_tokens()
    start = time.perf_counter()
    generator = feed(ids, work.prompt + work.new + 1)
    middle = time.perf_counter()
    for _ in range(work.new):
        generator.generate_next_token()
    end = time.perf_counter()
    return {"prefill": work.prompt / (middle - start), "decode": work.new / (end - middle), "load": load}


def openvino(path: str, work: Work) -> Figures:
    """Worker: a folder or a GGUF file by OpenVINO GenAI, which times prefill and decoding itself."""
    start = time.perf_counter()
    import numpy as np
    import openvino as ov
    import openvino_genai

    pipeline = openvino_genai.LLMPipeline(path, "CPU", INFERENCE_NUM_THREADS=work.threads)
    load = time.perf_counter() - start
    ids = np.random.default_rng(0).integers(LOWEST_ID, work.vocabulary, (1, work.prompt))

    def generate(tokens: Any, new: int) -> Any:
        config = openvino_genai.GenerationConfig(
            max_new_tokens=new, min_new_tokens=new, ignore_eos=True, do_sample=False, apply_chat_template=False
        )
        prompt = ov.Tensor(np.ascontiguousarray(tokens)), ov.Tensor(np.ones_like(tokens))
        return pipeline.generate(openvino_genai.TokenizedInputs(*prompt), config).perf_metrics

    generate(ids[:, :WARM_UP_TOKENS], 2)
    metrics = generate(ids, work.new + 1)  # the first one is the prompt's
    first, each = metrics.get_ttft().mean / 1e3, metrics.get_tpot().mean / 1e3
    return {"prefill": work.prompt / first, "decode": 1 / each, "load": load}


WORKERS = {"genai": genai, "openvino": openvino}
PACKAGES = {"genai": "onnxruntime-genai", "openvino": "openvino-genai"}


def worker(kind: str, path: str, *numbers: str) -> None:
    """Measure one peer in this process, and print its figures as JSON."""
    if not Path(path).exists():
        sys.exit(f"{path}: not there")
    try:
        print(json.dumps(WORKERS[kind](path, Work(*map(int, numbers)))))
    except ImportError as error:
        sys.exit(f"{PACKAGES[kind]} cannot be imported by {sys.executable} ({error}): name the Python that has it")
    except Exception as error:  # noqa: BLE001 - peers raise what they like, and one line is to tell it
        sys.exit(f"{PACKAGES[kind]}: {' '.join(str(error).split())[:300]}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare satchel bundles with other runners on this machine.")
    add = parser.add_argument
    add("--satchel", action="append", required=True, metavar="NAME=BUNDLE", help="a bundle; may be given again")
    add("--llama-bench", metavar="PATH", help="llama.cpp's llama-bench")
    add("--gguf", action="append", default=[], metavar="FILE", help="a model for llama-bench; may be given again")
    add("--genai", action="append", default=[], metavar="FOLDER", help="a model of onnxruntime-genai")
    add("--openvino", action="append", default=[], metavar="PATH", help="a model of OpenVINO GenAI")
    add("--genai-python", default=sys.executable, metavar="PATH", help="a Python with onnxruntime-genai")
    add("--openvino-python", default=sys.executable, metavar="PATH", help="a Python with openvino-genai")
    add("--rounds", type=int, default=5, help="number of rounds (%(default)s)")
    add("--prompt-tokens", type=int, default=512, help="%(default)s")
    add("--new-tokens", type=int, default=128, help="%(default)s")
    add("--threads", type=int, default=len(os.sched_getaffinity(0)), help="%(default)s: all that this process may use")
    add("--vocabulary", type=int, help="prompt ids are below this (default: the smallest of the bundles')")
    add("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    if bool(args.gguf) != bool(args.llama_bench):
        parser.error("--llama-bench and --gguf go together")
    for name in ("rounds", "prompt_tokens", "new_tokens", "threads"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: must be 1 or more")
    for spec in args.satchel:
        if not all(spec.partition("=")):
            parser.error(f"--satchel {spec}: must be NAME=BUNDLE")
    return args


def vocabulary(bundles: list[str]) -> int:
    """The smallest vocabulary of some bundles."""
    sizes = []
    for bundle in bundles:
        try:
            manifest = json.loads((Path(bundle) / "manifest.json").read_text(encoding="utf-8"))
            sizes.append(int(manifest["model"]["vocab_size"]))
        except (OSError, ValueError, TypeError, KeyError):
            raise NotMeasuredError(f"{bundle}: not a bundle (no manifest.json that tells the vocabulary)") from None
    return min(sizes)


def engines(args: argparse.Namespace, work: Work) -> dict[str, Callable[[], Figures]]:
    """What is to be measured, by the name that the table shows; satchel's own first."""
    found: dict[str, Callable[[], Figures]] = {}
    for spec in args.satchel:
        name, _, bundle = spec.partition("=")
        found[f"satchel {name}"] = partial(satchel, bundle, work)
    for file in args.gguf:
        found[f"llama.cpp {Path(file).stem}"] = partial(llama_bench, args.llama_bench, file, work)
    for kind, python in (("genai", args.genai_python), ("openvino", args.openvino_python)):
        for path in getattr(args, kind):
            found[f"{kind} {Path(path).resolve().name}"] = partial(in_python, python, kind, path, work)
    return found


def measure(todo: dict[str, Callable[[], Figures]], rounds: int) -> dict[str, list[Figures]]:
    """The figures of each round, by name; a runner that fails is named on standard error and left out."""
    found: dict[str, list[Figures]] = {name: [] for name in todo}
    for number in range(rounds):
        for name, once in todo.items():
            if name not in found:
                continue
            print(f"round {number + 1} of {rounds}: {name}", file=sys.stderr)
            try:
                found[name].append(once())
            except NotMeasuredError as error:
                print(f"{name} is left out: {error}", file=sys.stderr)
                del found[name]
    return found


def medians(rounds: list[Figures]) -> Figures:
    columns = {name: [figures[name] for figures in rounds] for name in FIGURES}
    return {name: None if None in values else statistics.median(values) for name, values in columns.items()}


def ratios(ours: list[Figures], theirs: list[Figures]) -> Figures:
    """The median over the rounds of ours / theirs."""
    both = list(zip(ours, theirs, strict=True))
    told = [name for name in FIGURES if None not in (both[0][0][name], both[0][1][name])]
    within = {name: [our[name] / their[name] for our, their in both] for name in told}
    return {name: statistics.median(within[name]) if name in within else None for name in FIGURES}


def line(name: str, figures: Figures, width: int) -> str:
    cells = ("-" if figures[field] is None else f"{figures[field]:.2f}" for field in FIGURES)
    return f"{name:{width}}" + "".join(f"{cell:>12}" for cell in cells)


def main() -> int:
    args = parse()
    try:
        bound = args.vocabulary or vocabulary([spec.partition("=")[2] for spec in args.satchel])
    except NotMeasuredError as error:
        print(error, file=sys.stderr)
        return 2
    todo = engines(args, Work(args.prompt_tokens, args.new_tokens, args.threads, bound))
    found = measure(todo, args.rounds)
    ours = [name for name in found if name.startswith("satchel ")]
    median = {name: medians(rounds) for name, rounds in found.items()}
    ratio = {mine: {name: ratios(found[mine], found[name]) for name in found if name not in ours} for mine in ours}
    if args.json:
        print(json.dumps({"median": median, "ratio": ratio, "rounds": args.rounds, "threads": args.threads}))
    elif found:
        width = max(map(len, found)) + 2
        print(f"{'':{width}}" + "".join(f"{name:>12}" for name in FIGURES))
        for name, figures in median.items():
            print(line(name, figures, width))
        for mine, peers in ratio.items():
            if peers:
                print(f"\n{mine} / peer: above 1 is better in prefill and decode, below 1 in load and memory")
            for name, figures in peers.items():
                print(line(f"  {name}", figures, width))
    return 0 if len(found) == len(todo) else 1


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(*sys.argv[2:])
    else:
        sys.exit(main())
