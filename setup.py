"""Finds what setuptools cannot: packages of three folders under one name, and the C sources of the kernels.

All other facts of the distribution stand in pyproject.toml. packaging/wheels.py reads LIBRARY.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

FOLDERS = ("runtime", "graphs", "export")
KERNELS = Path("runtime/kernels")
ENTRY = "entry"  # runtime/entry is the package `satchel` itself: __init__ and __main__
SWITCH, OFF = "SATCHEL_KERNELS", "off"  # the same disables the kernels when satchel runs

LIBRARY = Extension(
    "satchel.runtime.kernels._library",
    sources=sorted(map(str, [*KERNELS.glob("*.c"), *KERNELS.glob("isa/*.c")])),
    depends=sorted(map(str, [*KERNELS.rglob("*.h"), *KERNELS.glob("vector/*.c")])),
    # No fused multiply-add but where the code says so: a row gets the same result alone and in a batch.
    extra_compile_args=["-O3", "-g0", "-std=gnu11", "-fvisibility=hidden", "-ffp-contract=off"],
    libraries=["m", "pthread"],
    optional=True,  # without a C compiler satchel installs all the same
)


class BuildAtOnce(build_ext):
    """Compiles as many sources at once as there are processors: each instruction set takes half a minute."""

    def build_extension(self, ext: Extension) -> None:
        """Build an extension, with a compiler that takes its sources one by one, in threads."""
        compile_sources = self.compiler.compile

        def compile_at_once(sources: list[str], **options: object) -> list[str]:
            with ThreadPoolExecutor(os.cpu_count()) as threads:
                made = list(threads.map(lambda source: compile_sources([source], **options), sources))
            return [path for paths in made for path in paths]

        self.compiler.compile = compile_at_once
        super().build_extension(ext)


if __name__ == "__main__":
    setup(
        packages=[
            "satchel",
            *(f"satchel.{top}" for top in FOLDERS),
            *(f"satchel.{top}.{sub}" for top in FOLDERS for sub in find_packages(top, exclude=[ENTRY])),
        ],
        package_dir={"satchel": f"runtime/{ENTRY}", **{f"satchel.{top}": top for top in FOLDERS}},
        cmdclass={"build_ext": BuildAtOnce},
        ext_modules=[] if os.environ.get(SWITCH) == OFF else [LIBRARY],
    )
