#!/usr/bin/env bash
# AISHELL-1 from its archive (openslr.org/33) to a character error rate: recipe "aishell".
#   bash tools/aishell.sh DOWNLOADS [OUT] [key=value …]
#   bash tools/aishell.sh DOWNLOADS [OUT] --short     that it runs: three speakers, a tiny random model
# DOWNLOADS has data_aishell.tgz, or the data_aishell folder that it unpacks into, with or without the
# speakers' archives in its wav folder unpacked. OUT gets shards and run (default: corpus/aishell,
# runs/aishell). The models come from the hub, or are given by folder: model.encoder.path=…
# model.llm.path=…
# Run again it goes on; what is there already is not made again.
set -euo pipefail
source "$(dirname "$0")/corpus.sh" aishell "$@"

splits=(train dev test)
first_speakers=(S0002 S0724 S0764) # of each split

step "shards: one set for each split"
if is_packed train && is_packed dev && is_packed test; then
    echo "$out/shards is packed already"
else
    tree=""
    for folder in "$data/data_aishell" "$data" "$out/unpacked/data_aishell"; do
        [ -n "$tree" ] || [ ! -d "$folder/wav" ] || tree=$folder
    done
    if [ -z "$tree" ]; then
        [ -f "$data/data_aishell.tgz" ] ||
            fail "$data has no data_aishell.tgz: download it from https://www.openslr.org/33"
        unpack "$data/data_aishell.tgz" "$out/unpacked"
        tree=$out/unpacked/data_aishell
    fi
    shopt -s nullglob
    archives=("$tree"/wav/*.tar.gz)
    if [ ${#archives[@]} -gt 0 ]; then # a tar in which each speaker is a tar
        if [ ! -d "$out/data_aishell" ]; then
            part=$out/data_aishell.part
            rm -rf "$part"
            mkdir -p "$part/wav"
            cp -r "$tree/transcript" "$part/transcript"
            [ -z "$short" ] || archives=("${first_speakers[@]/#/$tree/wav/}")
            [ -z "$short" ] || archives=("${archives[@]/%/.tar.gz}")
            echo "unpacking ${#archives[@]} speakers"
            for archive in "${archives[@]}"; do
                tar -xf "$archive" -C "$part/wav" ||
                    fail "$archive does not unpack: make room, or download data_aishell.tgz again"
            done
            mv "$part" "$out/data_aishell"
        fi
        tree=$out/data_aishell
    fi
    for split in "${splits[@]}"; do
        [ -d "$tree/wav/$split" ] || fail "$tree/wav has no $split folder: unpack data_aishell.tgz again"
        pack "$split" "$tree/wav/$split" aishell
    done
    rm -rf "$out/unpacked" "$out/data_aishell"
fi

settings+=("data.train=[{name: train, shards: \"$out/shards/train\"}]"
    "data.valid=[{name: dev, shards: \"$out/shards/dev\"}]")
[ -z "$short" ] || small_models train
train_and_score test
