"""Finds what setuptools cannot: packages of three folders under one name, and the C sources of the kernels.

All other facts of the distribution stand in pyproject.toml.
"""

from pathlib import Path

from setuptools import Extension, find_packages, setup

FOLDERS = ("runtime", "graphs", "export")
KERNELS = Path("runtime/kernels")

setup(
    packages=[f"satchel.{name}" for top in FOLDERS for name in (top, *(f"{top}.{sub}" for sub in find_packages(top)))],
    package_dir={f"satchel.{top}": top for top in FOLDERS},
    ext_modules=[
        Extension(
            "satchel.runtime.kernels._library",
            sources=sorted(map(str, KERNELS.glob("*.c"))),
            depends=sorted(map(str, KERNELS.glob("*.h"))),
            # No fused multiply-add but where the code says so: a row gets the same result alone and in a batch.
            extra_compile_args=["-O3", "-std=gnu11", "-fvisibility=hidden", "-ffp-contract=off"],
            # The library stays loaded: thread-local memory is freed by code in it when a thread ends.
            extra_link_args=["-Wl,-z,nodelete"],
            libraries=["m", "pthread"],
            optional=True,  # without a C compiler satchel installs all the same
        )
    ],
)
