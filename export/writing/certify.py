"""Measures a bundle against the float graph that it comes from, and records the results in its manifest.

The reference runs in a thread of this process, segment by segment, while the bundle is made; its logits go to files.
The bundle runs as for a user, in a separate process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from satchel.export.ahead import GoOn, Helper, in_thread
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


WORKER = "satchel.runtime.optimize.certificate_worker"
"""The module of the process that measures a bundle."""


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
    with in_thread("reference", lambda go_on: _write_reference(model, windows, folder, go_on)) as reference:
        yield reference


def open_bundle(bundle: Path, texts: Texts, folder: Path, worker: Helper, libraries: Sequence[Path] = ()) -> None:
    """Let `worker`, which runs `WORKER`, open a new bundle as for a user, to measure it later.

    Args:
        bundle: The bundle's folder.
        texts: The text that the windows come from.
        folder: The folder of `reference_ahead`.
        worker: The process.
        libraries: The libraries of custom operators that the bundle's graphs need.
    """
    measured = None if texts.measured is None else strict_json.to_json(texts.measured)
    worker.tell([str(bundle), str(folder), measured, *map(str, libraries)])


def certified(bundle: Path, folder: Path, reference: Future[None], worker: Helper) -> Manifest:
    """Measure the bundle that `worker` has opened, record the results in its manifest, and return that.

    Raises:
        ExportError: The bundle does not run, or its logits are not finite.
    """
    reference.result()
    worker.tell(None)
    complaint = worker.finish()
    if complaint is not None:
        raise ExportError(f"the exported bundle cannot be measured: {complaint}")
    certificate: Certificate = strict_json.from_json(Certificate, json.loads((folder / RESULT).read_bytes()))
    manifest = dataclasses.replace(Manifest.read(bundle / MANIFEST_NAME), certificate=certificate)
    write_json(bundle / MANIFEST_NAME, manifest.to_json())
    return manifest


def _write_reference(model: ir.Model, windows: NDArray[np.int64], folder: Path, go_on: GoOn) -> None:
    """Write the windows, and the float graph's logits of each, to files in `folder`."""
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
