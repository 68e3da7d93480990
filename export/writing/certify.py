"""Measures a bundle against the float graph that it comes from, and records the results in its manifest."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Sequence
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


def certify(bundle: Path, model: ir.Model, texts: Texts, folder: Path, libraries: Sequence[Path] = ()) -> Manifest:
    """Certify a bundle before it is published.

    The reference runs in this process, segment by segment, and its logits go to files. The bundle runs as for a user,
    in a separate process.

    Args:
        bundle: The bundle's folder.
        model: The float graph that all phases share, before quantization.
        texts: The windows to evaluate.
        folder: A folder to create, for the reference's logits.
        libraries: The libraries of custom operators that the bundle's graphs need.

    Returns:
        The manifest with the certificate, as written to the bundle.

    Raises:
        ExportError: The bundle does not run, or its logits are not finite.
    """
    if texts.certificate is None:
        raise ValueError("no evaluation text")
    folder.mkdir(parents=True)
    measured = None if texts.measured is None else strict_json.to_json(texts.measured)
    arguments = (str(bundle), str(folder), json.dumps(measured), *map(str, libraries))
    command = [sys.executable, "-m", "satchel.runtime.optimize.certificate_worker", *arguments]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, text=True, stdin=pipe, stdout=pipe, stderr=pipe) as worker:
        try:
            _write_reference(model, texts.certificate, folder)  # while the worker opens the bundle
            output, complaint = worker.communicate("\n")
        except BaseException:
            worker.kill()
            raise
    if worker.returncode != 0:
        lines = (complaint or output).strip().splitlines()
        raise ExportError(f"the exported bundle cannot be measured: {lines[-1] if lines else 'no message'}")
    certificate: Certificate = strict_json.from_json(Certificate, json.loads((folder / RESULT).read_bytes()))
    manifest = dataclasses.replace(Manifest.read(bundle / MANIFEST_NAME), certificate=certificate)
    write_json(bundle / MANIFEST_NAME, manifest.to_json())
    return manifest


def _write_reference(model: ir.Model, windows: NDArray[np.int64], folder: Path) -> None:
    """Write the windows, and the float graph's logits of each, to files in `folder`."""
    batch = _batch(model, windows)
    flow = Flow(model, windows, fresh(folder, "flow"), batch=batch)
    flow.run()
    for first in range(0, len(windows), batch):
        for index, logits in enumerate(flow.logits(first // batch), first):
            np.save(folder / REFERENCE.format(index), logits)
    np.save(folder / WINDOWS, windows)


def _batch(model: ir.Model, windows: NDArray[np.int64]) -> int:
    """Windows that the reference takes at once: more take less time, and more memory for their logits."""
    vocabulary = last_dim(model.graph.outputs[0])
    of_one = LARGEST_LOGITS if vocabulary is None else 4 * windows.shape[1] * vocabulary
    fitting = (n for n in (BATCH, BATCH // 2) if len(windows) % n == 0 and n * of_one <= LARGEST_LOGITS)
    return next(fitting, 1)
