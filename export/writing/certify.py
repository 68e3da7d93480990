"""Measures a written bundle against the float graph that it was made from, and puts the figures into its manifest."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from satchel.export.errors import ExportError
from satchel.export.quantize.flow import Flow, fresh
from satchel.export.quantize.texts import Texts
from satchel.export.writing.bundle_writer import write_json
from satchel.runtime.bundle import strict_json
from satchel.runtime.bundle.certificate import Certificate
from satchel.runtime.bundle.manifest import MANIFEST_NAME, Manifest
from satchel.runtime.evaluation.worker import REFERENCE, RESULT, WINDOWS


def certify(bundle: Path, model: ir.Model, texts: Texts, folder: Path, libraries: Sequence[Path] = ()) -> Manifest:
    """Certify a bundle that is not published yet.

    The reference runs here, layer by layer, and its logits go to a file. The bundle runs as a user will run it, in a
    process of its own.

    Args:
        bundle: The bundle's folder.
        model: The float graph that all phases share, before anything was rounded.
        texts: The windows to measure on.
        folder: For the reference's logits; made here.
        libraries: Those with the operators of a user's own that the bundle's graphs need.

    Returns:
        The manifest, with the certificate, as it is now in the bundle.

    Raises:
        ExportError: The bundle does not run, or gives logits that are not finite.
    """
    if texts.certificate is None:
        raise ValueError("there is no text to measure on")
    folder.mkdir(parents=True)
    windows = texts.certificate
    flow = Flow(model, windows, fresh(folder, "flow"))
    flow.run()
    for index in range(len(windows)):
        np.save(folder / REFERENCE.format(index), flow.logits(index)[0])
    np.save(folder / WINDOWS, windows)
    measured = None if texts.measured is None else strict_json.to_json(texts.measured)
    arguments = (str(bundle), str(folder), json.dumps(measured), *map(str, libraries))
    command = [sys.executable, "-m", "satchel.runtime.evaluation.worker", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise ExportError(f"the exported bundle cannot be measured: {lines[-1] if lines else 'no message'}")
    certificate: Certificate = strict_json.from_json(Certificate, json.loads((folder / RESULT).read_bytes()))
    manifest = dataclasses.replace(Manifest.read(bundle / MANIFEST_NAME), certificate=certificate)
    write_json(bundle / MANIFEST_NAME, manifest.to_json())
    return manifest
