#!/usr/bin/env bash
# Everything that only a GPU can prove, in parts of at most 10 minutes a call.
#
#     bash kernels/gpu_check.sh                 # every part that is not done yet, until the time is up; call again
#     bash kernels/gpu_check.sh correct step    # these parts, done or not
#
#   correct            the tests of all kernels, those marked "needs a CUDA GPU" included; on 8 processes where
#                      pytest-xdist is there, since most of their time is compiling
#   tune_attention, tune_losses      other launch configurations against the pinned ones; prints the lines to paste
#   bench_attention, bench_losses    against every peer that is installed
#   step               the training step of small and base against padded BERT, the dearest operators, ncu where there is one
#   compiled           60 steps of train.py as it is, with --compile, and with --compile --cuda-graphs: tokens/s of each
#   train              8 minutes of training on a prepared data folder (DATA; else the atlas), with TEACHER if it is set
#
# From the environment: OUT, the folder of the results (runs/gpu); LIMIT, seconds a call (580); PYTHON (python3);
# DATA, TEACHER, PRESET (small), RUN, the run folder of `train` (runs/gpu-train).
# Which parts are done is told by their files in OUT; where OUT does not last from call to call, name the parts.
# A part writes OUT/<part>.txt when it is done, OUT/<part>.failed.txt when it failed or ran out of time.
# Exit code 1 if a part failed. Needs torch and Triton, and no network.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-runs/gpu} LIMIT=${LIMIT:-580} PYTHON=${PYTHON:-python3} PRESET=${PRESET:-small} RUN=${RUN:-runs/gpu-train}
export PYTHONUNBUFFERED=1
mkdir -p "$OUT"

correct() {
    local processes=()
    "$PYTHON" -c 'import xdist' 2> /dev/null && processes=(-n 8)
    "$PYTHON" -m pytest -q -rs --durations=8 "${processes[@]}" tests/test_kernels.py
}

tune_attention() { "$PYTHON" -m kernels.bench --tune --only attention; }
tune_losses() { "$PYTHON" -m kernels.bench --tune --only losses; }
bench_attention() { "$PYTHON" -m kernels.bench --only attention; }
bench_losses() { "$PYTHON" -m kernels.bench --only losses; }

step() {
    "$PYTHON" -m kernels.bench --only step || return 1
    if command -v ncu > /dev/null; then
        echo "ncu, each kernel of attention and of the losses once:"
        timeout 150 ncu --clock-control none --section SpeedOfLight --section Occupancy --section LaunchStats \
            --kernel-name 'regex:^_(ce|distill|forward|dq|dkv|short).*' --launch-count 12 "$PYTHON" - << 'PY' ||
import torch
from kernels import attention, linear_cross_entropy, linear_distillation
from kernels.peers import draw_lengths, loss_inputs, packed_qkv
device, dtype = torch.device("cuda"), torch.bfloat16
for longest in (128, 512):          # the short backward kernel, then the pair for longer sequences
    qkv, cu, n = packed_qkv(draw_lengths(256, 16, longest), 12, 32, dtype, device)
    attention(*qkv.unbind(1), cu, n).sum().backward()
inputs, teacher = loss_inputs(8192, 8192, 384, dtype, device), loss_inputs(8192, 8192, 768, dtype, device, seed=2)
target = torch.arange(8192, device=device)
linear_cross_entropy(*inputs, target).sum().backward()
sum(linear_distillation(*inputs, target, *teacher)).sum().backward()
torch.cuda.synchronize()
PY
            echo "ncu did not work here (no access to the counters?); the tables above do not need it"
    fi
}

compiled() {
    local how
    for how in "" "--compile" "--compile --cuda-graphs"; do
        echo "train.py ${how:-as it is}:"
        rm -rf "$RUN/compiled"
        # shellcheck disable=SC2086
        "$PYTHON" train.py --preset "$PRESET" --device cuda --nproc 1 --steps 60 --log-every 20 --eval-tokens 1024 --teacher-steps 0 \
            ${DATA:+--data "$DATA"} ${TEACHER:+--teacher "$TEACHER"} --out "$RUN/compiled" $how || return 1
    done
}

train() {
    local common=(--preset "$PRESET" --device cuda --nproc 1 --log-every 20 ${DATA:+--data "$DATA"} ${TEACHER:+--teacher "$TEACHER"})
    local speed="$RUN/speed" steps
    if [ ! -d "$RUN/model" ]; then
        # How many steps fit: 60 to find the speed (the first ones compile), then seven minutes' worth in one schedule.
        rm -rf "$speed"
        "$PYTHON" train.py "${common[@]}" --teacher-steps 0 --out "$speed" --steps 60 || return 1
        steps=$("$PYTHON" - "$speed" << 'PY'
import json, sys
log = [json.loads(line) for line in open(f"{sys.argv[1]}/metrics.jsonl")]
run = json.load(open(f"{sys.argv[1]}/run.json"))
speed = max(entry["tokens_per_second"] for entry in log if "tokens_per_second" in entry)
print(max(60, int(420 * speed / run["tokens_per_batch"])))
PY
        ) || return 1
        echo "$steps steps for seven minutes"
        "$PYTHON" train.py "${common[@]}" --teacher-steps 0 --out "$RUN/model" --steps "$steps" || return 1
    else
        "$PYTHON" train.py --out "$RUN/model" --resume || return 1
    fi
    cp "$RUN/model/metrics.jsonl" "$OUT/train-metrics.jsonl"
}

all=(correct tune_attention tune_losses bench_attention bench_losses step compiled train)
parts=("$@")
for part in "${parts[@]}"; do
    [[ " ${all[*]} " == *" $part "* ]] || { echo "no part $part; there are ${all[*]}" >&2; exit 2; }
done
if ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "torch sees no CUDA GPU here; without one, run: python -m kernels.bench --compile-only" >&2
    exit 2
fi
if [ ${#parts[@]} = 0 ]; then
    for part in "${all[@]}"; do [ -e "$OUT/$part.txt" ] || parts+=("$part"); done
fi

failed=0
export -f "${all[@]}"
export OUT PYTHON PRESET RUN
for part in "${parts[@]}"; do
    left=$((LIMIT - SECONDS))
    if [ $left -lt $((LIMIT / 2)) ]; then          # else a part that would need a call of its own is lost half way
        echo "$left s are left before $part; call again"
        break
    fi
    echo "== $part (at most $left s)"
    rm -f "$OUT/$part.txt" "$OUT/$part.failed.txt"
    { date -u '+%Y-%m-%d %H:%M UTC'; nvidia-smi --query-gpu=name,driver_version,clocks.sm,temperature.gpu --format=csv,noheader; } \
        > "$OUT/$part.partial.txt" 2>&1
    if timeout --kill-after=20 "$left" bash -c "set -o pipefail; $part 2>&1 | tee -a '$OUT/$part.partial.txt'"; then
        mv "$OUT/$part.partial.txt" "$OUT/$part.txt"
    else
        mv "$OUT/$part.partial.txt" "$OUT/$part.failed.txt"
        echo "== $part failed or ran out of time: $OUT/$part.failed.txt"
        failed=1
    fi
done
exit $failed
