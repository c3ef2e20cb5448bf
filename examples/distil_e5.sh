#!/usr/bin/env bash
# multilingual-e5-small -> a student of a quarter of its layers' parameters and a third of its vocabulary, and what each objective
# is worth.
#
#   bash examples/distil_e5.sh [--cpu] [--minutes M] [--evaluate M] [--long STEPS] [--out DIR] [--teacher DIR] [--text DIR] [--eval DIR]
#
# Four students start from the same weights (8 layers of the teacher, pruned without training) and read the same batches: MLM alone,
# with the adversary, with distillation, with both. Stages that are finished are not repeated: the same command goes on after a
# stop. --minutes bounds all of this, down to 20 steps a student; two fifths of it are pretraining. Every figure ends in OUT/reports
# and OUT/RESULTS.md.
#   --evaluate  minutes for the evaluation of each student, when a twelfth of --minutes is too little for NER and QA to be learnt
#   --long      after them a fifth student, healed first (25 minutes) and then trained for so many steps of 8,192 tokens: how near to
#               the teacher? Not within --minutes
#   --teacher   a hub folder of e5, or one that `unibert.py import` wrote; default: made from shared/ by its make_teacher.py
#   --text      <code>.txt files, one sentence or paragraph a line;  --eval: see eval/tasks.py
set -euo pipefail
from=$PWD
cd "$(dirname "$0")/.."
shared=${UNIBERT_SHARED:-../shared}
device=auto minutes=120 evaluate=0 long=0 out=runs/e5 teacher="" text=$shared/data/text eval=$shared/data/eval
while [ $# -gt 0 ]; do
    case $1 in
        --cpu) device=cpu; shift ;;
        --minutes|--evaluate|--long|--out|--teacher|--text|--eval)
            [ $# -ge 2 ] || { echo "$1 needs a value" >&2; exit 2; }
            value=$2
            case $1 in --out|--teacher|--text|--eval) [[ $2 = /* ]] || value=$from/$2 ;; esac
            declare "${1#--}=$value"; shift 2 ;;
        *) sed '1d;/^set /,$d' examples/distil_e5.sh >&2; echo "no option $1" >&2; exit 2 ;;
    esac
done
[[ $minutes =~ ^[0-9]+$ ]] && [ "$minutes" -ge 5 ] || { echo "--minutes $minutes: a whole number from 5" >&2; exit 2; }
[[ $evaluate =~ ^[0-9]+$ ]] || { echo "--evaluate $evaluate: a whole number of minutes" >&2; exit 2; }
[[ $long =~ ^[0-9]+$ ]] || { echo "--long $long: a whole number of steps" >&2; exit 2; }
[ -d "$text" ] && [ -d "$eval" ] || { echo "no folder $text or $eval; give --text and --eval" >&2; exit 2; }
[ -d "$eval/retrieval" ] && [ -d "$eval/sts" ] || { echo "$eval lacks retrieval/ or sts/, by which the teacher is judged" >&2; exit 2; }
[ -n "$teacher" ] || [ -f "$out/teacher/config.json" ] || [ -f "$shared/tools/make_teacher.py" ] \
    || { echo "no $shared/tools/make_teacher.py to make the teacher; give --teacher, a folder of multilingual-e5-small" >&2; exit 2; }
[ "$evaluate" -gt 0 ] && budget=$((evaluate * 60)) || budget=$((minutes * 5))
mkdir -p "$out/reports"
[ -f "$out/options" ] || echo "--minutes $minutes --evaluate $evaluate" > "$out/options"
[ "$(cat "$out/options")" = "--minutes $minutes --evaluate $evaluate" ] \
    || { echo "$out was begun with $(cat "$out/options"); give these, or another --out" >&2; exit 2; }
[ ! -f "$out/long/run.json" ] || [ "$long" = 0 ] || grep -q "\"steps\": $long," "$out/long/run.json" \
    || { echo "$out/long was begun with another --long; give that, or another --out" >&2; exit 2; }
say() { echo "== $(date +%T) $*"; }

# ---- teacher, vocabulary, data

if [ ! -f "$out/teacher/config.json" ]; then
    if [ -n "$teacher" ] && grep -q '"block"' "$teacher/config.json"; then
        rm -rf "$out/teacher" "$out/teacher.new"
        cp -r "$teacher" "$out/teacher.new"
        mv "$out/teacher.new" "$out/teacher"
    else
        say teacher
        [ -n "$teacher" ] || { teacher=$out/hub; python "$shared/tools/make_teacher.py" "$teacher"; }
        python unibert.py import "$teacher" "$out/teacher"
    fi
fi
if [ ! -f "$out/trimmed/config.json" ]; then
    say "a third of the vocabulary"
    python unibert.py trim "$out/teacher" "$out/trimmed" --data "$text" --vocab-size 83000 --prior
fi
if [ ! -f "$out/data/manifest.json" ]; then
    say "data: every line a document"
    python examples/lines.py "$text" "$out/lines" "$out/trimmed/tokenizer.model"
    python data.py prepare "$out/lines" --out "$out/data" --tokenizer "$out/trimmed/tokenizer.model"
fi
quarter=(--data "$out/data" --layers 0,1,2,3,5,7,9,11 --heads 8 --intermediate-size 344)
if [ ! -f "$out/pruned/config.json" ]; then
    say "a quarter of the layers' parameters"
    python unibert.py prune "$out/trimmed" "$out/pruned" "${quarter[@]}"
fi

if [ "$long" -gt 0 ] && [ ! -f "$out/healed/config.json" ]; then      # long's start: 25 minutes on two cores, which the four have not
    say "the same, and then every layer learns the whole model's states"
    python unibert.py prune "$out/trimmed" "$out/healed" "${quarter[@]}" --tokens 131072 --steps 700 --heal-tokens 1048576
fi

# ---- four students

recipe=(--data "$out/data" --teacher "$out/teacher" --teacher-prefix "query: " --init "$out/pruned" --device "$device"
        --max-length 64 --tokens-per-batch 4096 --alpha 0.5 --optimizer adamw --lr 3e-4 --decay 0.4 --eval-tokens 256
        --eval-every 1000000 --log-every 10 --save-every 200 --keep 1)
adversary=(--adv-weight 0.5 --adv-level sequence --adv-layer 8)          # of sentence vectors, which is what is compared
distillation=(--kd-weight 0 --kd-sentence-weight 10 --kd-similarity-weight 5 --kd-similarity-temperature 0.02 --kd-neutral 16
              --kd-anchors 4096 --teacher-cache 1000000)
vectors=(--teacher-cache-file "$out/vectors")
longer=(--init "$out/healed" --tokens-per-batch 8192 --lr 3e-4 --mask-rate 0.01 --mlm-weight 0.2)      # not against MLM: for the vectors
neither=(--adv-weight 0 --kd-weight 0)

student() {  # NAME, steps, options: train, or go on
    local name=$1 steps=$2 resume=(); shift 2
    [ ! -f "$out/$name/final/config.json" ] || return 0
    [ ! -f "$out/$name/run.json" ] || resume=(--resume)
    say "student: $name"
    python train.py "${recipe[@]}" --out "$out/$name" --steps "$steps" "$@" ${resume[@]+"${resume[@]}"}
    [ -f "$out/$name/final/config.json" ] || exit 130              # stopped by Ctrl-C: train.py has saved and ended well
}

if [ ! -f "$out/steps" ]; then       # so many as one student with the teacher and three without make in two fifths of the time
    say "measuring the speed"
    SECONDS=0                        # bash's clock: what the teacher reads before its first step (and `vectors` keep) counts, too
    for what in mlm all; do
        extra=("${neither[@]}")
        [ $what = mlm ] || extra=("${adversary[@]}" "${distillation[@]}" "${vectors[@]}")
        rm -rf "$out/speed-$what"
        python train.py "${recipe[@]}" --out "$out/speed-$what" --steps 16 --log-every 4 "${extra[@]}" > "$out/speed.log" \
            || { tail -n 3 "$out/speed.log" >&2; exit 1; }
        [ -f "$out/speed-$what/final/config.json" ] || exit 130
    done
    python - "$minutes" $SECONDS "$out"/speed-{mlm,all}/metrics.jsonl > "$out/steps.new" <<'END'
import json, sys
speeds = [[r for r in map(json.loads, open(f)) if "tokens_per_second" in r][-1]["tokens_per_second"] for f in sys.argv[3:]]
left = 0.4 * 60 * float(sys.argv[1]) - float(sys.argv[2])
print(max(20, int(left / (3 * 4096 / speeds[0] + 4096 / speeds[1]))))
END
    mv "$out/steps.new" "$out/steps"
    rm -rf "$out"/speed-{mlm,all} "$out/speed.log"
fi
steps=$(cat "$out/steps")
student mlm "$steps" "${neither[@]}"
student adversary "$steps" "${adversary[@]}" --kd-weight 0
student distillation "$steps" --adv-weight 0 "${distillation[@]}" "${vectors[@]}"
student all "$steps" "${adversary[@]}" "${distillation[@]}" "${vectors[@]}"         # the same batches: its teacher has nothing left to read
best=all
if [ "$long" -gt 0 ]; then
    best=long
    student long "$long" "${adversary[@]}" "${distillation[@]}" "${vectors[@]}" "${longer[@]}"
fi
[ -d "$out/export-$best" ] || python unibert.py export "$out/$best/final" "$out/export-$best"

# ---- evaluation: the first model is cut to its time, the others do as it did

score() {  # NAME, model folder, options
    local report=$out/reports/$1.json name=$1 model=$2; shift 2
    [ ! -f "$report" ] || return 0
    say "evaluation: $name"
    python -m eval run --model "$model" --data "$eval" --out "$out/unfinished.json" --rates 2e-4 --seeds 2 "$@" > "$out/eval-$name.log" \
        || { tail -n 3 "$out/eval-$name.log" >&2; exit 1; }
    mv "$out/unfinished.json" "$report"
}
score mlm "$out/mlm/final" --budget "${budget}s" --to-the-end
for name in adversary distillation all; do score "$name" "$out/$name/final" --like "$out/reports/mlm.json"; done
[ $best = all ] || score long "$out/long/final" --like "$out/reports/mlm.json"
score teacher "$out/teacher" --prefix "query: " --tasks retrieval,sts,neutrality --like "$out/reports/mlm.json"

python examples/results.py "$out" --lines "$out/lines" --options "$(cat "$out/options") --long $long"
