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
# What torch's own build defines for every .cu file.
defines="-D__CUDA_NO_HALF_OPERATORS__ -D__CUDA_NO_HALF_CONVERSIONS__"
defines="$defines -D__CUDA_NO_BFLOAT16_CONVERSIONS__ -D__CUDA_NO_HALF2_OPERATORS__"
known=$("$nvcc" --list-gpu-arch)
targets=""
names=""
for arch in 80 90 100; do
    if echo "$known" | grep -qx "compute_$arch"; then
        targets="$targets -gencode arch=compute_$arch,code=sm_$arch"
        names="$names sm_$arch"
    else
        echo "CUDA sources: sm_$arch skipped: this nvcc does not know it"
    fi
done
for source in csrc/*.cu; do
    # shellcheck disable=SC2086
    "$nvcc" -std=c++17 -O3 -Xcompiler -Wall --Werror all-warnings $defines $targets -c "$source" -o "$build/kernels.o"
    echo "$source: compiles for$names"
done
# The glue needs headers of torch's stable ABI alone, which any build of torch has.
stable="-DUSE_CUDA -DTORCH_TARGET_VERSION=0x020B000000000000"
include=$("${1:-python3}" -c '
from torch.utils.cpp_extension import include_paths
print(*("-isystem " + path for path in include_paths()))')
for source in csrc/*_cuda.cpp; do
    # shellcheck disable=SC2086
    "$nvcc" -std=c++20 -Xcompiler -Wall -DANYFLOW_WITH_CUDA $stable $include -c "$source" -o "$build/glue.o"
    echo "$source: compiles against the stable ABI of this torch"
done
