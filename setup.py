"""Builds the CPU kernels: one shared library, with the kernels compiled once per instruction set.

Everything else about the package is declared in pyproject.toml.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

# The oldest torch whose stable ABI is used; the library then runs on every later one.
TORCH_TARGET_VERSION = "0x020b000000000000"

# In link order: where the linker merges an inline function of the C++ library that several of them
# hold, it keeps the first, and that one has to run on every processor.
INSTRUCTION_SETS = {"generic": []}
if platform.machine() in ("x86_64", "AMD64"):
    INSTRUCTION_SETS["avx2"] = ["-march=x86-64-v3"]
    INSTRUCTION_SETS["avx512"] = ["-march=x86-64-v4", "-mprefer-vector-width=512"]

FLAGS = [
    "-std=c++17",
    "-O3",
    "-fopenmp",
    "-fno-math-errno",
    "-Wall",
    "-Wno-psabi",
    "-Wno-maybe-uninitialized",
]


def torch_folder() -> Path:
    """The installed torch, which is found under pip's build isolation as well.

    Only its headers and its library are used, and a build environment of its own would download a
    second torch for them. Isolation hides packages from `import`, not from the file system.
    """
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.origin is not None:
        return Path(spec.origin).parent
    for key in ("platlib", "purelib"):
        folder = Path(sysconfig.get_path(key)) / "torch"
        if (folder / "include").is_dir():
            return folder
    raise SystemExit(
        "vllm-delta builds against the torch that vLLM uses, and none is installed here. Install "
        "vLLM first; if it is, install this package with --no-build-isolation."
    )


class BuildKernels(build_ext):
    """Compiles csrc/cpu with the flags that each source and instruction set needs."""

    def get_ext_filename(self, fullname: str) -> str:
        """A plain name: the library is loaded by torch.ops.load_library, not imported."""
        return f"{fullname.replace('.', '/')}.so"

    def build_extension(self, ext: Extension) -> None:
        """Compile each source, once or once per instruction set, and link them."""
        torch = torch_folder()
        include_dirs = [str(torch / "include"), "csrc/cpu"]
        macros = [("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION)]

        def compile_source(source: str, folder: str, *flags: str) -> list[str]:
            return self.compiler.compile(
                [source],
                output_dir=f"{self.build_temp}/{folder}",
                include_dirs=include_dirs,
                macros=macros,
                extra_postargs=[*FLAGS, *flags],
                depends=ext.depends,
            )

        units = [
            ("csrc/cpu/attention.cpp", name, f"-DDELTA_ISA={name}", *flags)
            for name, flags in INSTRUCTION_SETS.items()
        ]
        units += [("csrc/cpu/select.cpp", "common"), ("csrc/cpu/bindings.cpp", "common")]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = [
                part for parts in pool.map(lambda unit: compile_source(*unit), units) for part in parts
            ]
        self.compiler.link_shared_object(
            objects,
            self.get_ext_fullpath(ext.name),
            library_dirs=[str(torch / "lib")],
            libraries=["torch_cpu"],
            extra_postargs=["-fopenmp"],
            target_lang="c++",
            build_temp=self.build_temp,
        )


class PlatformWheel(bdist_wheel):
    """The library does not depend on Python's version, only on the platform."""

    def get_tag(self) -> tuple[str, str, str]:
        """Any Python 3 on this platform."""
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[
        Extension(
            "vllm_delta.kernels.cpu._library",
            sources=["csrc/cpu/attention.cpp", "csrc/cpu/select.cpp", "csrc/cpu/bindings.cpp"],
            depends=["setup.py", *map(str, sorted(Path("csrc/cpu").glob("*.h")))],
        )
    ],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": PlatformWheel},
)
