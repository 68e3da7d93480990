"""Runs of several ranks under the launcher of MPI."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from satchel.runtime.kernels import library
from satchel.runtime.util.child import python_path

LAUNCHER = next(
    (path for path in (Path(sys.prefix) / "bin" / "mpiexec", Path(shutil.which("mpiexec") or "-")) if path.is_file()),
    None,
)
ENVIRONMENT = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
}


def _missing() -> str | None:
    if importlib.util.find_spec("mpi4py") is None or LAUNCHER is None:
        return "MPI is not installed: pip install mpi4py mpich"
    return None if library.reason() is None else f"satchel's own kernels {library.reason()}"


needs_mpi = pytest.mark.skipif(_missing() is not None, reason=_missing() or "")


def command(count: int, *arguments: str | Path) -> list[str]:
    """What starts `python ARGUMENTS` as so many ranks."""
    return [str(LAUNCHER), "-n", str(count), sys.executable, *map(str, arguments)]


APART = {"MPIR_CVAR_NOLOCAL": "1"}
"""Lets MPICH take each rank for one on a machine of its own."""


def together(
    count: int, *arguments: str | Path, timeout: float = 100, apart: bool = False
) -> subprocess.CompletedProcess[str]:
    """Run `python ARGUMENTS` as so many ranks, to their end; `apart`, as if on several machines."""
    environment = os.environ | ENVIRONMENT | {"PYTHONPATH": python_path()} | (APART if apart else {})
    return subprocess.run(
        command(count, *arguments), capture_output=True, text=True, errors="replace", timeout=timeout, env=environment,
        stdin=subprocess.DEVNULL, check=False,
    )  # fmt: skip


def satchel(count: int, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a command line of satchel as so many ranks, one thread each."""
    return together(count, "-m", "satchel", *arguments)


def processes(launcher: subprocess.Popen[str]) -> dict[int, psutil.Process]:
    """The processes that do the work of a run, by rank; those that the launcher started wait for them."""
    found = {}
    for process in psutil.Process(launcher.pid).children(recursive=True):
        variables = process.environ() if process.exe() == os.path.realpath(sys.executable) else {}
        rank = variables.get("PMI_RANK", variables.get("OMPI_COMM_WORLD_RANK"))
        if rank is not None:
            found[int(rank)] = process  # a child comes after its parent
    return found
