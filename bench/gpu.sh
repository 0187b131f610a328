#!/usr/bin/env bash
# All that a machine with a CUDA GPU can measure, the most valuable first:
#
#     bench/gpu.sh OUT_DIR [--budget-s 520] [--rehearse]
#
# the tests of the kernels, compiled; every op; training steps of every method. Everything is written
# to OUT_DIR as soon as it is known, and the same command with the same OUT_DIR goes on where the
# last one stopped: run it until it says that nothing is left. One run ends within the budget.
#
#     OUT_DIR/tests.txt          a line for each file of tests: passed or failed
#     OUT_DIR/tests.log          what pytest said
#     OUT_DIR/<device>/ops.json, steps.json       to be copied to bench/results/<device>/
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

mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
python=${PYTHON:-python3}

left() { echo $((budget - SECONDS)); }

if [ -n "$rehearse" ]; then
    tests=(tests/test_swiglu_kernel.py)
    steps=(--suite toy)
else
    "$python" -c 'import torch; raise SystemExit(not torch.cuda.is_available())' || {
        echo "bench/gpu.sh: torch finds no GPU here; --rehearse needs none" >&2
        exit 2
    }
    nvidia-smi || true
    tests=(tests/test_*kernel*.py tests/test_autograd_*.py tests/test_bench_memory.py tests/test_peft.py)
    steps=(--suite gpu)
fi

# Most of their time goes into compiling kernels, on the CPU: several files at a time.
logs=$(mktemp -d)
keep_logs() { cat "$logs"/*.log >>"$out/tests.log" 2>/dev/null || true; rm -r "$logs"; }
trap keep_logs EXIT

one_file() {
    local rc=0
    timeout "$3" "$python" -m pytest -q -p no:cacheprovider "$1" >"$2/$(basename "$1").log" 2>&1 || rc=$?
    case $rc in
        0) echo "$1 passed" ;;
        124) echo "$1 not finished" ;;
        *) echo "$1 FAILED, $rc" ;;
    esac | tee -a "$4"
}
export -f one_file
export python

touch "$out/tests.txt"
todo=()
for file in "${tests[@]}"; do
    grep -qx "$file passed" "$out/tests.txt" || todo+=("$file")
done
if [ ${#todo[@]} -gt 0 ] && [ "$(left)" -gt 0 ]; then
    echo "== tests: ${#todo[@]} files"
    printf '%s\n' "${todo[@]}" |
        xargs -P 6 -I FILE bash -c 'one_file "$@"' _ FILE "$logs" "$(left)" "$out/tests.txt"
fi

failed=0
if [ "$(left)" -gt 20 ]; then
    echo "== ops"
    "$python" -m pytest bench/bench_ops.py -q -p no:cacheprovider --benchmark-quiet \
        --results "$out" --budget-s "$(($(left) - 20))" || [ $? -eq 5 ] || failed=1
fi
if [ "$(left)" -gt 40 ]; then
    echo "== steps"
    "$python" -m bench.laboratory "${steps[@]}" --results "$out" \
        --budget-s "$(($(left) - 20))" || failed=1
fi

# Of a file that was tried more than once, the last line counts.
red=$(tac "$out/tests.txt" | awk '!seen[$1]++ && $2 != "passed"')
[ -z "$red" ] || { echo "$red"; failed=1; }
echo "== $SECONDS s; results in $out"
exit $failed
