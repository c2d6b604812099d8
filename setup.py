"""Builds the C++ extension `anyflow_kernels._C` with ninja through torch's machinery; metadata is in pyproject.toml.

Where it cannot be built the package is installed without it and says so: patch embedding then runs in plain PyTorch.

Environment:
    ANYFLOW_EXT=1      insist on the extension: what keeps it from being built is an error
    ANYFLOW_NO_EXT=1   skip it
    ANYFLOW_CUDA=0|1   leave the CUDA part out | insist on it; default: built where torch has CUDA and nvcc exists
    ANYFLOW_NATIVE=1   compile for this machine's processor (-march=native): the build then runs on no older one
    MAX_JOBS           parallel compile jobs
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

from setuptools import setup

PORTABLE_SOURCES = ["csrc/patch_ops.cpp", "csrc/patch_cpu.cpp"]
CUDA_SOURCES = ["csrc/patch_ops_cuda.cpp", "csrc/patch_cuda.cu"]
INSISTS = any(os.environ.get(name) == "1" for name in ("ANYFLOW_EXT", "ANYFLOW_CUDA"))


def without_extension(reason: object) -> dict[str, Any]:
    """Arguments of `setup` for a package without the extension.

    Raises:
        SystemExit: the environment insists on it.
    """
    if INSISTS:
        sys.exit(f"anyflow-kernels: the C++ extension cannot be built: {reason}")
    print(
        f"anyflow-kernels: WITHOUT its C++ extension: {reason}. Patch embedding and unpatchify will run in plain "
        "PyTorch, with more passes over the latents. To have it: install torch and a C++ compiler, then pip install "
        "--no-build-isolation; ANYFLOW_EXT=1 makes this an error",
        file=sys.stderr,
    )
    return {}


def extension_arguments() -> dict[str, Any]:
    try:
        import torch
        from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension
    except ImportError as error:
        return without_extension(f"no torch in the build environment ({error})")
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11):
        return without_extension(f"PyTorch's stable ABI needs torch 2.11, this is {torch.__version__}")
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None:
        return without_extension(f"no C++ compiler ({compiler!r} is not on PATH; Debian: apt install g++)")

    with_cuda = torch.version.cuda is not None and CUDA_HOME is not None and bool(shutil.which(f"{CUDA_HOME}/bin/nvcc"))
    wish = os.environ.get("ANYFLOW_CUDA")
    if wish == "1" and not with_cuda:
        return without_extension(
            f"ANYFLOW_CUDA=1 needs a CUDA torch and nvcc: torch {torch.__version__}, CUDA_HOME={CUDA_HOME}"
        )
    with_cuda = with_cuda and wish != "0"

    class OptionalBuild(BuildExtension):
        def run(self) -> None:
            try:
                super().run()
            except Exception as error:
                without_extension(error)

    # Stable ABIs, so that one build serves every Python (it uses nothing but module creation) and every torch.
    macros = [("Py_LIMITED_API", "0x030A0000"), ("TORCH_TARGET_VERSION", "0x020B000000000000")]
    if with_cuda:
        macros += [("ANYFLOW_WITH_CUDA", "1"), ("USE_CUDA", "1")]
    flags = ["-O3", "-fvisibility=hidden"]
    if os.environ.get("ANYFLOW_NATIVE") == "1":
        flags.append("-march=native")
    extension = (CUDAExtension if with_cuda else CppExtension)(
        name="anyflow_kernels._C",
        sources=PORTABLE_SOURCES + (CUDA_SOURCES if with_cuda else []),
        depends=[str(path) for path in sorted(Path("csrc").glob("*.h"))],
        define_macros=macros,
        extra_compile_args={"cxx": flags, "nvcc": ["-O3"]},
        py_limited_api=True,
        optional=not INSISTS,
    )
    return {"ext_modules": [extension], "cmdclass": {"build_ext": OptionalBuild}}


setup(
    **({} if os.environ.get("ANYFLOW_NO_EXT") == "1" else extension_arguments()),
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
