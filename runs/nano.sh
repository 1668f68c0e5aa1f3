#!/usr/bin/env bash
# The whole recipe of an agent, from text to an exported model: each stage is one command, and each goes on where it was when
# it is run again. What is done is passed over.
#   runs/nano.sh WORK [SCALE]
# SCALE multiplies steps and tokens: 1 is meant for one H100 and some hours (not run end to end yet), a small one for a dry run
# of every stage. WORK/model is the result, WORK/*/run.html the page of each agent stage.
set -euo pipefail
work=$1 scale=${2:-1}
nautile=${NAUTILE:-nautile} shipped=src/nautile/weights/nano
mkdir -p "$work"

times() { # NUMBER LEAST: the number at this scale, but not below LEAST
    awk -v n="$1" -v s="$scale" -v m="$2" 'BEGIN { v = int(n * s); print (v < m ? m : v) }'
}

stage() { # NAME MARK COMMAND...: run a command unless its mark is there
    local name=$1 mark=$2
    shift 2
    if [[ -e $mark ]]; then
        echo "== $name: done"
    else
        echo "== $name: $*"
        "$@"
    fi
}

export_to() { # WEIGHTS DIRECTORY
    stage "export of $1" "$2/model.safetensors" "$nautile" train export "$1" --out "$2" --tokenizer "$work/tokenizer"
}

files=find_file,rename_file,count_files,largest_file,replace_text
data=lookup_value,edit_value,sum_column,count_lines
retrieval=find_definition,find_line,read_line,last_line,file_length

# 1. A vocabulary: nano's, so that scores can be compared; `nautile train tokenizer --out WORK/tokenizer` makes it anew.
stage tokenizer "$work/tokenizer/tokenizer.json" cp -r "$shipped" "$work/tokenizer"
rm -f "$work/tokenizer/model.safetensors"

# 2. Pretraining and supervised traces; weights are quantisation-aware from the first step.
stage pretrain "$work/pretrain/weights.safetensors" "$nautile" train pretrain --data "$work/shards/pretrain" \
    --out "$work/pretrain" --build-tokens "$(times 400000000 300000)" --steps "$(times 6000 2)" --rows "$(times 32 2)"
stage sft "$work/sft/weights.safetensors" "$nautile" train sft --data "$work/shards/sft" --out "$work/sft" \
    --init "$work/pretrain/weights.safetensors" --build-tokens "$(times 200000000 300000)" --steps "$(times 4000 2)" \
    --rows "$(times 32 2)"

# 3. Long rows: the indexer alone, then everything with sparse attention.
stage indexer "$work/indexer/weights.safetensors" "$nautile" train long --indexer-only --data "$work/shards/long" \
    --out "$work/indexer" --init "$work/sft/weights.safetensors" --build-tokens "$(times 8000000 40000)" \
    --length "$(times 16384 2048)" --steps "$(times 200 1)"
stage long "$work/long/weights.safetensors" "$nautile" train long --data "$work/shards/long" --out "$work/long" \
    --init "$work/indexer/weights.safetensors" --length "$(times 16384 2048)" --steps "$(times 200 1)"
export_to "$work/long/weights.safetensors" "$work/base"

# 4. Three specialists by reinforcement in real sandboxes, on the values that the file will hold.
for name in files data retrieval; do
    stage "grpo $name" "$work/$name/weights.safetensors" "$nautile" train grpo --init "$work/base" --out "$work/$name" \
        --kinds "${!name}" --steps "$(times 60 1)" --groups "$(times 64 1)" --samples "$(times 16 2)" --qat \
        --reply-tokens "$(times 512 16)"
    export_to "$work/$name/weights.safetensors" "$work/$name/model"
    "$nautile" train page "$work/$name"
done

# 5. One model of them, by distillation on its own conversations.
stage distill "$work/distill/weights.safetensors" "$nautile" train distill --init "$work/base" --out "$work/distill" \
    --teacher "files=$work/files/model:$files" --teacher "data=$work/data/model:$data" \
    --teacher "retrieval=$work/retrieval/model:$retrieval" --steps "$(times 150 1)" --tasks "$(times 64 3)" \
    --samples "$(times 4 1)" --qat --reply-tokens "$(times 512 16)"
export_to "$work/distill/weights.safetensors" "$work/model"

# 6. What it can do, from the exported file alone.
"$nautile" train page "$work/distill"
if [[ $scale == 1 ]]; then
    "$nautile" eval tools --model "$work/model" --full --json --out "$work/model/evals.json"
fi
echo "the model: $work/model"
