"""The texts of an export: one for calibration, one for evaluation."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from satchel.export.checkpoint import Checkpoint
from satchel.export.config import ExportConfig
from satchel.export.errors import ExportError
from satchel.graphs.quant.recipe import Recipe
from satchel.graphs.targets.targets import TARGETS
from satchel.runtime.bundle.certificate import EvaluatedText, Window
from satchel.runtime.evaluation.fidelity import text_ids
from satchel.runtime.generation.tokenizer import Tokenizer

FOLDER = Path(__file__).resolve().parent / "corpora"
CALIBRATION = FOLDER / "calibration.txt"
"""The default calibration text: stories, letters, articles, talks and code in nine languages."""

CERTIFICATE = FOLDER / "certificate.txt"
"""The default evaluation text; disjoint from the calibration text."""

CALIBRATION_WINDOWS = 48
"""Max calibration windows, spread evenly over the text; more made no difference."""

CERTIFICATE_WINDOWS = 8
"""Windows that a certificate is measured on, from the start of the text."""

FEWER_CERTIFICATE_WINDOWS = 4
"""The same for fp16, and for quick exports, which save the time."""

EXACT_CERTIFICATE_WINDOWS = 2
"""The same for fp32, whose KL is below 1e-9 at every position: more windows add no information."""

QUICK_WINDOWS = 4
"""Windows of random ids for the calibration of a quick export."""

ROUNDING_WINDOWS = 4
"""Windows on which the values of a float16 graph are compared with float16's largest."""

FEWEST = 8
"""Min windows of a calibration text; fewer do not represent a layer's inputs."""


@dataclasses.dataclass(frozen=True)
class Texts:
    """Windows of token ids, [windows, tokens] int64.

    Attributes:
        calibration: None without calibration.
        certificate: None without a certificate.
        rounding: For a target that computes in float16: windows on which values are compared with its largest.
        measured: The text that `certificate` comes from; None for random ids.
    """

    calibration: NDArray[np.int64] | None
    certificate: NDArray[np.int64] | None
    measured: EvaluatedText | None
    rounding: NDArray[np.int64] | None = None


def open_texts(
    checkpoint: Checkpoint,
    config: ExportConfig,
    recipe: Recipe | None,
    option: str = "--eval-text",
) -> Texts:
    """Read and tokenize the texts of an export; a model without a tokenizer gets random ids.

    `option` is the flag that named the evaluation text.

    Raises:
        ExportError: A text from the user cannot be read or is too short, or there is no tokenizer for it.
    """
    length = min(Window.LENGTH, config.context(checkpoint.max_context))
    tokenizer = None if checkpoint.tokenizer is None else checkpoint.tokenizer.load()
    calibration = certificate = measured = None
    if _calibrates(config, recipe) and not config.reads_calibration_text:
        calibration = np.random.default_rng(0).integers(0, checkpoint.vocab_size, (QUICK_WINDOWS, length))
    elif _calibrates(config, recipe):
        ids, _ = _ids(tokenizer, checkpoint, config.calibrate, CALIBRATION, "--calibrate")
        calibration = _spread(_windows(ids, length, FEWEST, config.calibrate, "--calibrate"), CALIBRATION_WINDOWS)
    if config.certificate:
        ids, measured = _ids(tokenizer, checkpoint, config.eval_text, CERTIFICATE, option)
        windows = _windows(ids, length, 1, config.eval_text, option)
        certificate = windows[: certificate_windows(config)]
    return Texts(calibration, certificate, measured, _rounding(tokenizer, checkpoint, config, calibration, length))


def _rounding(
    tokenizer: Tokenizer | None,
    checkpoint: Checkpoint,
    config: ExportConfig,
    calibration: NDArray[np.int64] | None,
    length: int,
) -> NDArray[np.int64] | None:
    """Windows of the calibration text, whether it calibrates or not; None for a target with other types."""
    if not TARGETS[config.target].float16:
        return None
    if calibration is None or not config.reads_calibration_text:
        ids, _ = _ids(tokenizer, checkpoint, None, CALIBRATION, "--calibrate")
        calibration = _windows(ids, length, 1, None, "--calibrate")
    return _spread(calibration, ROUNDING_WINDOWS)


def calibration_file(checkpoint: Checkpoint, config: ExportConfig, recipe: Recipe | None) -> Path | None:
    """Return the calibration text; None without calibration, or for random ids."""
    if checkpoint.tokenizer is None or not (config.reads_calibration_text and _calibrates(config, recipe)):
        return None
    return CALIBRATION if config.calibrate is None else config.calibrate


def certificate_file(checkpoint: Checkpoint, config: ExportConfig) -> Path | None:
    """Return the evaluation text; None without a certificate, or for random ids."""
    if checkpoint.tokenizer is None or not config.certificate:
        return None
    return CERTIFICATE if config.eval_text is None else config.eval_text


def _calibrates(config: ExportConfig, recipe: Recipe | None) -> bool:
    return config.calibrate is not None or (recipe is not None and (recipe.needs_calibration() or config.int8_cache))


def certificate_windows(config: ExportConfig) -> int:
    """Return the number of windows that a bundle of this precision and effort is evaluated on."""
    if config.precision == "fp32":
        return EXACT_CERTIFICATE_WINDOWS
    return CERTIFICATE_WINDOWS if config.effort == "normal" else FEWER_CERTIFICATE_WINDOWS


def _ids(
    tokenizer: Tokenizer | None, checkpoint: Checkpoint, chosen: Path | None, shipped: Path, option: str
) -> tuple[NDArray[np.int64], EvaluatedText | None]:
    if tokenizer is None:
        if chosen is not None:
            raise ExportError(
                f"{option} {chosen}: {checkpoint.name} has no tokenizer for it: pass one with --tokenizer"
            )
        return np.random.default_rng(0).integers(0, checkpoint.vocab_size, 16 * Window.LENGTH), None
    path = shipped if chosen is None else chosen
    content = _read(path, option)
    ids = text_ids(tokenizer, content.decode("utf-8"))
    text = EvaluatedText(path.name, hashlib.sha256(content).hexdigest(), len(ids))
    return np.asarray(ids, np.int64), text


def _read(path: Path, option: str) -> bytes:
    try:
        content = path.read_bytes()
        text = content.decode("utf-8")
    except OSError as error:
        raise ExportError(f"{option} {path}: cannot be read ({error.strerror}): pass a text file") from None
    except UnicodeDecodeError as error:
        raise ExportError(f"{option} {path}: not UTF-8 at byte {error.start}: pass UTF-8 text") from None
    if not text.strip():
        raise ExportError(f"{option} {path}: is empty: pass a text of a few pages")
    return content


def _windows(ids: NDArray[np.int64], length: int, fewest: int, chosen: Path | None, option: str) -> NDArray[np.int64]:
    if chosen is not None and len(ids) < fewest * length:
        raise ExportError(
            f"{option} {chosen}: has {len(ids)} tokens, but needs at least {fewest * length}: pass a longer text"
        )
    return ids[: len(ids) // length * length].reshape(-1, length)


def _spread(windows: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    if len(windows) <= count:
        return windows
    spread: NDArray[np.int64] = windows[np.linspace(0, len(windows) - 1, count).round().astype(int)]
    return spread
