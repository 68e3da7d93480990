"""Creates the certificate of a new bundle. Only `satchel export` starts this, in a process without torch:

    python -m satchel.runtime.optimize.certificate_worker

A line on standard input then has in JSON the bundle, a folder, what describes the text that the windows were cut from,
and the libraries of operators that the bundle needs. The folder holds the windows and a file with the reference logits
of each, and receives the certificate. The bundle is opened at once, and measured after another line says that the
folder is complete.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from satchel.runtime.bundle import strict_json
from satchel.runtime.bundle.certificate import ONNXRUNTIME, SATCHEL, Certificate, EvaluatedText, Speed, Window
from satchel.runtime.bundle.manifest import MANIFEST_NAME, Manifest
from satchel.runtime.bundle.reader import Bundle
from satchel.runtime.errors import SatchelError
from satchel.runtime.evaluation.certify import NEW_TOKENS, make_certificate
from satchel.runtime.execution.engine import Engine, open_engine
from satchel.runtime.optimize.specialize import on_own_kernels
from satchel.runtime.ort.custom_ops import Custom, choose
from satchel.runtime.ort.session import SessionSettings, default_threads
from satchel.runtime.tools.bench.benchmark import LOWEST_ID, Workload, measure

WINDOWS, REFERENCE, RESULT = "windows.npy", "reference-{}.npy", "certificate.json"

PROMPTS = 6
"""Number of windows whose first tokens become golden prompts."""

PROMPT_TOKENS = 32
SPEED_TOKENS = (256, 32)
"""Prompt tokens and new tokens of the recorded speeds."""

LARGEST_PACKED = 1 << 30
"""Max bytes of a float bundle whose weights are packed, as for a user: faster, but a second copy in memory."""

FLOAT_DECODE_WINDOWS, FLOAT_DECODE_ROWS = 1, 8
"""Float decode computes the same as prefill, so one window is enough, and its parts are decoded in rows."""

MOST_TOGETHER = 4
"""Windows whose steps of decode run together: so many rows take little longer than one."""


def appraise(
    folder: Path,
    work: Path,
    text: EvaluatedText | None,
    libraries: tuple[Path, ...] = (),
    wait: Callable[[], object] = lambda: None,
) -> Certificate:
    """Measure a bundle against the reference logits in `work`, on satchel's own kernels if it has a variant that runs
    here, as for a user, else on its portable graphs. `wait` returns when `work` is complete. Raises SatchelError."""
    portable = choose(Bundle(folder, Manifest.read(folder / MANIFEST_NAME)), Custom(libraries))
    with on_own_kernels(portable, SessionSettings(threads=1, alone=True)) as own:
        certificate = _measured(portable if own is None else own, work, text, wait)
        return dataclasses.replace(certificate, kernels=ONNXRUNTIME if own is None else SATCHEL)


def _measured(bundle: Bundle, work: Path, text: EvaluatedText | None, wait: Callable[[], object]) -> Certificate:
    manifest = bundle.manifest
    quantized = bool(manifest.layers)
    # Quantized weights run on other kernels if not packed, with other figures than those of the user.
    size = sum(record.bytes for record in manifest.files.values())
    lean = not quantized and bundle.specialized is None and size > LARGEST_PACKED
    # The rounded values of ONNX Runtime's kernels may differ with the number of threads, so each window is measured by
    # one, and several at once.
    apart = quantized and bundle.specialized is None
    engine = open_engine(bundle, SessionSettings(threads=1 if apart else None, lean=lean))
    wait()
    windows = list(np.load(work / WINDOWS))
    places = {window.tobytes(): index for index, window in enumerate(windows)}

    def reference(ids: NDArray[np.int64]) -> NDArray[np.float32]:
        logits: NDArray[np.float32] = np.load(work / REFERENCE.format(places[ids.tobytes()]), mmap_mode="r")
        return logits

    length, workers = len(windows[0]), default_threads() if apart else 1
    prompt = min(PROMPT_TOKENS, length // 2)
    certificate = make_certificate(
        engine,
        reference,
        text,
        windows,
        [(index, prompt, min(NEW_TOKENS, length - prompt)) for index in range(min(PROMPTS, len(windows)))],
        skip=min(Window.SKIP, length // 8),
        decode_windows=None if quantized else FLOAT_DECODE_WINDOWS,
        decode_rows=1 if quantized else FLOAT_DECODE_ROWS,
        together=min(-(-len(windows) // workers), MOST_TOGETHER),
        workers=workers,
    )
    if lean or manifest.target != "cpu":  # the speed of the CPU says nothing about another device
        return certificate
    if apart:
        del engine  # before its weights are loaded once more
        engine = open_engine(bundle, SessionSettings())
    return dataclasses.replace(certificate, speed=_speed(engine, manifest))


def _speed(engine: Engine, manifest: Manifest) -> Speed | None:
    """The speed on this machine; None if the context or vocabulary is too small to measure."""
    prompt, new = SPEED_TOKENS
    if prompt + new > manifest.model.max_context or manifest.model.vocab_size <= LOWEST_ID:
        return None
    figures = measure(engine, Workload(prompt, new, manifest.model.vocab_size), load=0.0)
    return Speed(prompt, new, default_threads(), round(figures.prefill, 1), round(figures.decode, 1))


def _told() -> str:
    """Wait for a line on standard input. Raises SatchelError if it ends, as that of an export that was killed."""
    line = sys.stdin.readline()
    if not line:
        raise SatchelError("the export has ended")
    return line


def main() -> int:
    try:
        folder, work, text, *libraries = json.loads(_told())
        described = None if text is None else strict_json.from_json(EvaluatedText, text)
        certificate = appraise(Path(folder), Path(work), described, tuple(map(Path, libraries)), _told)
    except SatchelError as error:
        print(error, file=sys.stderr)
        return 1
    document = json.dumps(strict_json.to_json(certificate))
    (Path(work) / RESULT).write_text(document, encoding="utf-8", newline="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
