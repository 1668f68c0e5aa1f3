#!/usr/bin/env bash
# The whole recipe of an agent, from text to an exported model: each stage is one command, and each goes on where it was when
# it is run again. What is done is passed over.
#   runs/nano.sh WORK                # for one H100 and some hours; not run end to end yet
#   runs/nano.sh --rehearse WORK     # every stage once at toy size, on a CPU, in minutes: do the commands fit each other?
#   runs/nano.sh --list              # the stages, without running anything
# WORK/model is the result, WORK/*/run.html the page of each agent stage. NAUTILE is the program (nautile).
set -euo pipefail
mode=run
case ${1:-} in --rehearse | --list) mode=${1#--} && shift ;; esac
work=${1:-runs/out/nano}
nautile=${NAUTILE:-nautile} here=$(cd "$(dirname "$0")/.." && pwd)
shipped=$here/src/nautile/weights/nano

size() { # FULL TOY
    if [[ $mode == rehearse ]]; then echo "$2"; else echo "$1"; fi
}

stage() { # NAME MARK COMMAND...: run a command unless its mark is there
    local name=$1 mark=$2
    shift 2
    if [[ $mode == list ]]; then
        echo "$name: $*"
    elif [[ -e $mark ]]; then
        echo "== $name: done"
    else
        echo "== $name [$SECONDS s]: $*"
        "$@"
    fi
}

export_to() { # WEIGHTS DIRECTORY
    stage "export of $1" "$2/model.safetensors" "$nautile" train export "$1" --out "$2" --tokenizer "$work/tokenizer" \
        --preset "$work/config.json"
}

vocabulary() { # and the configuration: nano's, or in a rehearsal one that a CPU trains in seconds, every mechanism on
    mkdir -p "$work/tokenizer"
    cp "$shipped"/tokenizer*.json "$work/tokenizer/"
    "${PYTHON:-python3}" - "$shipped/config.json" "$work/config.json" "$mode" <<'PY'
import json, sys
config = json.load(open(sys.argv[1]))
if sys.argv[3] == "rehearse":
    config.update(hidden_size=128, num_hidden_layers=4, num_attention_heads=2, head_dim=64, qk_rope_head_dim=32, o_groups=2,
                  o_lora_rank=128, compress_ratios=[0, 4, 128, 4, 0], index_n_heads=2, index_head_dim=32, index_topk=128,
                  n_routed_experts=4, num_experts_per_tok=2, num_hash_layers=1)
json.dump(config, open(sys.argv[2], "w"), indent=1)
PY
}

# Kinds of specialists: requests in words that supervised training does not compose, for what it has mastered teaches nothing more.
files=reworded_find_file,reworded_rename_file,reworded_count_files,reworded_largest_file,reworded_replace_text
data=reworded_lookup_value,reworded_edit_value,reworded_sum_column,reworded_count_lines
retrieval=reworded_find_definition,reworded_find_line,reworded_read_line,reworded_last_line,reworded_file_length
device=$(size cuda cpu) workers=$(size 7 1) rows=$(size 32 1)
model=(--preset "$work/config.json" --device "$device")
agent=(--qat --reply-tokens "$(size 200 16)" --turns "$(size 6 1)" --workers "$workers" --device "$device")

# 1. A vocabulary: nano's, so that scores can be compared; `nautile train tokenizer --out WORK/tokenizer` makes it anew.
stage tokenizer "$work/tokenizer/tokenizer.json" vocabulary

# 2. Pretraining, copying exercises and traces; weights are quantisation-aware from the first step.
stage pretrain "$work/pretrain/weights.safetensors" "$nautile" train pretrain --data "$work/shards/pretrain" \
    --out "$work/pretrain" --build-tokens "$(size 400000000 4096)" --steps "$(size 6000 1)" --rows "$rows" "${model[@]}"
stage practice "$work/practice/weights.safetensors" "$nautile" train practice --data "$work/shards/practice" \
    --out "$work/practice" --init "$work/pretrain/weights.safetensors" --build-tokens "$(size 300000000 4096)" \
    --steps "$(size 4500 1)" --rows "$rows" "${model[@]}"
stage sft "$work/sft/weights.safetensors" "$nautile" train sft --data "$work/shards/sft" --out "$work/sft" \
    --init "$work/practice/weights.safetensors" --build-tokens "$(size 100000000 4096)" --steps "$(size 1500 1)" --rows "$rows" \
    "${model[@]}"

# 3. Long rows, twice: the indexer alone, then everything with sparse attention.
before=$work/sft/weights.safetensors
for length in $(size "16384 65536" "1024 2048"); do
    span=$(size $((length > 16384 ? 4096 : 0)) $((length / 2)))
    stage "indexer $length" "$work/indexer-$length/weights.safetensors" "$nautile" train long --indexer-only \
        --data "$work/shards/long-$length" --out "$work/indexer-$length" --init "$before" --length "$length" --span "$span" \
        --build-tokens "$(size 20000000 4096)" --steps "$(size 150 1)" "${model[@]}"
    stage "long $length" "$work/long-$length/weights.safetensors" "$nautile" train long --data "$work/shards/long-$length" \
        --out "$work/long-$length" --init "$work/indexer-$length/weights.safetensors" --length "$length" --span "$span" \
        --steps "$(size 200 1)" "${model[@]}"
    before=$work/long-$length/weights.safetensors
done
export_to "$before" "$work/base"

# 4. Three specialists by reinforcement in real sandboxes, on the values that the file will hold.
for name in files data retrieval; do
    stage "grpo $name" "$work/$name/weights.safetensors" "$nautile" train grpo --init "$work/base" --out "$work/$name" \
        --kinds "${!name}" --steps "$(size 60 1)" --groups "$(size 40 1)" --samples "$(size 10 2)" --lr 4e-4 "${agent[@]}"
    export_to "$work/$name/weights.safetensors" "$work/$name/model"
    stage "page of $name" "$work/$name/run.html" "$nautile" train page "$work/$name"
done

# 5. One model of them, by distillation on its own conversations.
stage distill "$work/distill/weights.safetensors" "$nautile" train distill --init "$work/base" --out "$work/distill" \
    --teacher "files=$work/files/model:$files" --teacher "data=$work/data/model:$data" \
    --teacher "retrieval=$work/retrieval/model:$retrieval" --steps "$(size 150 1)" --tasks "$(size 28 3)" \
    --samples "$(size 4 1)" --lr 4e-4 "${agent[@]}"
export_to "$work/distill/weights.safetensors" "$work/model"

# 6. What it can do, from the exported file alone.
stage "page of distill" "$work/distill/run.html" "$nautile" train page "$work/distill"
measured=(eval tools --model "$work/model" --json --out "$work/model/evals.json")
if [[ $mode == rehearse ]]; then # an untrained model fails, and the command says so with status 1
    measured+=(--in-process --kinds last_line --seeds 1)
    stage eval "$work/model/evals.json" "$nautile" "${measured[@]}" || [[ -e $work/model/evals.json ]]
else
    stage eval "$work/model/evals.json" "$nautile" "${measured[@]}" --full
fi
[[ $mode == list ]] || echo "the model: $work/model [$SECONDS s]"
