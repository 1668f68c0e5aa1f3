#!/usr/bin/env bash
# Everything that waits for a card, on a fresh machine with one, in calls of nine minutes at most:
#   runs/gpu_check.sh kernels|flash|more|rehearsal OUT [COMMIT] [SECONDS] [WAYS]
# Wheels in .whl (pytest and what it needs, pydantic, typer, the peers sgl-flash-mla and sgl-deep-gemm) are installed beside
# the machine's Python first. OUT gets session.json, session.log and a file for each part; a part that fails stops no other.
set -u
mode=$1 out=$2 commit=${3:-unknown} seconds=${4:-540} ways=${5:-plain}
python=${PYTHON:-python3}
mkdir -p "$out"
if compgen -G '.whl/*.whl' >/dev/null; then
    site=$(mktemp -d)
    install() { "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$site" "$@"; }
    # One that this Python cannot take must not cost the call: the others are installed without it.
    install .whl/*.whl || for wheel in .whl/*.whl; do install "$wheel" || echo "left out: $wheel"; done
    export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
fi
exec "$python" bench/gpu_session.py "$mode" --out "$out" --commit "$commit" --seconds "$seconds" --ways "$ways"
