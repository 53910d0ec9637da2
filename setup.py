"""Builds the native floor: ``_C`` (schemas, CPU kernels), ``_C_cuda`` (CUDA kernels) and ``_host`` (no tensors).

``_C`` and ``_C_cuda`` are bound to libtorch's stable ABI, ``_host`` (block plans) to pybind11. Everything else about
the package stands in pyproject.toml. Variables:

ITM_NATIVE=0          install pure Python (the floors reference, eager and triton); default 1
ITM_CUDA=1            demand CUDA kernels: what they lack is an error; 0: never; default: where torch has CUDA and a
                      toolkit of the same major version is found
CUDA_HOME             the toolkit; default: the one that `nvcc` on PATH belongs to
TORCH_CUDA_ARCH_LIST  GPUs to compile for, such as "8.0;9.0a;10.0+PTX"; default: those of this machine, else those in
                      csrc/sources.json
MAX_JOBS              compile jobs; torch's own variable
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

from setuptools import Extension, setup

ROOT = Path(__file__).parent
SOURCES = json.loads((ROOT / "csrc" / "sources.json").read_text())
CUDA = SOURCES["cuda"]
TORCH_TARGET = (2, 11)  # the oldest torch whose stable ABI the libraries are bound to

# GNU extensions are needed for vector types. No -ffast-math: NaN and infinity must travel. The two flags that remain
# let the compiler vectorise square roots and selections, which set errno and raise flags that nobody reads.
COMPILE = ["-std=c++20", "-O3", "-g0", "-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wno-psabi"]
# torch switches off the conversions of half types for every extension; kernels are written with them.
UNDO_TORCH = [f"-U__CUDA_NO_{name}__" for name in ("HALF_OPERATORS", "HALF_CONVERSIONS", "BFLOAT16_CONVERSIONS")]


def flag(name: str) -> bool | None:
    value = os.environ.get(name)
    if value in (None, ""):
        return None
    if value not in ("0", "1"):
        raise SystemExit(f"{name} must be 0 or 1, got {value!r}")
    return value == "1"


def toolkit() -> Path | None:
    """The folder of the CUDA toolkit. nvcc may be a wrapper in some other folder, so nvcc itself is asked."""
    home = os.environ.get("CUDA_HOME")
    if home:
        return Path(home) if Path(home, "bin", "nvcc").is_file() else None
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return None
    said = subprocess.run([nvcc, "--dryrun", "-c", "x.cu"], capture_output=True, text=True).stderr
    top = re.search(r"^#\$ TOP=(.+)$", said, re.MULTILINE)
    return Path(top[1].strip()).resolve() if top else None


def why_no_cuda(home: Path | None) -> str | None:
    """The reason the CUDA kernels cannot be built, or None."""
    import torch

    if torch.version.cuda is None:
        return f"this torch ({torch.__version__}) is a build without CUDA"
    if home is None:
        named = os.environ.get("CUDA_HOME")
        return f"CUDA_HOME={named} has no bin/nvcc" if named else "there is no nvcc on PATH and CUDA_HOME is not set"
    said = subprocess.run([home / "bin" / "nvcc", "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+)\.(\d+)", said)
    if release is None:
        return f"{home}/bin/nvcc does not say its version"
    if release[1] != torch.version.cuda.split(".")[0]:
        return f"the toolkit in {home} is {release[1]}.{release[2]}, torch was built with CUDA {torch.version.cuda}"
    return None


def architectures(home: Path) -> list[str]:
    """GPUs to compile for, as torch writes them."""
    import torch

    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    if listed:
        wanted = [name for name in re.split(r"[;,\s]+", listed) if name]
    elif torch.cuda.is_available():
        visible = sorted({torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())})
        wanted = [f"{major}.{minor}" for major, minor in visible]
    else:
        said = subprocess.run([home / "bin" / "nvcc", "--list-gpu-arch"], capture_output=True, text=True, check=True)
        known = said.stdout.split()
        wanted = [name for name in CUDA["architectures"] if f"compute_{number(name).rstrip('a')}" in known]
    for name in wanted:
        if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", name) or int(name.split(".")[0]) < 8:
            raise SystemExit(f"TORCH_CUDA_ARCH_LIST: each must be like 9.0a or 10.0+PTX and at least 8.0, got {name!r}")
    return wanted


def number(architecture: str) -> str:
    """``9.0a`` -> ``90a``"""
    return architecture.removesuffix("+PTX").replace(".", "")


def gencode(architecture: str) -> list[str]:
    n = number(architecture)
    flags = [f"-gencode=arch=compute_{n},code=sm_{n}"]
    return [*flags, f"-gencode=arch=compute_{n},code=compute_{n}"] if architecture.endswith("+PTX") else flags


def cuda_groups(wanted: list[str]) -> dict[str, tuple[list[str], list[str]]]:
    """Library -> its sources and architectures. Files that name their own architectures get a library of their own."""
    groups: dict[str, tuple[list[str], list[str]]] = {"_C_cuda": ([], wanted)}
    bare = {number(name).rstrip("af") for name in wanted}
    for source in (name for name in SOURCES["_C_cuda"] if name.endswith(".cu")):
        own = CUDA["files"].get(source, {}).get("architectures")
        if own is None:
            groups["_C_cuda"][0].append(source)
            continue
        built = [name for name in own if number(name).rstrip("af") in bare]
        if built:
            library = "_".join(["_C_cuda", *map(number, built)])
            groups.setdefault(library, ([], built))[0].append(source)
    return groups


def cuda_extensions(wanted: list[str], defines: list, depends: list[str]) -> list[Extension]:
    from torch.utils.cpp_extension import CUDAExtension

    plain = [name for name in SOURCES["_C_cuda"] if not name.endswith(".cu")]
    return [
        CUDAExtension(
            f"itm_kernels.native.{library}",
            [f"csrc/{source}" for source in [*plain, *sources]],
            define_macros=[*defines, ("USE_CUDA", None), ("ITM_ARCHITECTURES", f'"{" ".join(built)}"')],
            extra_compile_args={
                "cxx": COMPILE,
                "nvcc": [*CUDA["flags"], *UNDO_TORCH, *(flag for name in built for flag in gencode(name))],
            },
            depends=depends,
            py_limited_api=True,
        )
        for library, (sources, built) in cuda_groups(wanted).items()
    ]


def native_build() -> dict:
    home = toolkit()
    if home is not None:
        os.environ["CUDA_HOME"] = str(home)  # torch reads it when cpp_extension is imported
    try:
        import pybind11
        from torch.utils.cpp_extension import BuildExtension, include_paths, library_paths
    except ImportError as error:
        raise SystemExit(
            f"building the native floor needs {error.name} in this environment: install torch, ninja and pybind11 "
            "first, then `pip install --no-build-isolation -e .`; or set ITM_NATIVE=0 for pure Python"
        ) from error
    reason = "ITM_CUDA=0" if flag("ITM_CUDA") is False else why_no_cuda(home)
    if reason is not None and flag("ITM_CUDA"):
        raise SystemExit(f"ITM_CUDA=1 demands CUDA kernels, but {reason}")
    depends = [f"csrc/{header}" for header in SOURCES["headers"]] + ["csrc/sources.json"]
    target = "0x{:02x}{:02x}000000000000".format(*TORCH_TARGET)
    version = ".".join(map(str, TORCH_TARGET))
    stable = [("TORCH_TARGET_VERSION", target), ("Py_LIMITED_API", "0x030A0000")]
    kernels = Extension(
        "itm_kernels.native._C",
        [f"csrc/{source}" for source in SOURCES["_C"]],
        include_dirs=include_paths(),
        library_dirs=library_paths(),
        libraries=["c10", "torch", "torch_cpu"],
        define_macros=stable,
        extra_compile_args=COMPILE,
        depends=depends,
        language="c++",
        py_limited_api=True,
    )
    cuda = []
    print(f"itm_kernels: building the CPU kernels and the host module against torch >= {version}")
    if home is not None and reason is None:
        wanted = architectures(home)
        cuda = cuda_extensions(wanted, stable, depends)
        print(f"itm_kernels: building the CUDA kernels for {' '.join(wanted)} with {home}/bin/nvcc")
    else:
        print(f"itm_kernels: no CUDA kernels: {reason}")
    host = Extension(
        "itm_kernels.native._host",
        [f"csrc/{source}" for source in SOURCES["_host"]],
        include_dirs=[pybind11.get_include()],
        define_macros=[("ITM_TORCH_TARGET", f'"{version}"'), ("ITM_NO_CUDA", f'"{reason or ""}"')],
        extra_compile_args=[*COMPILE, "-fvisibility=hidden"],
        depends=depends,
        language="c++",
    )
    return {"ext_modules": [kernels, host, *cuda], "cmdclass": {"build_ext": BuildExtension}}


if flag("ITM_NATIVE") is False:
    if flag("ITM_CUDA"):
        raise SystemExit("ITM_CUDA=1 demands CUDA kernels, but ITM_NATIVE=0 asks for pure Python")
    print("itm_kernels: ITM_NATIVE=0, installing pure Python without the native floor")
    setup()
else:
    setup(**native_build())
