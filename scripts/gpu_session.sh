#!/bin/sh
# Everything that needs a GPU, in one command: build, tests, memory checks, kernel benches, whole rollouts.
# Usage: scripts/gpu_session.sh OUT [python]   (OUT takes the logs and JSON rows; copy what is to stay to bench/results/)
# The python must have torch >= 2.11 with CUDA, triton, pytest and hypothesis; diffusers adds its rivals and parity tests.
set -u
out=${1:?usage: scripts/gpu_session.sh OUT [python]}
python=${2:-python3}
cd "$(dirname "$0")/.." || exit 1
mkdir -p "$out"
export PYTHONUNBUFFERED=1
failed=""

step() {  # name, seconds, command...
    name=$1 limit=$2
    shift 2
    echo "== $name"
    timeout "$limit" "$@" >"$out/$name.log" 2>&1 || failed="$failed $name"
    tail -n 4 "$out/$name.log"
}

step build 300 "$python" setup.py build_ext --inplace
step info 60 "$python" -m anyflow_runtime.cli info
step tests 420 "$python" -m pytest -q -m gpu
step verify 180 "$python" -m anyflow_runtime.cli verify --device cuda --json "$out/verify.json"
if command -v compute-sanitizer >/dev/null 2>&1; then
    step sanitizer 300 compute-sanitizer --error-exitcode 1 "$python" -m anyflow_runtime.cli verify --device cuda --backend triton
fi
for bench in far_attention gated_residual_layer_norm qk_norm_rope_append rms_norm linear_gelu dual_timestep_embedding flow_map_step \
    patch_embed; do
    step "bench_$bench" 240 "$python" -m "bench.$bench"
done
step rollout_1.3B 420 "$python" -m bench.rollout --model 1.3B --steps 1 2 4 8 --json "$out/rollout_1.3B.json"
step rollout_14B 420 "$python" -m bench.rollout --model 14B --steps 1 4 --json "$out/rollout_14B.json"
if "$python" -c "import diffusers" 2>/dev/null; then
    step rivals 600 "$python" -m bench.rollout --model 1.3B --steps 4 --rivals --json "$out/rivals_1.3B.json"
fi
[ -z "$failed" ] || { echo "failed:$failed (logs in $out)"; exit 1; }
