"""Measures a bundle against the float graph that it comes from, and records the results in its manifest.

The reference runs in a thread of this process, segment by segment, while the bundle is made; its logits go to files.
The bundle runs as for a user, in a separate process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from satchel.export.errors import ExportError
from satchel.export.quantize.flow import Flow, fresh
from satchel.export.quantize.observe import BATCH
from satchel.export.quantize.texts import Texts
from satchel.export.writing.bundle_writer import write_json
from satchel.graphs.ir.values import last_dim
from satchel.runtime.bundle import strict_json
from satchel.runtime.bundle.certificate import Certificate
from satchel.runtime.bundle.manifest import MANIFEST_NAME, Manifest
from satchel.runtime.optimize.certificate_worker import REFERENCE, RESULT, WINDOWS

LARGEST_LOGITS = 256 << 20
"""Max bytes of the reference's logits that are in memory at once."""


class Left(Exception):
    """The export has ended, so the reference is of no more use."""


@contextlib.contextmanager
def reference_ahead(model: ir.Model, windows: NDArray[np.int64] | None, folder: Path) -> Iterator[Future[None] | None]:
    """While it is entered, a thread computes the reference: the float graph's logits of each window.

    The export goes on meanwhile, since it does not keep all cores busy. Leaving stops the thread, at the next segment
    of the graph.

    Args:
        model: The float graph that all phases share, before quantization.
        windows: The windows to evaluate, [windows, length]; None for an export without a certificate.
        folder: A folder to create, for the windows and the logits.
    """
    if windows is None:
        yield None
        return
    left = threading.Event()
    with ThreadPoolExecutor(1, "reference") as pool:
        try:
            yield pool.submit(_write_reference, model, windows, folder, left)
        finally:
            left.set()


@contextlib.contextmanager
def measuring(
    bundle: Path, texts: Texts, folder: Path, reference: Future[None] | None, libraries: Sequence[Path] = ()
) -> Iterator[Callable[[], Manifest]]:
    """While it is entered, a process opens a bundle as for a user; calling what it yields measures it.

    Args:
        bundle: The bundle's folder.
        texts: The text that the windows come from.
        folder: The folder of `reference_ahead`.
        reference: What that yields; None to measure nothing.
        libraries: The libraries of custom operators that the bundle's graphs need.

    Yields:
        A function that records the results in the bundle's manifest, and returns that.

    Raises:
        ExportError: The bundle does not run, or its logits are not finite.
    """
    if reference is None:
        yield lambda: Manifest.read(bundle / MANIFEST_NAME)
        return
    measured = None if texts.measured is None else strict_json.to_json(texts.measured)
    arguments = (str(bundle), str(folder), json.dumps(measured), *map(str, libraries))
    command = [sys.executable, "-m", "satchel.runtime.optimize.certificate_worker", *arguments]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, text=True, stdin=pipe, stdout=pipe, stderr=pipe) as worker:
        try:
            yield lambda: _certified(bundle, folder, reference, worker)
        finally:
            worker.kill()  # it has ended, unless something failed


def _certified(bundle: Path, folder: Path, reference: Future[None], worker: subprocess.Popen[str]) -> Manifest:
    reference.result()
    output, complaint = worker.communicate("\n")
    if worker.returncode != 0:
        lines = (complaint or output).strip().splitlines()
        raise ExportError(f"the exported bundle cannot be measured: {lines[-1] if lines else 'no message'}")
    certificate: Certificate = strict_json.from_json(Certificate, json.loads((folder / RESULT).read_bytes()))
    manifest = dataclasses.replace(Manifest.read(bundle / MANIFEST_NAME), certificate=certificate)
    write_json(bundle / MANIFEST_NAME, manifest.to_json())
    return manifest


def _write_reference(model: ir.Model, windows: NDArray[np.int64], folder: Path, left: threading.Event) -> None:
    """Write the windows, and the float graph's logits of each, to files in `folder`. Raises Left once `left` is set."""

    def go_on(_: int) -> None:
        if left.is_set():
            raise Left

    folder.mkdir(parents=True)
    batch = _batch(model, windows)
    flow = Flow(model, windows, fresh(folder, "flow"), batch=batch)
    flow.run(progress=go_on)
    for first in range(0, len(windows), batch):
        for index, logits in enumerate(flow.logits(first // batch), first):
            np.save(folder / REFERENCE.format(index), logits)
        go_on(batch)
    np.save(folder / WINDOWS, windows)


def _batch(model: ir.Model, windows: NDArray[np.int64]) -> int:
    """Windows that the reference takes at once: more take less time, and more memory for their logits."""
    vocabulary = last_dim(model.graph.outputs[0])
    of_one = LARGEST_LOGITS if vocabulary is None else 4 * windows.shape[1] * vocabulary
    fitting = (n for n in (BATCH, BATCH // 2) if len(windows) % n == 0 and n * of_one <= LARGEST_LOGITS)
    return next(fitting, 1)
