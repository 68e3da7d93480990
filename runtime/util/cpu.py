"""The processor of this machine: its name, cores, and the extensions that kernels depend on. Standard library only."""

from __future__ import annotations

import functools
import os
import platform
from pathlib import Path

# Extensions on which ONNX Runtime's CPU kernels, and so the layout of packed weights, depend; as Linux spells them.
X86_EXTENSIONS = (
    "sse4_1", "avx", "f16c", "fma", "avx2", "avx_vnni", "avx_vnni_int8", "avx_ne_convert", "avx512f", "avx512bw",
    "avx512dq", "avx512vl", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16",
)  # fmt: skip
ARM_EXTENSIONS = ("asimdhp", "asimddp", "i8mm", "bf16", "sve", "svei8mm", "svebf16", "sve2", "sme", "sme2")


def processor_name() -> str:
    """The name of this machine's processor, for display."""
    named = _entries("model name")
    return (named[0] if named else "") or platform.processor() or platform.machine()


def usable_cpus() -> int:
    """The number of logical CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def usable_cores() -> list[set[int]]:
    """The logical CPUs that this process may use, core by core. Empty where the system does not tell (off Linux)."""
    if not hasattr(os, "sched_getaffinity"):
        return []
    cores: dict[str, set[int]] = {}
    for cpu in sorted(os.sched_getaffinity(0)):
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        core = siblings.read_text(encoding="ascii") if siblings.is_file() else str(cpu)
        cores.setdefault(core, set()).add(cpu)
    return list(cores.values())


@functools.cache
def machine_cores() -> int:
    """The number of physical cores of the machine, not only those that this process may use; of logical CPUs off Linux.

    Work in that many threads is split in the same way by every process of the machine.
    """
    places = sorted(Path("/sys/devices/system/cpu").glob("cpu[0-9]*/topology/thread_siblings_list"))
    cores = {place.read_text(encoding="ascii") for place in places}
    return len(cores) or os.cpu_count() or 1


def processor_features() -> tuple[str, ...]:
    """The architecture and the extensions that packed weights may depend on, in a fixed order.

    If the system does not list extensions (any but Linux), the processor's name takes their place.
    """
    listed = set(" ".join(_entries("flags")[:1] + _entries("Features")[:1]).split())
    if not listed:
        return (platform.machine(), processor_name())
    return (platform.machine(), *(name for name in (*X86_EXTENSIONS, *ARM_EXTENSIONS) if name in listed))


def _entries(key: str) -> list[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    return [value.strip() for name, _, value in (line.partition(":") for line in lines) if name.strip() == key]
