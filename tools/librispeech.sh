#!/usr/bin/env bash
# LibriSpeech from its archives (openslr.org/12) to word error rates: recipe "librispeech".
#   bash tools/librispeech.sh DOWNLOADS [OUT] [key=value …]
#   bash tools/librispeech.sh DOWNLOADS [OUT] --short     that it runs: a tiny random model, minutes
# DOWNLOADS has train-clean-100.tar.gz, dev-clean.tar.gz, test-clean.tar.gz and the others, as many as
# there are, or the LibriSpeech folder that they unpack into. OUT gets shards and run (default:
# corpus/librispeech, runs/librispeech). The models come from the hub, or are given by folder:
# model.encoder.path=… model.llm.path=…
# Run again it goes on; what is there already is not made again.
set -euo pipefail
source "$(dirname "$0")/corpus.sh" librispeech "$@"

trains=(train-clean-100 train-clean-360 train-other-500)
devs=(dev-clean dev-other)
tests=(test-clean test-other)
[ -z "$short" ] || { trains=(train-clean-100) devs=(dev-clean) tests=(test-clean); }

step "shards: one set for each split"
missing=()
for split in "${trains[@]}" "${devs[@]}" "${tests[@]}"; do
    if is_packed "$split"; then
        echo "$out/shards/$split is packed already"
    elif [ -d "$data/LibriSpeech/$split" ]; then
        pack "$split" "$data/LibriSpeech/$split" librispeech
    elif [ -d "$data/$split" ]; then
        pack "$split" "$data/$split" librispeech
    elif [ -f "$data/$split.tar.gz" ]; then
        unpack "$data/$split.tar.gz" "$out/unpacked/$split"
        pack "$split" "$out/unpacked/$split/LibriSpeech/$split" librispeech
        rm -rf "$out/unpacked/$split"
    else
        missing+=("$split")
    fi
done
found() { # SPLIT…: those that are packed
    for split in "$@"; do if is_packed "$split"; then echo "$split"; fi; done
}
mapfile -t trains < <(found "${trains[@]}")
mapfile -t devs < <(found "${devs[@]}")
mapfile -t tests < <(found "${tests[@]}")
for part in train:${#trains[@]} dev:${#devs[@]} test:${#tests[@]}; do
    [ "${part#*:}" -gt 0 ] ||
        fail "$data has no ${part%:*} data: download ${part%:*}-….tar.gz from https://www.openslr.org/12"
done
[ ${#missing[@]} -eq 0 ] || echo "left out, as $data lacks them: ${missing[*]}"

list="" valid=""
for split in "${trains[@]}"; do list+="${list:+, }\"$out/shards/$split\""; done
for split in "${devs[@]}"; do valid+="${valid:+, }{name: $split, shards: \"$out/shards/$split\"}"; done
settings+=("data.train.train.shards=[$list]" "data.valid=[$valid]")
[ -z "$short" ] || small_models "${trains[0]}"
train_and_score "${tests[@]}"
