#!/usr/bin/env bash
# The experiment: who resolves what, and what it costs in hallucinations. Several systems, the same
# data and compute, three seeds each (tools/experiments/systems.py), on the CPU.
#   bash tools/reproduce.sh              hours on two cores; stop and start it as you like
#   bash tools/reproduce.sh --short      two systems, the same steps, in minutes: shows that it runs
# Finished systems are kept in tools/experiments/results/. With RECORDINGS=FOLDER (or ../shared/data)
# the sets en_digits and en_read are run too, with one seed. SETS="synth digits" leaves out others.
set -euo pipefail
cd "$(dirname "$0")/.."
hours=2 lm_steps=900 root=corpus/experiment runs=runs/experiment results=tools/experiments/results
sets=${SETS:-synth digits read} short=() seeds=(1 2 3)
case "${1:-}" in
    "") ;;
    --short)
        hours=0.1 lm_steps=20 root=corpus/experiment-short runs=runs/experiment-short
        results=runs/experiment-short/results sets=synth seeds=(1)
        short=(--short --limit 8 --clips 1 --systems phoneme paper no-joint) ;;
    *) echo "usage: bash tools/reproduce.sh [--short]" >&2; exit 2 ;;
esac
source tools/install.sh demo
export DS_ACCELERATOR=cpu GOMP_SPINCOUNT="${GOMP_SPINCOUNT:-2000}"
recordings=${RECORDINGS:-../shared/data}

# shards, features, both label vocabularies, tokenizer and language model of one corpus
prepare() {  # corpus, kind of phonemes, options of dsasr data phonemes
    local corpus=$1 kind=$2
    shift 2
    [ -f "$corpus/cmvn.json" ] || dsasr data cmvn "$corpus/shards/train" --out "$corpus/cmvn.json"
    [ -f "$corpus/phonemes.json" ] || \
        dsasr data phonemes "$corpus/shards/train" --out "$corpus/phonemes.json" --kind "$kind" "$@"
    [ -f "$corpus/characters.json" ] || \
        dsasr data phonemes "$corpus/shards/train" --out "$corpus/characters.json" --kind characters
}

run() {  # set, further options
    local kind=$1
    shift
    python tools/experiments/reproduce.py --set "$kind" --corpus "$root/$kind" --runs "$runs/$kind" \
        --results "$results" "${short[@]}" "$@"
}

for kind in $sets; do
    corpus=$root/$kind
    case $kind in
        synth)
            small=()
            [ ${#short[@]} -eq 0 ] || small=(--valid 12 --test 24 --nonspeech 4 --text 600)
            dsasr demo corpus --out "$corpus" --hours "$hours" "${small[@]}"
            dsasr data make-shards "$corpus"/{train,valid,test,nonspeech}.jsonl \
                --out-root "$corpus/shards" --shard-size 250
            prepare "$corpus" stored
            dsasr data tokenizer "$corpus/text/lm.txt" --out "$corpus/tokenizer"
            dsasr demo lm "$corpus/text/lm.txt" --tokenizer "$corpus/tokenizer" \
                --out "$corpus/lm" --reads espeak --steps "$lm_steps"
            # Probes want more voices than the test set has: other sentences by all of them.
            probe=$root/probe
            probes=(--hours 0.4 --test 160) utterances=500
            [ ${#short[@]} -eq 0 ] || probes=(--hours 0.02 --test 12) utterances=24
            dsasr demo corpus --out "$probe" --seed 5 --valid 1 --nonspeech 1 --text 100 \
                "${probes[@]}"
            dsasr data make-shards "$probe"/{train,test}.jsonl --out-root "$probe/shards" \
                --shard-size 250
            run synth --seeds "${seeds[@]}" --probe "$probe/shards/*/*.tar" \
                --utterances "$utterances" ;;
        *)
            data=$recordings/en_$kind
            if [ ! -f "$data/train.jsonl" ]; then
                echo "no recordings in $data: set $kind is left out"
                continue
            fi
            python tools/experiments/recorded.py "$kind" "$data" "$corpus"
            dsasr data make-shards "$corpus"/{train,valid,test}.jsonl --out-root "$corpus/shards" \
                --shard-size 100
            if [ "$kind" = digits ]; then
                sounds=(lexicon --lexicon digits.lexicon) words=320
            else
                sounds=(espeak) words=1000
            fi
            prepare "$corpus" "${sounds[@]}"
            dsasr data tokenizer "$corpus/text.txt" --out "$corpus/tokenizer" --size "$words"
            dsasr demo lm "$corpus/text.txt" --tokenizer "$corpus/tokenizer" \
                --out "$corpus/lm" --steps 700 --reads "${sounds[@]}"
            run "$kind" --seeds 1 ;;
    esac
done
python tools/experiments/summary.py --results "$results"
