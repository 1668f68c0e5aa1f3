#!/usr/bin/env bash
# Continue the shipped nano on composed requests, then on long rows with a trained indexer: one command on one H100 with 16
# cores, about nine and a half minutes. Everything of use is in OUT as soon as it exists.
#   runs/nano_wordings_h100.sh WORK OUT [SECONDS SECONDS SECONDS]     # of main training, of the indexer alone, of long rows
# 1. practice: rows of 2,048, compiled.  2. its weights leave and are measured on idle cores.  3. the indexer alone, dense
# attention over rows of 16,384, eager.  4. everything, sparse, on long rows.  5. those weights leave too.
set -uo pipefail
work=$1 out=$2 main=${3:-375} indexer=${4:-40} long=${5:-55}
here=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3} nano=${NANO:-$here/src/nautile/weights/nano}
practice_shards=${PRACTICE_SHARDS:-125} long_shards=${LONG_SHARDS:-12} length=${LENGTH:-16384} builders=${BUILDERS:-6}
shard_tokens=$((1 << 20)) # what packing.py writes at a time
export PYTHONPATH=$here/src${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
export TORCHINDUCTOR_CACHE_DIR=$work/inductor TRITON_CACHE_DIR=$work/triton
mkdir -p "$work" "$out"
say() { echo "[$SECONDS s] $*"; }

build() {
    "$python" -m nautile.train.packing "$work/practice" practice $((practice_shards * shard_tokens)) --processes "$builders" --seed 2
    "$python" -m nautile.train.packing "$work/long" long $((long_shards * shard_tokens)) --sequence-length "$length" \
        --processes "$builders" --seed 2
}

train() { "$python" -m nautile.cli.train "$@"; }

write() { # NAME RUN: the model of a run in the official layout, and its weights in parts that may leave
    CUDA_VISIBLE_DEVICES='' train export "$work/$2/checkpoint.pt" --out "$work/model-$1" --tokenizer "$nano" &&
        split -b 15m "$work/model-$1/model.safetensors" "$out/$1.safetensors."
}

measure() { # a first look at the main model, on seeds that are not the published ones
    local arguments=(--model "$work/model-main" --in-process --processes 12 --first-seed 20000000)
    CUDA_VISIBLE_DEVICES='' OMP_NUM_THREADS=1 timeout 75 nice "$python" -m nautile.cli eval tools "${arguments[@]}" \
        --held-out-wording --seeds 8 --out "$work/wording.json" >"$work/wording.txt" 2>&1
    CUDA_VISIBLE_DEVICES='' OMP_NUM_THREADS=1 timeout 60 nice "$python" -m nautile.cli eval tools "${arguments[@]}" \
        --kinds count_lines,find_definition,lookup_value --seeds 40 --out "$work/demo.json" >"$work/demo.txt" 2>&1
}

OMP_NUM_THREADS=1 nice -n 19 bash -c "$(declare -f build); practice_shards=$practice_shards long_shards=$long_shards \
    shard_tokens=$shard_tokens length=$length builders=$builders python=$python work=$work; build" >"$work/build.log" 2>&1 &
builder=$!
(CUDA_VISIBLE_DEVICES='' nice -n 19 "$python" -c "from nautile.kernels.native.build import library_path
print(library_path())" >"$work/native.log" 2>&1) & # compiled once, before twelve processes want it
train practice --data "$work/practice" --out "$work/run" --init "$nano" --seconds "$main" --peak-lr 2.5e-3 ${MAIN_OPTIONS:-} \
    >"$work/train.log" 2>&1
say "main training ended"; tail -n 3 "$work/train.log"
cp "$work/run/log.jsonl" "$out/train.jsonl"
find "$work" -name '*.failed' | head -n 5; find "$work" -name 'shard-*.npz' | wc -l
write main run; say "main weights are out"
measure & measuring=$!
train long --indexer-only --data "$work/long" --length "$length" --out "$work/indexer" --init "$work/run/checkpoint.pt" \
    --seconds "$indexer" ${LONG_OPTIONS:-} >"$work/indexer.log" 2>&1
say "indexer trained"; tail -n 4 "$work/indexer.log"
train long --data "$work/long" --length "$length" --out "$work/longer" --init "$work/indexer/checkpoint.pt" --first-shard 4 \
    --seconds "$long" ${LONG_OPTIONS:-} >"$work/longer.log" 2>&1
say "long rows done"; tail -n 4 "$work/longer.log"
write long longer; say "long weights are out"
for stage in indexer longer; do cat "$work/$stage/log.jsonl" 2>/dev/null; done >"$out/long.jsonl"
kill "$builder" 2>/dev/null
wait "$measuring"
tail -n 20 "$work/native.log" "$work/wording.txt" "$work/demo.txt" | grep -v Warning
cat "$work"/{wording,demo}.jsonl >"$out/measured.jsonl" 2>/dev/null
"$python" -c "from pathlib import Path; from nautile.train import corpus
corpus.write_manifest(corpus.scan(corpus.collect([])), Path('$out/corpus.json'))" # real text: the standard library alone
nvidia-smi --query-gpu=name,memory.used --format=csv,noheader 2>/dev/null
say done
