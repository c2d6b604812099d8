#!/bin/sh
# The wheel of dist/: built with the extension, audited, installed beside the pinned torch in an environment that is
# thrown away, and tried from another directory. Where PIP_FIND_LINKS or PIP_INDEX_URL offer no CPU build of torch this
# downloads the CUDA one. Usage: scripts/check_wheel.sh PYTHON   (an environment with torch, setuptools, ninja)
set -eu
cd "$(dirname "$0")/.."
root=$PWD
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_QUIET=1
unset PYTHONPATH

rm -rf dist build/bdist.* build/lib*
ANYFLOW_EXT=1 "$1" -m pip wheel --no-build-isolation --no-deps --wheel-dir dist .
wheel=$(echo "$root"/dist/anyflow_kernels-*-abi3-*.whl)
"$1" -m venv "$scratch/tools"
"$scratch/tools/bin/pip" install auditwheel torch-abi-audit
"$1" -m zipfile --extract "$wheel" "$scratch/unpacked"
"$scratch/tools/bin/torch-abi-audit" --verbose --check both "$scratch/unpacked/anyflow_kernels/_C.abi3.so"
# Not `auditwheel repair`: libtorch and libc10 must be those of the torch it is installed beside.
"$scratch/tools/bin/auditwheel" show "$wheel"

"$1" -m venv "$scratch/env"
"$scratch/env/bin/pip" install --constraint constraints.txt "$wheel[video]"
cd "$scratch"
"$scratch/env/bin/anyflow" info | tee info
grep -q "extension   built" info
"$scratch/env/bin/anyflow" generate --model demo "a red circle moves right over black" --steps 1 --out video.mp4
echo "$wheel: works from another directory"
