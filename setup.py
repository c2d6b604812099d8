"""Builds the C++ extension `anyflow_kernels._C` with ninja through torch's machinery; metadata is in pyproject.toml.

Environment:
    ANYFLOW_NO_EXT=1   skip the extension (the patch operations then say how to build it)
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


def extension_arguments() -> dict[str, Any]:
    try:
        import torch
        from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension
    except ImportError as error:
        sys.exit(
            "anyflow-kernels: building the C++ extension needs torch in this environment. Install torch first and pass "
            f"--no-build-isolation to pip, or set ANYFLOW_NO_EXT=1 to skip the extension ({error})"
        )
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None:
        sys.exit(
            f"anyflow-kernels: no C++ compiler ({compiler!r} is not on PATH). Install one (Debian: apt install g++), "
            "name it in CXX, or set ANYFLOW_NO_EXT=1 to skip the extension"
        )

    with_cuda = torch.version.cuda is not None and CUDA_HOME is not None and bool(shutil.which(f"{CUDA_HOME}/bin/nvcc"))
    wish = os.environ.get("ANYFLOW_CUDA")
    if wish == "1" and not with_cuda:
        sys.exit(
            "anyflow-kernels: ANYFLOW_CUDA=1 needs a CUDA torch and nvcc: "
            f"torch {torch.__version__}, CUDA_HOME={CUDA_HOME}"
        )
    with_cuda = with_cuda and wish != "0"

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
    )
    return {"ext_modules": [extension], "cmdclass": {"build_ext": BuildExtension}}


setup(
    **({} if os.environ.get("ANYFLOW_NO_EXT") == "1" else extension_arguments()),
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
