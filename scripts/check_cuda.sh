#!/bin/sh
# Compiles csrc/*.cu for sm_80, sm_90 and sm_100 where nvcc is; needs neither a GPU nor a CUDA torch.
# Usage: scripts/check_cuda.sh [python of the environment with torch]
set -eu
cd "$(dirname "$0")/.."
nvcc="${CUDA_HOME:+$CUDA_HOME/bin/}nvcc"
if ! command -v "$nvcc" >/dev/null 2>&1; then
    echo "CUDA sources: skipped: no nvcc"
    exit 0
fi
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
for source in csrc/*.cu; do
    "$nvcc" -std=c++17 -O3 -Xcompiler -Wall --Werror all-warnings -c "$source" -o "$build/kernels.o" \
        -gencode arch=compute_80,code=sm_80 -gencode arch=compute_90,code=sm_90 -gencode arch=compute_100,code=sm_100
    echo "$source: compiles for sm_80, sm_90, sm_100"
done
# The glue needs torch's headers alone; the stub stands in for the one header that only a CUDA build of torch generates.
mkdir -p "$build/c10/cuda/impl"
: >"$build/c10/cuda/impl/cuda_cmake_macros.h"
include=$("${1:-python3}" -c 'from torch.utils.cpp_extension import include_paths; print(" ".join("-isystem " + p for p in include_paths()))')
for source in csrc/*_cuda.cpp; do
    # shellcheck disable=SC2086
    "$nvcc" -std=c++20 -Xcompiler -Wall -DANYFLOW_WITH_CUDA $include -isystem "$build" -c "$source" -o "$build/glue.o"
    echo "$source: compiles against this torch"
done
