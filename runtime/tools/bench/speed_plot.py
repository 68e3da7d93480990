"""Draws prefill and decode speed over the prompt length. Needs matplotlib, the extra "plot"."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Sequence
from pathlib import Path

from satchel.runtime.bundle.atomic_write import atomic_write, check_target
from satchel.runtime.errors import SatchelError
from satchel.runtime.tools.bench.benchmark import Summary
from satchel.runtime.util.requirements import install_command

OPTION = "--plot"
SUFFIXES = (".png", ".svg")
SIZE, DPI = (7.0, 6.0), 150  # inches, dots per inch


def check_plot(path: Path) -> None:
    """Raise SatchelError for a plot that could not be drawn or written, before anything is measured."""
    if path.suffix.lower() not in SUFFIXES:
        raise SatchelError(f"{OPTION} {path}: must end in {' or '.join(SUFFIXES)}")
    check_target(path, OPTION)
    if importlib.util.find_spec("matplotlib") is None:
        raise SatchelError(f"{OPTION}: matplotlib is not installed: {install_command('plot')}")


def write_plot(path: Path, title: str, prompt_lengths: Sequence[int], summaries: Sequence[Summary]) -> None:
    """Plot medians in tokens per second over prompt lengths in tokens, with bars from the lowest to the highest run.

    The file is written atomically. Raises SatchelError.
    """
    from matplotlib.figure import Figure  # not pyplot, which looks for a display

    figure = Figure(figsize=SIZE, layout="constrained")
    panels = figure.subplots(2, 1, sharex=True)
    points = sorted(zip(prompt_lengths, summaries, strict=True), key=lambda point: point[0])
    lengths = [length for length, _ in points]
    for axes, name in zip(panels, ("prefill", "decode"), strict=True):
        middle, low, high = (
            [getattr(getattr(summary, part), name) for _, summary in points] for part in ("median", "lowest", "highest")
        )
        bars = [
            [value - bound for value, bound in zip(middle, low, strict=True)],
            [bound - value for value, bound in zip(middle, high, strict=True)],
        ]
        axes.errorbar(lengths, middle, yerr=bars, marker="o", capsize=3)
        axes.set_ylabel(f"{name}, tokens/s")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    panels[-1].set_xscale("log", base=2)
    panels[-1].set_xticks(lengths, labels=[f"{length:,}" for length in lengths])
    panels[-1].minorticks_off()
    panels[-1].set_xlabel("prompt, tokens")
    figure.suptitle(title, parse_math=False)
    content = io.BytesIO()
    figure.savefig(content, format=path.suffix.lower().removeprefix("."), dpi=DPI)
    atomic_write(path, content.getvalue(), OPTION)
