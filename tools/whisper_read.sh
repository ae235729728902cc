#!/usr/bin/env bash
# From a pretrained encoder to a recognizer with little speech: train and score recipe whisper-read.
#   bash tools/whisper_read.sh SPEECH ENCODER LLM TEXT [key=value …]
# SPEECH: folder with train.jsonl and valid.jsonl; ENCODER, LLM: Hugging Face folders of Whisper base
# and of its decoder as a language model, which is made of the first (whole) and recordings:
#   dsasr data make-shards SPEECH/train.jsonl --out SHARDS
#   python tools/whisper_decoder_lm.py ENCODER LLM --speech SHARDS
# TEXT: sentences, one a line. WordNet's usage examples are such a text (Debian's package
# wordnet-base):
#   python tools/wordnet_sentences.py /usr/share/wordnet > sentences.txt
# Another language: its name in the prompt and for the text, and units that spell it:
#   … data.text_only.lang=zh data.text.leading_space=false data.phonemizer.kind=espeak \
#   'model.prompt=<|startofprev|><speech><|startoftranscript|><|zh|><|transcribe|><|notimestamps|>'
set -euo pipefail
[ $# -ge 4 ] && [ -f "$1/train.jsonl" ] && [ -f "$2/config.json" ] && [ -f "$3/config.json" ] &&
    [ -f "$4" ] || { echo "usage: bash tools/whisper_read.sh SPEECH ENCODER LLM TEXT [key=value …]" >&2; exit 2; }
speech=$(realpath "$1") encoder=$(realpath "$2") llm=$(realpath "$3") text=$(realpath "$4")
shift 4
cd "$(dirname "$0")/.."
source tools/install.sh demo # espeak-ng, for data.phonemizer.kind=espeak
name=$(basename "$speech")
corpus=corpus/$name run=runs/whisper-$name units=characters
for setting in "$@"; do
    case $setting in
    data.phonemizer.kind=characters | data.phonemizer.kind=espeak) units=${setting#*=} ;;
    data.phonemizer*)
        echo "whisper_read.sh: of data.phonemizer give kind=characters or kind=espeak" >&2
        exit 2
        ;;
    esac
done
started=$SECONDS
mkdir -p "$corpus"
dsasr data make-shards "$speech/train.jsonl" "$speech/valid.jsonl" --out-root "$corpus/shards" --shard-size 100
dsasr data phonemes "$corpus/shards/train" --out "$corpus/$units.json" --kind "$units"
cp "$text" "$corpus/text.txt"
gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
train=(dsasr train --recipe whisper-read --ranks "$((gpus ? gpus : 1))" "run=$run"
    "data.train=[{name: read, shards: '$corpus/shards/train'}]"
    "data.valid=[{name: read-valid, shards: '$corpus/shards/valid'}]"
    "data.phonemes=$corpus/$units.json" "data.text_only.path=$corpus/text.txt"
    "model.encoder.path=$encoder" "model.llm.path=$llm" "$@")
"${train[@]}" branch=pretrain
# The language model reads text with the errors that this head makes.
confusions=$corpus/confusions.json
dsasr data confusions "$run/pretrain" --data "$corpus/shards/train" --out "$confusions"
"${train[@]}" branch=sft "data.text_only.confusions=$confusions"
echo "The CTC head alone, greedy, on utterances that it did not train on:"
dsasr data confusions "$run/pretrain" --data "$corpus/shards/valid"
dsasr evaluate "$run/sft" --data "$corpus/shards/valid" --report
echo "Time: $(((SECONDS - started) / 60)) min $(((SECONDS - started) % 60)) s"
