#!/usr/bin/env bash
# Continue the shipped nano on traces and copying exercises, on one H100 with 16 cores, as a run that outlives the command
# that starts it: start it, look at it, measure what it has, end it.
#   runs/nano_practice_h100.sh build WORK practice SHARDS sft SHARDS    # in this order: exercises and traces, then traces alone
#   runs/nano_practice_h100.sh start WORK SECONDS [EXTRA TRAINING OPTIONS]
#   runs/nano_practice_h100.sh watch WORK SECONDS                 # the last lines of the log; returns early when it has ended
#   runs/nano_practice_h100.sh write WORK                         # the model, in the official layout: WORK/model
#   runs/nano_practice_h100.sh measure WORK OUT PROCESSES [OPTIONS OF nautile eval tools]
#   runs/nano_practice_h100.sh take WORK OUT                      # log, licence manifest, weights in parts of 15 MiB
# Shards (2^20 tokens each) are built beside the training that reads them. What was interrupted goes on with the same command.
set -euo pipefail
verb=$1 work=$2
shift 2
export PYTHONPATH=src PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
export TORCHINDUCTOR_CACHE_DIR=$work/inductor TRITON_CACHE_DIR=$work/triton
python=${PYTHON:-python3} nano=src/nautile/weights/nano

build() {
    local first=0 stage shards shard end
    local -a todo=("$@")
    while (($#)); do
        stage=$1 shards=$2
        shift 2
        mkdir -p "$work/mix" "$work/$stage"
        for ((shard = 0; shard < shards; shard++)); do
            for end in npz failed; do
                ln -sfn "$(printf "../$stage/shard-%05d.$end" "$shard")" "$(printf "%s/mix/shard-%05d.$end" "$work" $((first + shard)))"
            done
        done
        first=$((first + shards))
    done
    OMP_NUM_THREADS=1 PYTHON=$python setsid nohup nice -n 19 "$0" builder "$work" "${todo[@]}" >"$work/build.log" 2>&1 &
}

builder() {
    while (($#)); do
        "$python" -m nautile.train.packing "$work/$1" "$1" $(($2 << 20)) --processes "${PROCESSES:-4}" --seed 1
        shift 2
    done
}

start() {
    local seconds=$1
    shift
    setsid nohup "$python" -m nautile.cli.train practice --data "$work/mix" --out "$work/run" --init "$nano" \
        --seconds "$seconds" "$@" >"$work/train.log" 2>&1 &
    echo $! >"$work/train.pid"
}

watch() {
    local end=$((SECONDS + $1)) pid
    pid=$(cat "$work/train.pid")
    while ((SECONDS < end)) && kill -0 "$pid" 2>/dev/null; do sleep 1; done
    grep -v Warning "$work/train.log" | tail -n "${LINES_SHOWN:-12}"
    find "$work/practice" "$work/sft" -name '*.failed' 2>/dev/null | head
    find "$work/practice" "$work/sft" -name '*.npz' 2>/dev/null | wc -l
}

write() { # from the float32 checkpoint: rounded once, as in training
    rm -rf "$work/model"
    CUDA_VISIBLE_DEVICES='' "$python" -m nautile.cli.train export "$work/run/checkpoint.pt" --out "$work/model" --tokenizer "$nano"
}

measure() {
    local out=$1 processes=$2
    shift 2
    mkdir -p "$out"
    CUDA_VISIBLE_DEVICES='' OMP_NUM_THREADS=1 "$python" -m nautile.cli eval tools --model "$work/model" --in-process \
        --processes "$processes" --out "$out/eval.json" "$@" || true
}

take() {
    mkdir -p "$1"
    cp "$work/run/log.jsonl" "$1/train.jsonl"
    split -b 15m "$work/model/model.safetensors" "$1/model.safetensors."
    cp "$work/model/config.json" "$1/config.json"
    "$python" -c "from pathlib import Path; from nautile.train import corpus
corpus.write_manifest(corpus.scan(corpus.collect([])), Path('$1/corpus.json'))" # real text: the standard library alone
}

"$verb" "$@"
