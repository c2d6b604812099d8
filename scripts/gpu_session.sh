#!/bin/sh
# Everything that needs a GPU, in one command: build, tests, memory checks, kernel benches, whole rollouts.
# Usage: scripts/gpu_session.sh OUT [python] [check|kernels|rollouts|training|all]
# OUT takes the logs and JSON rows; copy what is to stay to bench/results/. Each part fits a ten-minute call by itself.
# The python must have torch >= 2.11 with CUDA, triton, pytest and hypothesis; diffusers adds its rivals and parity tests.
set -u
out=${1:?usage: scripts/gpu_session.sh OUT [python] [check|kernels|rollouts|training|all]}
python=${2:-python3}
part=${3:-all}
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

step build 240 "$python" setup.py build_ext --inplace
case $part in check | all)
    step info 60 "$python" -m anyflow_runtime.cli info --launch-configs
    step triton_tests 240 "$python" -m pytest -q tests/test_far_attention_triton.py tests/test_far_attention_gluon.py \
        tests/test_gated_residual_layer_norm_triton.py tests/test_qk_norm_rope_append_triton.py tests/test_rms_norm_triton.py \
        tests/test_linear_gelu_triton.py tests/test_dual_timestep_embedding_triton.py tests/test_flow_map_step_triton.py \
        tests/test_models_triton.py tests/test_streaming_launches.py
    step gpu_tests 180 "$python" -m pytest -q -m gpu
    step verify 120 "$python" -m anyflow_runtime.cli verify --device cuda --json "$out/verify.json"
    if command -v compute-sanitizer >/dev/null 2>&1; then
        step sanitizer 240 compute-sanitizer --error-exitcode 1 \
            "$python" -m anyflow_runtime.cli verify --device cuda --backend triton --shapes tiny
    fi
    ;;
esac
case $part in kernels | all)
    for bench in far_attention gated_residual_layer_norm qk_norm_rope_append rms_norm linear_gelu dual_timestep_embedding \
        flow_map_step patch_embed unpatchify; do
        step "bench_$bench" 200 "$python" -m "bench.$bench" --json "$out/$bench.json"
    done
    ;;
esac
case $part in rollouts | all)
    step rollout_1.3B 200 "$python" -m bench.rollout --model 1.3B --steps 1 2 4 8 --json "$out/rollout_1.3B.json"
    step rollout_14B 200 "$python" -m bench.rollout --model 14B --steps 1 4 --json "$out/rollout_14B.json"
    if "$python" -c "import diffusers" 2>/dev/null; then
        step rivals 400 "$python" -m bench.rollout --model 1.3B --steps 4 --rivals --json "$out/rivals_1.3B.json"
    fi
    ;;
esac
case $part in training | all)
    step training_step 300 "$python" -m bench.training_step --json "$out/training_step.json"
    if "$python" -c "import diffusers" 2>/dev/null; then
        step vae_decode 200 "$python" -m bench.vae_decode --height 480 --width 832 --dtype bfloat16 --json "$out/vae_decode.json"
    fi
    ;;
esac
[ -z "$failed" ] || { echo "failed:$failed (logs in $out)"; exit 1; }
