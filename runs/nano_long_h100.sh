#!/usr/bin/env bash
# Long rows for the shipped nano: 16,384 tokens, then 65,536, with sparse attention and an indexer that is warmed up before each;
# one command on one H100 80 GB with 16 cores, about eight and a half minutes. Everything of use is in OUT as soon as it exists.
#   runs/nano_long_h100.sh WORK OUT [SECONDS SECONDS SECONDS SECONDS]    # indexer 16K, everything 16K, indexer 64K, everything 64K
# Expected, from 107k and 48k tokens/s measured at 16K (bench/results/train_nano_wordings_long_h100.jsonl): 16K as measured;
# at 64K 60k tokens/s for the indexer alone, 25-30k for everything (attention over entries costs twice as much a token, each
# span is computed twice forward), some 25 GiB with spans of 4,096. First call: look at "gib" and tokens_per_second in the log.
# Stop rules: the run ends when the 16K stage leaves a loss above 0.05 (0.0001 to 0.006 was seen; the weights are damaged then);
# spans are halved when memory does not suffice; ship the weights when needles are >= 95 % at each length and the sample of tool
# tasks is within two points of before.  Needles are judged by greedy tokens in one pass (nautile.train.far), a lower bound.
set -uo pipefail
work=$1 out=$2
seconds=(${3:-25} ${4:-70} ${5:-45} ${6:-200})
here=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3} nano=${NANO:-$here/src/nautile/weights/nano}
lengths=(${LENGTHS:-16384 65536}) shards=(${SHARDS:-10 12}) shard_tokens=${SHARD_TOKENS:-$((1 << 20))} builders=${BUILDERS:-12}
span=${SPAN:-4096} far=${FAR_LENGTHS:-4096,8192,16384,32768,65536} trials=${TRIALS:-40} tasks=${TASKS:-8}
export PYTHONPATH=$here/src${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
mkdir -p "$work" "$out"
say() { echo "[$SECONDS s] $*"; }

build() {
    for stage in 0 1; do
        OMP_NUM_THREADS=1 nice -n 19 "$python" -m nautile.train.packing "$work/rows-$stage" long $((shards[stage] * shard_tokens)) \
            --sequence-length "${lengths[stage]}" --processes "$builders" --seed 5 --shard-tokens "$shard_tokens"
    done
}

train() { "$python" -m nautile.cli.train "$@"; }

long() { # NAME INIT STAGE SECONDS [OPTIONS]: one stage; with halved spans when it fails at once
    local name=$1 init=$2 stage=$3 time=$4 size=0
    shift 4
    ((stage == 0)) || size=$span
    for cut in "$size" $((size / 2)); do
        train long --data "$work/rows-$stage" --length "${lengths[stage]}" --out "$work/$name" --init "$init" --seconds "$time" \
            --span "$cut" "$@" ${STAGE_OPTIONS:-} >"$work/$name.log" 2>&1 && break
        say "$name failed with spans of $cut:"; grep -v Warning "$work/$name.log" | tail -n 4
    done
    say "$name:"; grep -v Warning "$work/$name.log" | tail -n 3
    cat "$work"/{indexer,all}-*/log.jsonl >"$out/log.jsonl" 2>/dev/null
}

leave() { # RUN: its weights in the official layout, in parts that may leave; they take the place of earlier ones
    CUDA_VISIBLE_DEVICES='' train export "$work/$1/checkpoint.pt" --out "$work/model-$1" --tokenizer "$nano" >"$work/export.log" 2>&1 &&
        split -b 15m "$work/model-$1/model.safetensors" "$work/weights." && mv "$work"/weights.* "$out/" && say "weights of $1 are out"
}

reads() { # NAME WEIGHTS TRIALS SECONDS: needles by length
    say "needles of $1:"
    "$python" -m nautile.train.far "$2" --tokenizer "$nano" --lengths "$far" --trials "$3" --span "$span" --seconds "$4" \
        --out "$out/far-$1.json" 2>&1 | grep -v Warning
}

works() { # MODEL NAME: a sample of tool tasks on the idle cores, seeds that no published figure uses
    for option in '' --held-out-wording; do
        CUDA_VISIBLE_DEVICES='' OMP_NUM_THREADS=1 timeout 75 nice "$python" -m nautile.cli eval tools --model "$1" --in-process \
            --processes "$builders" --first-seed 20000000 --seeds "$tasks" $option --out "$work/$2$option.json" >"$work/$2$option.txt" 2>&1
        say "tool tasks of $2 $option:"; tail -n 3 "$work/$2$option.txt"
    done
}

build >"$work/build.log" 2>&1 &
builder=$!
trap 'kill $builder 2>/dev/null' EXIT
[[ -z ${KIT:-} ]] || PYTHON=$python "$here/runs/sandbox_kit.sh" install "$KIT" # what the next run will need; nothing here does
reads before "$nano" $((trials / 4 + 1)) 30
long indexer-0 "$nano" 0 "${seconds[0]}" --indexer-only
long all-0 "$work/indexer-0/checkpoint.pt" 0 "${seconds[1]}" --first-shard 3
leave all-0 || exit 1
loss=$("$python" -c "import json; print(json.loads(open('$work/all-0/log.jsonl').readlines()[-1])['loss'])")
if awk -v loss="$loss" 'BEGIN { exit !(loss > 0.05) }'; then say "the loss is $loss: stopped"; [[ -n ${IGNORE_LOSS:-} ]] || exit 1; fi
long indexer-1 "$work/all-0/checkpoint.pt" 1 "${seconds[2]}" --indexer-only
long all-1 "$work/indexer-1/checkpoint.pt" 1 "${seconds[3]}" --first-shard 3
leave all-1 || exit 1
kill "$builder" 2>/dev/null
works "$work/model-all-1" after &
measuring=$!
reads after "$work/model-all-1" "$trials" 80
wait "$measuring"
cat "$work"/after*.jsonl >"$out/tools.jsonl" 2>/dev/null
find "$work" -name '*.failed' | head -n 3
nvidia-smi --query-gpu=name,memory.used --format=csv,noheader 2>/dev/null
say done
