"""A progress bar on standard error for work that may take long."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

SHOW_AFTER = 2.0  # seconds: shorter work shows nothing


def stage_printer(*, shown: bool) -> Callable[[str], None]:
    """What prints the name of each stage of some work, a line each on standard error, if `shown`."""

    def stage(name: str) -> None:
        if shown:
            print(f"{name} ...", file=sys.stderr)

    return stage


def progress_bar(total: int, label: str, unit: str, *, shown: bool) -> Any:
    """A tqdm bar of `total` units: a context manager with `update(count)`, cleared at its end.

    It appears only when `shown`, on a terminal, and only for work that takes longer than two seconds.
    """
    from tqdm import tqdm

    hidden = not shown or not sys.stderr.isatty()
    return tqdm(
        total=total,
        desc=label,
        unit=unit,
        unit_scale=True,
        delay=SHOW_AFTER,
        disable=hidden,
        leave=False,
        file=sys.stderr,
    )
