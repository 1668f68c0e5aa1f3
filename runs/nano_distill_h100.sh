#!/usr/bin/env bash
# Three specialists of the shipped nano, made in 50 seconds each of supervised training on their own kinds in other words, and one
# model of them by on-policy distillation; one command on one H100 with 16 cores, about seven minutes.
#   runs/nano_distill_h100.sh WORK OUT [SECONDS SECONDS]     # of each specialist (all three at once), of distillation
# KIT as in runs/nano_grpo_h100.sh. OUT gets the student's weights in parts, distill_gain.json and the logs.
# Bar: on each specialist's kinds the student is within two points of it. Stop rule: a specialist that is not ten points over the
# base model teaches nothing worth measuring; the first lines say.
set -uo pipefail
work=$1 out=$2 teaching=${3:-50} seconds=${4:-150}
here=$(cd "$(dirname "$0")/.." && pwd)
export PYTHON=${PYTHON:-python3} PYTHONPATH=$here/src${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
nano=${NANO:-$here/src/nautile/weights/nano} shard_tokens=${SHARD_TOKENS:-$((1 << 20))} shards=${SHARDS:-6}
mkdir -p "$work" "$out"
say() { echo "[$SECONDS s] $*"; }

options=()
if [[ -n ${KIT:-} ]]; then
    found=$("$here/runs/sandbox_kit.sh" install "$KIT") || { say "no sandbox: $found"; exit 1; }
    say "$found"
    [[ $found != *--unenforced-limits* ]] || options=(--unenforced-limits)
fi
kinds() { "$PYTHON" -c "import sys; sys.path.insert(0, '$here/bench'); from distill_gain import REWORDED; print(','.join(REWORDED['$1']))"; }

specialist() { # NAME: shards, training from the shipped weights, a model directory
    OMP_NUM_THREADS=1 nice -n 19 "$PYTHON" -m nautile.train.packing "$work/$1-data" specialist $((shards * shard_tokens)) \
        --shard-tokens "$shard_tokens" --processes "${BUILDERS:-4}" --kinds "$(kinds "$1")" >"$work/$1-build.log" 2>&1 &
    "$PYTHON" -m nautile.cli.train practice --data "$work/$1-data" --out "$work/$1-run" --init "$nano" --seconds "$teaching" \
        --peak-lr 1.5e-3 --no-compile ${TRAIN_OPTIONS:-} >"$work/$1.log" 2>&1
    CUDA_VISIBLE_DEVICES='' "$PYTHON" -m nautile.cli.train export "$work/$1-run/checkpoint.pt" --out "$work/$1" --tokenizer "$nano" \
        >>"$work/$1.log" 2>&1
    say "$1:"; grep -v Warning "$work/$1.log" | tail -n 2
}

"$PYTHON" -c "from nautile.kernels.native.build import library_path; print(library_path())"
for name in files data retrieval; do specialist "$name" & done
wait
(while sleep 20; do
    [[ -e $work/model/model.safetensors ]] && split -b 15m "$work/model/model.safetensors" "$work/weights." && mv "$work"/weights.* "$out/"
done) &
leaving=$!
trap 'kill $leaving 2>/dev/null' EXIT
"$PYTHON" "$here/bench/distill_gain.py" "$work" --init "$nano" --seconds "$seconds" --device "${DEVICE:-cuda}" \
    --teacher "files=$work/files" --teacher "data=$work/data" --teacher "retrieval=$work/retrieval" \
    --workers "${WORKERS:-7}" --threads "${THREADS:-2}" --seeds "${SEEDS:-20}" --tasks "${TASKS:-28}" --samples "${SAMPLES:-4}" \
    "${options[@]}" --out "$out/distill_gain.json" 2>&1 | grep -v Warning
status=${PIPESTATUS[0]}
split -b 15m "$work/model/model.safetensors" "$out/weights." && say "weights are out"
cp "$work/run/log.jsonl" "$out/distill.jsonl" 2>/dev/null
cat "$work"/{files,data,retrieval}-run/log.jsonl >"$out/specialists.jsonl" 2>/dev/null
say "done, exit status $status"
exit "$status"
