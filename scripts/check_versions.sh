#!/bin/sh
# Every Triton kernel with other versions of Triton: the interpreter's tests, and compiled for every GPU with launch rows.
# Usage: scripts/check_versions.sh PYTHON [VERSION ...]   "pinned": PYTHON's own; "newest": of the package index
# Environment: TORCH=2.11.0 adds that torch, which brings its Triton (on x86-64 a CUDA build: 3 GB from PyPI), and the
# C++ extension as the pinned torch built it;
# PROCESSES run at a time (default 2); PYTEST_ARGS and AOT_ARGS narrow the checks.
# Each version is a folder of .versions/, made once, whose packages come before PYTHON's.
set -u
python=${1:?usage: scripts/check_versions.sh PYTHON [VERSION ...]}
shift
cd "$(dirname "$0")/.." || exit 1
python=$PWD/$python
mkdir -p .versions
[ $# -gt 0 ] || set -- 3.6.0 pinned newest
failed=0

install() {  # folder, pip's arguments...
    folder=$PWD/.versions/$1
    shift
    [ -d "$folder" ] || { "$python" -m pip install --quiet --disable-pip-version-check --target "$folder.partial" "$@" &&
        mv "$folder.partial" "$folder"; }
}

check() (  # name, the folder with its packages
    export PYTHONPATH="$2:$PWD" status=0
    log=$PWD/.versions/$1
    versions=$("$python" -c 'import torch, triton; print("triton", triton.__version__, "torch", torch.__version__)')
    # shellcheck disable=SC2086
    "$python" -m pytest -q -p no:cacheprovider -n "${PROCESSES:-2}" tests/test_*_triton.py \
        tests/test_far_attention_gluon.py ${PYTEST_ARGS:-} > "$log.tests.log" 2>&1 || status=1
    # shellcheck disable=SC2086
    "$python" -m anyflow_kernels.aot --check --processes "${PROCESSES:-2}" ${AOT_ARGS:-} > "$log.aot.log" 2>&1 || status=1
    echo "$versions | $(tail -n 1 "$log.tests.log") | $(tail -n 1 "$log.aot.log")"
    exit $status
)

for version in "$@"; do
    [ "$version" != newest ] || version=$("$python" -m pip index versions triton 2> /dev/null | sed -n '1s/.*(\(.*\))/\1/p')
    case $version in
    pinned) ;;
    3.6.*) install "triton-$version" --no-deps "triton==$version" "numpy<2.4" || exit 1 ;; # its interpreter needs it
    *) install "triton-$version" --no-deps "triton==$version" || exit 1 ;;
    esac
    check "triton-$version" "$PWD/.versions/triton-$version" || failed=1
done
if [ -n "${TORCH:-}" ]; then
    install "torch-$TORCH" "torch==$TORCH" || exit 1
    PYTEST_ARGS="tests/test_patch_embed.py ${PYTEST_ARGS:-}" check "torch-$TORCH" "$PWD/.versions/torch-$TORCH" || failed=1
fi
exit $failed
