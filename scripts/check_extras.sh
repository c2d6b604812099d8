#!/bin/sh
# The package with no extra and with each one alone, in environments of their own, each tried from another directory.
# Usage: scripts/check_extras.sh PYTHON [core | EXTRA ...]   default: all but docs and dev, which `make` installs itself
# The core, with torch, is installed once and hard-linked for each extra; pip replaces files, it does not write into them.
# Without the C++ extension, so that what stands in for it is tried too.
set -u
cd "$(dirname "$0")/.." || exit 1
root=$PWD
python=$root/$1
shift
[ $# -gt 0 ] || set -- core diffusers hub lora video serve bench
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_QUIET=1 PIP_CONSTRAINT="$root/constraints.txt" PYTHONWARNINGS=ignore
unset PYTHONPATH
words="a red circle moves right over black"

anyflow() { "$env/bin/python" -m anyflow_runtime.cli "$@"; }

train() { # two steps, with further settings in JSON
    echo "{\"recipe\": \"demo-flow-matching\", \"phases\": [{\"objective\": \"flow_matching\", \"iterations\": 2, \"lr\": 0.001}],
        \"sample_every\": null, \"plot\": false $1}" > train.json
    anyflow train train.json --out run
}

try() {
    case $1 in
    core)
        anyflow info && anyflow verify --only patch_embed unpatchify linear_gelu &&
            train "" &&
            "$env/bin/python" -c "from anyflow_runtime import *; print(len(list(stream(open_model('demo'), '$words'))))"
        ;;
    diffusers) "$env/bin/python" "$root/examples/drop_in.py" --steps 1 --height 32 --width 32 ;;
    hub) # a repository in its cache, which is all that can be tried without a network
        cached=hf/hub/models--someone--demo
        mkdir -p $cached/refs $cached/snapshots && printf 0 > $cached/refs/main &&
            cp -r "$root/anyflow_runtime/demo" $cached/snapshots/0 && HF_HOME=$PWD/hf HF_HUB_OFFLINE=1 "$env/bin/python" -c "
from anyflow_runtime import open_model, stream
print(len(list(stream(open_model('someone/demo'), '$words'))))"
        ;;
    lora) train ', "lora": {"rank": 2}' ;;
    video) anyflow generate --model demo "$words" --out x.mp4 && anyflow generate --model demo "$words" --out x.gif ;;
    serve) "$env/bin/python" -c "
import re, subprocess, sys, urllib.request
command = [sys.executable, '-m', 'anyflow_runtime.cli', 'serve', '--model', 'demo', '--port', '0']
with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
    try:
        url = next(found[0] for line in server.stdout if (found := re.search(r'http://\S+', line)))
        assert b'<html' in urllib.request.urlopen(url, timeout=60).read()
    finally:
        server.terminate()" ;;
    bench) cd "$root" && "$env/bin/python" -m bench.rms_norm --tiny --plot "$OLDPWD/x.png" ;;
    *) echo "extra: got $1" && false ;;
    esac
}

(ANYFLOW_NO_EXT=1 "$python" -m pip wheel --no-build-isolation --no-deps --wheel-dir "$scratch" . &&
    "$python" -m venv "$scratch/base" && "$scratch/base/bin/python" -m pip install "$scratch"/*.whl) || exit 1
failed=0
for extra in "$@"; do
    env=$scratch/$extra
    mkdir "$env.here" && cd "$env.here" && cp -al "$scratch/base" "$env" || exit 1
    [ "$extra" = core ] || "$env/bin/python" -m pip install "$(echo "$scratch"/*.whl)[$extra]" || exit 1
    if (try "$extra") > log 2>&1; then echo "$extra: works"; else
        failed=1
        echo "$extra: FAILED" && tail -n 20 log
    fi
    rm -rf "$env"
done
exit $failed
