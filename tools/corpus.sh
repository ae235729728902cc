# Sourced by librispeech.sh and aishell.sh: arguments, unpacking, packing, training, scores.
# usage: source tools/corpus.sh NAME ARGUMENTS…
# Sets data, out, run, short and settings; NAME is the recipe's, too.
name=$1 data="" out="" short="" settings=() overrides=()
shift
fail() { echo "error: $1" >&2; exit 2; }
for argument in "$@"; do
    case "$argument" in
        --short) short=1 ;;
        -*) fail "unknown option $argument" ;;
        *=*) overrides+=("$argument") ;;
        *)
            if [ -z "$data" ]; then data=$(realpath "$argument")
            elif [ -z "$out" ]; then out=$(realpath "$argument")
            else fail "one folder too many: $argument"
            fi ;;
    esac
done
[ -n "$data" ] || fail "usage: bash tools/$name.sh DOWNLOADS [OUT] [--short] [key=value …]"
[ -d "$data" ] || fail "there is no folder $data"
cd "$(dirname "${BASH_SOURCE[0]}")/.."
run=${out:+$out/run}
run=${run:-runs/$name${short:+-short}} out=${out:-corpus/$name${short:+-short}}
started=$SECONDS
mkdir -p "$out"
step() { echo; echo "== $1   ($(((SECONDS - started) / 60)):$(printf %02d $(((SECONDS - started) % 60))))"; }

is_packed() { [ -f "$out/shards/$1/dataset.json" ]; }

unpack() { # ARCHIVE FOLDER: the folder appears when all of the archive is in it
    [ ! -d "$2" ] || return 0
    echo "unpacking $1"
    rm -rf "$2.part"
    mkdir -p "$2.part"
    tar -xf "$1" -C "$2.part" || fail "$1 does not unpack: make room, or download it again"
    mv "$2.part" "$2"
}

pack() { # SPLIT FOLDER KIND
    is_packed "$1" || dsasr data make-shards "$2" --kind "$3" --out "$out/shards/$1"
}

small_models() { # SPLIT: random encoder, tokenizer and language model of its transcripts
    local models=$out/models
    mkdir -p "$models/encoder"
    cat > "$models/encoder/config.json" <<'JSON'
{"model_type": "whisper", "d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 2,
 "encoder_ffn_dim": 64, "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 8,
 "vocab_size": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
 "decoder_start_token_id": 1, "num_mel_bins": 80}
JSON
    python - "$out/shards/$1" > "$models/text" <<'PY'
import json, sys, tarfile
from pathlib import Path
for shard in sorted(Path(sys.argv[1]).glob("*.tar"))[:4]:
    with tarfile.open(shard) as members:
        for member in members:
            if member.name.endswith(".json"):
                print(json.load(members.extractfile(member))["text"].lower())
PY
    dsasr data tokenizer "$models/text" --out "$models/tokenizer" --size 400
    dsasr demo lm "$models/text" --tokenizer "$models/tokenizer" --out "$models/lm" --hidden 32 \
        --layers 1 --heads 2 --kv-heads 1 --head-dim 16 --ffn 64 --steps 3 --batch 4
    settings+=("model.encoder={path: $models/encoder, weights: false}" "model.llm.path=$models/lm"
        model.adaptor.hidden=32 model.lora.rank=4 model.lora.alpha=8
        data.dataloader.num_workers=0 data.dataloader.batch.frames=3200
        data.dataloader.batch.tokens=3200 stages.align.steps=4 stages.align.warmup_steps=1
        stages.sft.steps=4 stages.sft.warmup_steps=1 evaluation.every=0
        evaluation.decode.max_tokens=16)
}

train_and_score() { # SPLIT…: of the test
    step "training: recipe $name"
    local gpus score
    gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
    if dsasr evaluate "$run" --is-finished; then
        echo "$run is trained already"
    else
        dsasr train --recipe "$name" --ranks "$((gpus ? gpus : 1))" "run=$run" "${settings[@]}" \
            ${overrides[@]+"${overrides[@]}"}
    fi
    mkdir -p "$run/scores"
    for split in "$@"; do
        score=$run/scores/$split.txt
        [ ! "$score" -nt "$run/checkpoints" ] || continue
        step "evaluation: $split"
        dsasr evaluate "$run" --data "$out/shards/$split" --out "$run/scores/$split.jsonl" \
            --overwrite ${short:+--limit 20} | tee "$score.part"
        mv "$score.part" "$score"
    done
    step "scores"
    for split in "$@"; do
        printf '%-11s %s\n' "$split" "$(tail -n 1 "$run/scores/$split.txt")"
        grep '^left out' "$run/scores/$split.txt" || true
    done
}

source tools/install.sh lora
export GOMP_SPINCOUNT="${GOMP_SPINCOUNT:-2000}"
