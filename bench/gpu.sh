#!/usr/bin/env bash
# All that a machine with a CUDA GPU can measure, the most valuable first:
#
#     bench/gpu.sh OUT_DIR [--budget-s 520] [--rehearse]
#
# the tests of the kernels, compiled; their launch parameters; every op; training steps of every
# method. Everything is written to OUT_DIR as soon as it is known, and the same command with the same
# OUT_DIR goes on where the last one stopped: run it until it says that nothing is left. One run ends
# within the budget, or some seconds later; the tests of a run take 40 % of it at most, the tuner a
# third of what they leave, and files of tests that did not pass come again only after ops and steps.
# Fails where a test, a launch, an op or a step failed.
#
#     OUT_DIR/tests.txt          a line for each try of a file of tests: passed, skipped or failed
#     OUT_DIR/logs/              what pytest and the laboratory said, of the last try
#     OUT_DIR/<device>/tune.json, ops.json, steps.json    to be copied to bench/results/<device>/
#     OUT_DIR/tuned.py           to be copied to s2kernels/kernels/, for which later runs are faster:
#                                ops and steps run with the launch parameters that are there
#
# Needs python3 with torch, triton, transformers, peft, pytest and pytest-benchmark; no network and
# no installation. --rehearse does the same in two minutes at toy sizes, GPU or not.
set -euo pipefail

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

mkdir -p "$out/logs"
out=$(cd "$out" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
python=${PYTHON:-python3}

end=$(($(date +%s) + budget))
left() { echo $((end - $(date +%s))); }

if [ -n "$rehearse" ]; then
    tests=(tests/test_swiglu_kernel.py)
    steps=(--suite toy) tune=(--toy --ops slice_grad)
else
    "$python" -c 'import torch; raise SystemExit(not torch.cuda.is_available())' || {
        echo "bench/gpu.sh: torch finds no GPU here; --rehearse needs none" >&2
        exit 2
    }
    nvidia-smi || true
    tests=(tests/test_*kernel*.py tests/test_autograd_*.py tests/test_bench_memory.py)
    tests+=(tests/test_peft_{training,states,adapters,saving,injection}.py)
    tests+=(tests/test_peft_fused*.py tests/test_peft_projections.py tests/test_fast_ops.py)
    tests+=(tests/test_flat.py tests/test_captured_*.py)
    steps=(--suite gpu) tune=()
fi

touch "$out/tests.txt"
failed=0 unfinished=()

# FILE LOGS TESTS_TXT UNTIL: seconds of the epoch, after which the file is not begun
one_file() {
    local rc=0 rest=$(($4 - $(date +%s)))
    [ "$rest" -gt 0 ] || return 0
    timeout -k 10 "$rest" "$python" -m pytest -q -p no:cacheprovider "$1" \
        >"$2/$(basename "$1").log" 2>&1 || rc=$?
    case $rc in
        0) echo "$1 passed" ;;
        5) echo "$1 skipped" ;; # all of it: a package is not here
        124 | 137) echo "$1 not finished" ;;
        *) echo "$1 FAILED, $rc" ;;
    esac | tee -a "$3"
}
export -f one_file
export python

# UNTIL FILE...: most of their time goes into compiling kernels, on the CPU, so several at a time
run_tests() {
    local until=$1
    shift
    echo "== tests: $# files"
    printf '%s\n' "$@" |
        xargs -P 6 -I FILE bash -c 'one_file "$@"' _ FILE "$out/logs" "$out/tests.txt" "$until"
}

# FILE: how it went last, "" where it was not tried
last_try() { awk -v file="$1" '$1 == file { last = $2 } END { print last }' "$out/tests.txt"; }

# NAME LEAST MOST COMMAND...: runs it, given what is left, MOST seconds at most, where that is more
# than LEAST
measure() {
    local name=$1 least=$2 most=$3 rc=0 rest
    shift 3
    rest=$(left)
    [ "$rest" -le "$most" ] || rest=$most
    if [ "$rest" -le "$least" ]; then
        echo "== $name: skipped, $rest s are left"
        unfinished+=("$name")
        return
    fi
    echo "== $name"
    timeout -k 10 "$rest" "$python" "$@" --results "$out" --budget-s "$((rest - 20))" |
        tee "$out/logs/$name.log" || rc=$?
    case $rc in
        0 | 5) ;; # 5: pytest found nothing that is not in the file
        124 | 137) echo "== $name: stopped after $rest s" ;;
        *) failed=1 ;;
    esac
    if [ $rc -eq 124 ] || [ $rc -eq 137 ] ||
        grep -qE 'did not fit into the budget|the budget is spent|s are spent' "$out/logs/$name.log"; then
        unfinished+=("$name")
    fi
}

new=() again=()
for file in "${tests[@]}"; do
    case $(last_try "$file") in
        passed | skipped) ;;
        "") new+=("$file") ;;
        *) again+=("$file") ;;
    esac
done

[ ${#new[@]} -eq 0 ] || run_tests $((end - budget + budget * 40 / 100)) "${new[@]}"
# A rehearsal without a GPU runs the kernels in Triton's interpreter.
[ -z "$rehearse" ] || nvidia-smi >/dev/null 2>&1 || export TRITON_INTERPRET=1
measure tune 20 $(($(left) / 3)) -m bench.tune "${tune[@]}" --table "$out/tuned.py"
unset TRITON_INTERPRET
measure ops 20 "$budget" -m pytest bench/bench_ops.py -q -rs -p no:cacheprovider --benchmark-quiet
# What of the steps was timed in a slow moment is timed again as long as it may be: not all of it.
most=$budget
[ ${#again[@]} -eq 0 ] || most=$(($(left) * 4 / 5))
measure steps 40 "$most" -m bench.laboratory "${steps[@]}"
if [ ${#again[@]} -gt 0 ]; then
    if [ "$(left)" -gt 20 ]; then
        run_tests "$end" "${again[@]}"
    else
        echo "== tests: skipped, $(left) s are left: ${again[*]}"
        unfinished+=("${again[@]}")
    fi
fi

for file in "${tests[@]}"; do
    case $(last_try "$file") in
        passed | skipped) ;;
        FAILED,) echo "$file FAILED"; failed=1 ;;
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
