"""Builds the native floor: ``_C`` (kernels, libtorch stable ABI) and ``_host`` (block plans, pybind11, no tensors).

Everything else about the package stands in pyproject.toml. Variables:

ITM_NATIVE=0   install pure Python (the floors reference and eager); default 1
ITM_CUDA=1     demand CUDA kernels: an error, since this version has none; default: built when there are any
MAX_JOBS       compile jobs; torch's own variable
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from setuptools import Extension, setup

ROOT = Path(__file__).parent
SOURCES = json.loads((ROOT / "csrc" / "sources.json").read_text())
TORCH_TARGET = (2, 11)  # the oldest torch whose stable ABI the library is bound to

# GNU extensions are needed for vector types. No -ffast-math: NaN and infinity must travel. The two flags that remain
# let the compiler vectorise square roots and selections, which set errno and raise flags that nobody reads.
COMPILE = ["-std=c++20", "-O3", "-g0", "-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wno-psabi"]


def flag(name: str) -> bool | None:
    value = os.environ.get(name)
    if value in (None, ""):
        return None
    if value not in ("0", "1"):
        raise SystemExit(f"{name} must be 0 or 1, got {value!r}")
    return value == "1"


def paths(library: str) -> list[str]:
    return [f"csrc/{source}" for source in SOURCES[library]]


def native_build() -> dict:
    try:
        import pybind11
        from torch.utils.cpp_extension import BuildExtension, include_paths, library_paths
    except ImportError as error:
        raise SystemExit(
            f"building the native floor needs {error.name} in this environment: install torch, ninja and pybind11 "
            "first, then `pip install --no-build-isolation -e .`; or set ITM_NATIVE=0 for pure Python"
        ) from error
    depends = [f"csrc/{header}" for header in SOURCES["headers"]]
    target = "0x{:02x}{:02x}000000000000".format(*TORCH_TARGET)
    version = ".".join(map(str, TORCH_TARGET))
    kernels = Extension(
        "itm_kernels.native._C",
        paths("_C"),
        include_dirs=include_paths(),
        library_dirs=library_paths(),
        libraries=["c10", "torch", "torch_cpu"],
        define_macros=[("TORCH_TARGET_VERSION", target), ("Py_LIMITED_API", "0x030A0000")],
        extra_compile_args=COMPILE,
        depends=depends,
        language="c++",
        py_limited_api=True,
    )
    host = Extension(
        "itm_kernels.native._host",
        paths("_host"),
        include_dirs=[pybind11.get_include()],
        define_macros=[("ITM_TORCH_TARGET", f'"{version}"')],
        extra_compile_args=[*COMPILE, "-fvisibility=hidden"],
        depends=depends,
        language="c++",
    )
    print(f"itm_kernels: building the CPU kernels and the host module against torch >= {version}")
    return {"ext_modules": [kernels, host], "cmdclass": {"build_ext": BuildExtension}}


if flag("ITM_CUDA"):
    raise SystemExit("ITM_CUDA=1: this version of itm_kernels has no CUDA kernels; on a GPU the eager floor runs")
if flag("ITM_NATIVE") is False:
    print("itm_kernels: ITM_NATIVE=0, installing pure Python without the native floor")
    setup()
else:
    setup(**native_build())
