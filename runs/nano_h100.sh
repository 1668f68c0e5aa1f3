#!/usr/bin/env bash
# Nano's weights on one H100 with 16 cores, in one command of ten minutes: shards are built beside the training that reads
# them, first the pretraining mix, then tool traces, under one schedule and one compilation.
#   runs/nano_h100.sh WORK OUT [SECONDS] [PRETRAIN_SHARDS] [SFT_SHARDS] [EXTRA TRAINING OPTIONS]
# Leaves WORK/run/weights.safetensors; OUT gets the log, the licence manifest and the weights in parts of 15 MiB.
set -euo pipefail
work=$1 out=$2 seconds=${3:-545} pretrain=${4:-40} sft=${5:-200}
shift 5 || shift $#
export PYTHONPATH=src PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
processes=${PROCESSES:-13}
mkdir -p "$work/mix" "$out"
(
    export OMP_NUM_THREADS=1
    nice -n 10 ${PYTHON:-python3} -m nautile.train.packing "$work/pretrain" pretrain $((pretrain << 20)) --processes "$processes"
    nice -n 10 ${PYTHON:-python3} -m nautile.train.packing "$work/sft" sft $((sft << 20)) --processes "$processes"
) >"$work/build.log" 2>&1 &
for ((shard = 0; shard < pretrain + sft; shard++)); do
    for end in npz failed; do
        if ((shard < pretrain)); then from=$(printf pretrain/shard-%05d.$end "$shard"); else from=$(printf sft/shard-%05d.$end $((shard - pretrain))); fi
        ln -sfn "$(realpath "$work")/$from" "$(printf "%s/mix/shard-%05d.$end" "$work" "$shard")"
    done
done
${PYTHON:-python3} -m nautile.cli.train pretrain --data "$work/mix" --out "$work/run" --steps 6000 --seconds "$seconds" "$@"
cp "$work/run/log.jsonl" "$out/train.jsonl"
cp "$work/pretrain/corpus.json" "$out/corpus.json" || true
gzip -1 -c "$work/run/weights.safetensors" | split -b 15m - "$out/weights.gz."
kill %1 2>/dev/null || true
