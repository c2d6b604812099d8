#!/usr/bin/env bash
# Trains what the README says of the demo: for each seed the flow-map model, plain flow matching of the same budget from
# the same base, and on-policy distillation; then measures all of them. A seed keeps one core busy for about 90 minutes.
#
#     scripts/train_demo.sh OUT [PYTHON] [SEED ...]
#
# Run again, it continues. The shipped weights are OUT/seed-0/on-policy/model.
set -euo pipefail
OUT=${1:?directory for the runs}
PYTHON=${2:-.venv/bin/python}
SEEDS=("${@:3}")
[[ ${#SEEDS[@]} -gt 0 ]] || SEEDS=(0 1)
export OMP_NUM_THREADS=1

train_seed() {
  local seed=$1 run=$OUT/seed-$1 train="$PYTHON -m anyflow_runtime.cli train"
  $train demo --set seed="$seed" --out "$run/flow-map"
  # The base is shared, what follows draws fresh data.
  $train demo-flow-matching --set seed=$((1000 + seed)) --set model.path="$run/flow-map/phase-0-flow_matching" \
    --out "$run/flow-matching"
  $train demo-on-policy --set seed=$((2000 + seed)) --set model.path="$run/flow-map/model" \
    --set model.teacher="$run/flow-matching/model" --out "$run/on-policy"
  local models=()
  for method in flow-map flow-matching on-policy; do models+=(--model "$method=$run/$method/model"); done
  "$PYTHON" -m bench.any_step measure --seed "$seed" --json "$run/any_step.json" "${models[@]}"
}

processes=() results=()
for seed in "${SEEDS[@]}"; do
  mkdir -p "$OUT/seed-$seed"
  train_seed "$seed" 2>> "$OUT/seed-$seed/train.log" &
  processes+=($!) results+=("$OUT/seed-$seed/any_step.json")
done
for process in "${processes[@]}"; do wait "$process"; done
"$PYTHON" -m bench.any_step report "${results[@]}" --plot "$OUT/any_step.png"
