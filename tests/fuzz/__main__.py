"""Opens thousands of changed bundles: `python -m fuzz --mutants 5000 --seed 0`, in the folder tests (see `make fuzz`).

Exits with 1 if one ended otherwise than it may, and names it; `--only NUMBER` runs that one again.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from fuzz.harness import GOOD, prepare, run_mutants, table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mutants", type=int, default=5000, help="how many (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="which ones (default %(default)s)")
    parser.add_argument("--only", metavar="NUMBER", type=int, help="one of them, with all that it said")
    args = parser.parse_args()
    started, endings = time.monotonic(), []
    indices = range(args.mutants) if args.only is None else range(args.only, args.only + 1)
    with tempfile.TemporaryDirectory(prefix="satchel-fuzz-") as name:
        bundles = prepare(Path(name))
        for ending in run_mutants(bundles, Path(name), args.seed, indices):
            endings.append(ending)
            if ending.how not in GOOD or ending.how == "died" or args.only is not None:
                print(f"{ending.index} {ending.kind} ({ending.note}): {ending.how}\n{ending.said}", flush=True)
    print(table(endings))
    print(f"{len(endings):,} mutants of seed {args.seed} in {time.monotonic() - started:.0f} s")
    return int(any(ending.how not in GOOD for ending in endings))


if __name__ == "__main__":
    sys.exit(main())
