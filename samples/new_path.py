"""An output path of a sample: samples never write over what is there."""

from __future__ import annotations

import sys
from pathlib import Path


def new_path(path: Path) -> Path:
    """Create the parent folders of `path` and return it. Exits with 2 if `path` exists."""
    if path.exists():
        print(f"{path}: exists already; choose another path, or remove it", file=sys.stderr)
        sys.exit(2)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
