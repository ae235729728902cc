#!/usr/bin/env bash
# From nothing to a trained recognizer: install, make a small bilingual corpus, train, decode, report.
#   bash tools/quickstart.sh            about 8 minutes on two CPU cores after installation
#   bash tools/quickstart.sh --short    the same steps in a few minutes, with a poor recognizer
#   bash tools/quickstart.sh --fresh    from scratch, even where a result is there
set -euo pipefail
cd "$(dirname "$0")/.."
hours=4 corpus=corpus/demo run=runs/demo lm_steps=400 overrides=() fresh=""
for argument in "$@"; do
    case "$argument" in
        --fresh) fresh=1 ;;
        --short)
            hours=0.15 corpus=corpus/demo-short run=runs/demo-short lm_steps=60
            overrides=(data.train.demo.shards=$corpus/shards/train
                data.valid.demo-valid.shards=$corpus/shards/valid data.cmvn=$corpus/cmvn.json
                data.phonemes=$corpus/phonemes.json model.llm.path=$corpus/lm model.tokenizer=$corpus/lm
                stages.pretrain.steps=60 stages.align.steps=12 stages.ia_sft.steps=60
                stages.ia_sft.steps_after_final_swap=20 stages.joint.steps=12) ;;
        *) echo "usage: bash tools/quickstart.sh [--short] [--fresh]" >&2; exit 2 ;;
    esac
done

source tools/install.sh demo
# Threads that spin long while they wait make a small model crawl on a machine that does other work.
export GOMP_SPINCOUNT="${GOMP_SPINCOUNT:-2000}"
started=$SECONDS
[ -z "$fresh" ] || rm -rf "$corpus" "$run"
step() { echo; echo "== $1   ($(((SECONDS - started) / 60)):$(printf %02d $(((SECONDS - started) % 60))))"; }

step "speech: synthesizing $hours hours in two languages"
dsasr demo corpus --out "$corpus" --hours "$hours"
step "shards: packing it for streaming"
dsasr data make-shards "$corpus"/{train,valid,test,nonspeech}.jsonl --out-root "$corpus/shards" \
    --shard-size 250
pids=()
[ -f "$corpus/cmvn.json" ] || \
    { dsasr data cmvn "$corpus/shards/train" --out "$corpus/cmvn.json" & pids+=($!); }
[ -f "$corpus/phonemes.json" ] || \
    { dsasr data phonemes "$corpus/shards/train" --out "$corpus/phonemes.json" & pids+=($!); }
for pid in "${pids[@]}"; do wait "$pid"; done
step "text: tokenizer and a small language model"
dsasr data tokenizer "$corpus/text/lm.txt" --out "$corpus/tokenizer"
dsasr demo lm "$corpus/text/lm.txt" --heldout "$corpus/text/lm_heldout.txt" \
    --tokenizer "$corpus/tokenizer" --out "$corpus/lm" --reads espeak --steps "$lm_steps"

step "training: pretrain, align, IA-SFT and joint"
gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
command=(dsasr train --recipe demo --ranks "$((gpus ? gpus : 2))" "run=$run" "${overrides[@]}")
if dsasr evaluate "$run" --is-finished; then
    echo "$run is trained already (--fresh starts again)"
else
    echo "${command[*]}"
    "${command[@]}"
fi

step "evaluation: unseen sentences by unseen voices"
# With a small suite: a few utterances in noise and cut off, and sounds without speech.
dsasr evaluate "$run" --data "$corpus/shards/test" --suite --suite-utterances 12 --clips 2 --report
dsasr report "$run"
echo
echo "Run folder:     $run   (report.json, metrics.jsonl, timeline.png, checkpoints, snapshots)"
echo "Look at it:     $run/report/index.html   (what was found, worst transcripts with sound, training)"
echo "Watch it:       tensorboard --logdir $run/tensorboard"
echo "Train it again, your way:"
echo "  ${command[*]/run=$run/run=runs/mine} key=value …"
echo "Time after installation: $(((SECONDS - started) / 60)) min $(((SECONDS - started) % 60)) s"
