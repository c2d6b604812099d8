#!/bin/sh
# What only a GPU can say: builds, tests, memory checks and benches, in parts of at most nine minutes on 16 cores.
# Usage: scripts/gpu_session.sh OUT [PYTHON] [PART ...] [--resume FOLDER] [--within SECONDS]; see gpu_session.py
out=${1:?usage: scripts/gpu_session.sh OUT [PYTHON] [PART ...], parts: scripts/gpu_session.py --help}
python=${2:-python3}
shift "$(($# < 2 ? $# : 2))"
exec "$python" "$(dirname "$0")/gpu_session.py" "$out" --python "$python" "$@"
