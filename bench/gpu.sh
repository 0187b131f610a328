#!/usr/bin/env bash
# All that a machine with a CUDA GPU can measure, the most valuable first:
#
#     bench/gpu.sh OUT_DIR [--budget-s 520] [--rehearse]
#
# the tests of the kernels, compiled; their launch parameters; every op; training steps of every
# method. Everything is written to OUT_DIR as soon as it is known. The same command with the same
# OUT_DIR goes on where the last one stopped: run it until it says that nothing is left. Fails where
# a test, a launch, an op or a step failed. --rehearse does the same at toy sizes, GPU or not.
#
#     OUT_DIR/tests.txt    a line for each try of a file of tests
#     OUT_DIR/log.txt      what the tests, the tuner, the ops and the steps said
#     OUT_DIR/<device>/    tune.json, ops.json, steps.json: to be copied to bench/results/<device>/
#     OUT_DIR/tuned.json   s2kernels/kernels/tuned.json as the tuner left it; the ops and steps of
#                          this run used it: to be committed
#     OUT_DIR/results.tar  all of these, written however a run ends; an OUT_DIR may begin from it
#
# Needs python3 with torch, triton, transformers, peft, pytest, pytest-benchmark and tqdm; no network
# and no installation.
set -euo pipefail

TESTS=30 TUNE=12 OPS=20 # percent of the budget, at most; the steps have the rest
RESERVE=25              # seconds: the imports of a command, and what it began last

usage() {
    echo "usage: bench/gpu.sh OUT_DIR [--budget-s SECONDS] [--rehearse]" >&2
    exit 2
}

out= budget=520 rehearse=
while [ $# -gt 0 ]; do
    case $1 in
        --budget-s) [ $# -ge 2 ] || usage; budget=$2; shift 2 ;;
        --rehearse) rehearse=1; shift ;;
        -*) usage ;;
        *) [ -z "$out" ] || usage; out=$1; shift ;;
    esac
done
[ -n "$out" ] && [[ $budget =~ ^[0-9]+$ ]] || usage

mkdir -p "$out"
out=$(cd "$out" && pwd)
[ -e "$out/tests.txt" ] || [ ! -e "$out/results.tar" ] || tar -xf "$out/results.tar" -C "$out"
touch "$out/tests.txt"

# Commands run in the background and are waited for, as bash looks at a signal only then.
finish() {
    local rc=$? running
    trap - EXIT
    trap '' TERM INT HUP
    running=$(jobs -p)
    [ -z "$running" ] || kill $running 2>/dev/null || true
    wait || true
    (cd "$out" && tar -cf .results.tar --exclude=results.tar --exclude=.results.tar -- * &&
        mv .results.tar results.tar) || rc=1
    exit "$rc"
}
trap finish EXIT
trap 'exit 143' TERM INT HUP

cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
python=${PYTHON:-python3}

if [ -n "$rehearse" ]; then
    tests=(tests/kernels/test_swiglu_kernel.py)
    steps=(--suite toy) tune=(--toy --ops slice_grad --table "$out/tuned.json")
else
    nvidia-smi
    tests=(tests/kernels/test_*.py tests/autograd/test_*.py tests/bench/test_bench_memory.py)
    tests+=(tests/peft/test_peft_{training,states,adapters,saving,injection}.py)
    tests+=(tests/peft/test_peft_fused*.py tests/peft/test_peft_projections.py tests/core/test_fast_ops.py)
    tests+=(tests/core/test_flat.py tests/core/test_captured_*.py)
    steps=() tune=()
fi

# A file of tests that passed is not run again with the same sources.
key=$(find s2kernels autograd tests -name '*.py' | sort | xargs cat | sha256sum | cut -c1-12)
last_try() { awk -v f="$1" -v key="$key" '$1 == f && $3 == key { last = $2 } END { print last }' "$out/tests.txt"; }
end=$(($(date +%s) + budget)) failed=0 unfinished=()

# NAME UNTIL COMMAND...: runs it to that second of the epoch at most; sets rc, 124 where it was stopped
run() {
    local name=$1 rest=$(($2 - $(date +%s)))
    shift 2
    rc=124
    echo "== $name" | tee -a "$out/log.txt"
    if [ "$rest" -gt 0 ]; then
        rc=0
        timeout -k 10 "$rest" "$@" 2>&1 | tee -a "$out/log.txt" &
        wait %% || rc=$?
    fi
    case $rc in
        0 | 5) ;; # 5: pytest has nothing to do
        124 | 137) echo "== $name: not finished" ;;
        *) echo "== $name FAILED, $rc"; failed=1 ;;
    esac
}

# NAME PERCENT COMMAND...: one that writes results, within that much of the budget
measure() {
    local name=$1 until=$(($(date +%s) + budget * $2 / 100)) said
    shift 2
    [ "$until" -le "$end" ] || until=$end
    said=$(stat -c %s "$out/log.txt")
    run "$name" "$until" "$python" "$@" --results "$out" \
        --budget-s $((until - $(date +%s) - RESERVE))
    case $rc in 0 | 5) ;; *) unfinished+=("$name") ;; esac
    ! tail -c +"$said" "$out/log.txt" | grep -qE 'the budget is spent|s are spent' ||
        unfinished+=("$name")
}

# Most of their time goes into compiling kernels, on the CPU, so several files run at a time.
for file in "${tests[@]}"; do
    case $(last_try "$file") in passed | skipped) continue ;; esac
    while [ "$(jobs -rp | wc -l)" -gt $(($(nproc) * 2 / 3)) ]; do wait -n || true; done
    {
        trap 'kill $(jobs -p)' TERM
        run "$file" $((end - budget + budget * TESTS / 100)) "$python" -m pytest -q -p no:cacheprovider "$file"
        case $rc in 0) how=passed ;; 5) how=skipped ;; 124 | 137) how=unfinished ;; *) how=failed ;; esac
        echo "$file $how $key" >>"$out/tests.txt"
    } &
done
wait
# A rehearsal without a GPU runs the kernels in Triton's interpreter.
[ -z "$rehearse" ] || nvidia-smi >/dev/null 2>&1 || export TRITON_INTERPRET=1
measure tune "$TUNE" -m bench.kernels.tune "${tune[@]}"
[ -n "$rehearse" ] || cp s2kernels/kernels/tuned.json "$out/"
unset TRITON_INTERPRET
pytest=(-m pytest -q -rs -p no:cacheprovider --benchmark-quiet --disable-warnings)
measure ops "$OPS" "${pytest[@]}" bench/kernels/bench_ops.py
measure steps 100 "${pytest[@]}" bench/steps "${steps[@]}"

for file in "${tests[@]}"; do
    case $(last_try "$file") in
        passed | skipped) ;;
        failed) echo "$file FAILED"; failed=1 ;;
        *) unfinished+=("$file") ;;
    esac
done
echo "== $SECONDS s; results in $out"
if [ ${#unfinished[@]} -eq 0 ]; then
    echo "== nothing is left"
else
    echo "== run again; not finished: $(printf '%s\n' "${unfinished[@]}" | sort -u | tr '\n' ' ')"
fi
exit $failed
