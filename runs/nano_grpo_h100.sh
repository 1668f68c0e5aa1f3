#!/usr/bin/env bash
# Reinforcement of the shipped nano on requests in words that supervised training did not compose: rollouts by seven processes
# with native kernels in real function sandboxes on the CPU cores, updates on the GPU; one command on one H100 with 16 cores,
# under nine minutes. Everything of use is in OUT as soon as it exists.
#   runs/nano_grpo_h100.sh WORK OUT [SECONDS]      # of the steps; measuring before and after takes a minute or so each
# KIT: the directory of runs/sandbox_kit.sh, for a machine without bubblewrap; without a sandbox that works nothing is run.
# Expected: 16 to 25 samples a second (2.4 measured on two contended cores of 16), so a step of 28 groups of 14 in some 25 s,
# 12 to 15 steps; two groups in five have both outcomes (docs/rl.md).
# Bar: the interval of "gain" for the practised words above 0, and >= 5 points. Stop rules: the difference of training and rollout
# (difference_max, printed with each step) above 0.05 means that the two do not compute the same network; a reward that falls for
# four steps means that the rate is too high (run again with LR=2e-4 in another WORK).
set -uo pipefail
work=$1 out=$2 seconds=${3:-300}
here=$(cd "$(dirname "$0")/.." && pwd)
export PYTHON=${PYTHON:-python3} PYTHONPATH=$here/src${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
nano=${NANO:-$here/src/nautile/weights/nano}
mkdir -p "$work" "$out"
say() { echo "[$SECONDS s] $*"; }

options=()
if [[ -n ${KIT:-} ]]; then
    found=$("$here/runs/sandbox_kit.sh" install "$KIT") || { say "no sandbox: $found"; exit 1; }
    say "$found"
    [[ $found != *--unenforced-limits* ]] || options=(--unenforced-limits)
fi
"$PYTHON" -c "from nautile.kernels.native.build import library_path; print(library_path())" # compiled once, for all workers
(while sleep 20; do # weights and log leave while it runs
    [[ -e $work/model/model.safetensors ]] && split -b 15m "$work/model/model.safetensors" "$work/weights." && mv "$work"/weights.* "$out/"
    cp "$work/run/log.jsonl" "$work/before.json" "$out/" 2>/dev/null
done) &
leaving=$!
trap 'kill $leaving 2>/dev/null' EXIT
"$PYTHON" "$here/bench/grpo_gain.py" "$work" --init "$nano" --seconds "$seconds" --lr "${LR:-4e-4}" --device "${DEVICE:-cuda}" \
    --workers "${WORKERS:-7}" --threads "${THREADS:-2}" --seeds "${SEEDS:-40}" --groups "${GROUPS_A_STEP:-28}" \
    --samples "${SAMPLES:-14}" "${options[@]}" --out "$out/grpo_gain.json" 2>&1 | grep -v Warning
status=${PIPESTATUS[0]}
split -b 15m "$work/model/model.safetensors" "$out/weights." && say "weights are out"
cp "$work/run/log.jsonl" "$out/" 2>/dev/null
tail -n 40 "$work/run/trajectories.jsonl" | gzip >"$out/trajectories.jsonl.gz"
CUDA_VISIBLE_DEVICES='' OMP_NUM_THREADS=1 timeout 60 "$PYTHON" -m nautile.cli eval tools --model "$work/model" --in-process \
    --processes "${MEASURERS:-14}" --first-seed 20000000 --seeds "${TASKS:-8}" --out "$work/tools.json" 2>&1 | tail -n 3 # nothing forgotten?
cp "$work/tools.json" "$out/" 2>/dev/null
say "done, exit status $status"
exit "$status"
