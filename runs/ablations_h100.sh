#!/usr/bin/env bash
# Four networks of 10M parameters, three seeds each, on one H100 with 16 cores: V4, dense attention at equal FLOPs, without mHC,
# without MoE; the variants train beside each other, since one alone does not fill the card. About seven minutes.
#   runs/ablations_h100.sh WORK OUT [TOKENS]     # of a run of V4; default 15M
# Expected: two minutes of compilation for all, then some 250k tokens/s each: a minute a run. OUT/ablations.json is written anew
# whenever a seed is done, so a run that is cut short leaves what it has; bench/ablations.py says what is compared.
set -uo pipefail
work=$1 out=$2 tokens=${3:-15000000}
here=$(cd "$(dirname "$0")/.." && pwd)
export PYTHON=${PYTHON:-python3} PYTHONPATH=$here/src${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
shard_tokens=${SHARD_TOKENS:-$((1 << 20))} shards=${SHARDS:-18} seeds=${SEEDS:-3}
mkdir -p "$work" "$out"
say() { echo "[$SECONDS s] $*"; }

build() { # NAME SHARDS SEED
    OMP_NUM_THREADS=1 nice -n 19 "$PYTHON" -m nautile.train.packing "$work/$1" practice $(($2 * shard_tokens)) --seed "$3" \
        --processes "${BUILDERS:-10}" --shard-tokens "$shard_tokens"
}

(build held-out 1 99 && build rows "$shards" 7) >"$work/build.log" 2>&1 &
builder=$!
(while sleep 15; do "$PYTHON" "$here/bench/ablations.py" report "$work" --out "$out/ablations.json" >/dev/null 2>&1; done) &
reporting=$!
trap 'kill $builder $reporting 2>/dev/null' EXIT
running=()
for variant in v4 dense no_mhc no_moe; do
    TORCHINDUCTOR_CACHE_DIR=$work/inductor-$variant TRITON_CACHE_DIR=$work/triton-$variant "$PYTHON" "$here/bench/ablations.py" train \
        "$work" --variant "$variant" --data "$work/rows" --held-out "$work/held-out" --tokens "$tokens" --seeds "$seeds" \
        ${OPTIONS:-} >"$work/$variant.log" 2>&1 &
    running+=($!)
    [[ -z ${ONE_BY_ONE:-} ]] || wait "${running[-1]}" # where memory is short
done
status=0
for process in "${running[@]}"; do wait "$process" || status=1; done
for variant in v4 dense no_mhc no_moe; do say "$variant:"; grep -v Warning "$work/$variant.log" | tail -n 3; done
"$PYTHON" "$here/bench/ablations.py" report "$work" --out "$out/ablations.json"
say "done, exit status $status"
exit "$status"
