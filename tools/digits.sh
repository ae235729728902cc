#!/usr/bin/env bash
# Real speech: train and score recipe "digits" on a folder with train.jsonl and test.jsonl of spoken
# digit strings (text in words: "nine three two").
#   bash tools/digits.sh path/to/en_digits [key=value …]
set -euo pipefail
[ $# -ge 1 ] && [ -f "$1/train.jsonl" ] || { echo "usage: bash tools/digits.sh FOLDER [key=value …]" >&2; exit 2; }
data=$(cd "$1" && pwd)
shift
cd "$(dirname "$0")/.."
source tools/install.sh demo
export GOMP_SPINCOUNT="${GOMP_SPINCOUNT:-2000}"
corpus=corpus/digits run=runs/digits
started=$SECONDS
mkdir -p "$corpus"
dsasr data make-shards "$data/train.jsonl" "$data/test.jsonl" --out-root "$corpus/shards" --shard-size 100
[ -f "$corpus/cmvn.json" ] || dsasr data cmvn "$corpus/shards/train" --out "$corpus/cmvn.json"
[ -f "$corpus/phonemes.json" ] || dsasr data phonemes "$corpus/shards/train" \
    --out "$corpus/phonemes.json" --kind lexicon --lexicon digits.lexicon
# The language model's text: digit strings at random, and none of the recordings' own transcripts.
[ -f "$corpus/text.txt" ] || python - > "$corpus/text.txt" <<'PY'
import random
words = "zero one two three four five six seven eight nine".split()
draw = random.Random(0)
for _ in range(20_000):
    print(" ".join(draw.choices(words, k=draw.randint(2, 9))))
PY
dsasr data tokenizer "$corpus/text.txt" --out "$corpus/tokenizer" --size 320
dsasr demo lm "$corpus/text.txt" --tokenizer "$corpus/tokenizer" --out "$corpus/lm" \
    --steps 700 --reads lexicon --lexicon digits.lexicon
gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
dsasr train --recipe digits --ranks "$((gpus ? gpus : 2))" "run=$run" "$@"
dsasr evaluate "$run" --data "$corpus/shards/test" --report
echo "Time: $(((SECONDS - started) / 60)) min $(((SECONDS - started) % 60)) s"
