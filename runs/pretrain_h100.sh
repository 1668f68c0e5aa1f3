#!/usr/bin/env bash
# Stage 1 of nano on one H100 with 16 cores: build shards beside the training that reads them. About ten minutes.
#   runs/pretrain_h100.sh WORK OUT [SECONDS]
set -euo pipefail
work=$1 out=$2 seconds=${3:-530}
export PYTHONPATH=src PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
mkdir -p "$work" "$out"
OMP_NUM_THREADS=1 setsid python3 -m nautile.train.packing "$work/pretrain" pretrain 260000000 --processes 9 >"$work/pretrain.log" 2>&1 &
OMP_NUM_THREADS=1 setsid python3 -m nautile.train.packing "$work/sft" sft 320000000 --processes 5 >"$work/sft.log" 2>&1 &
python3 -m nautile.cli.train pretrain --data "$work/pretrain" --out "$work/run-pretrain" --steps 5000 --seconds "$seconds"
cp "$work/run-pretrain/log.jsonl" "$out/pretrain.jsonl"
gzip -1 -c "$work/run-pretrain/weights.safetensors" | split -b 15m - "$out/pretrain.gz."
