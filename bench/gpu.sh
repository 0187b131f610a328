#!/usr/bin/env bash
# All that a machine with a CUDA GPU can measure, the most valuable first:
#
#     bench/gpu.sh OUT_DIR [--budget-s 520] [--rehearse]
#
# the tests of the kernels, compiled; their launch parameters; every op; training steps of every
# method. Everything is written to OUT_DIR as soon as it is known, and the same command with the same
# OUT_DIR goes on where the last one stopped: run it until it says that nothing is left. One run ends
# within the budget, or some seconds later; SHARES, below, has what each part may take of it. Files
# of tests that did not pass come again only after the steps. Fails where a test, a launch, an op or
# a step failed.
#
#     OUT_DIR/tests.txt          a line for each try of a file of tests: passed, skipped, failed or
#                                unfinished, and a hash of the sources and packages that it was of
#     OUT_DIR/log.txt            what failing tests, the tuner, the ops and the laboratory said
#     OUT_DIR/<device>/tune.json, ops.json, steps.json    to be copied to bench/results/<device>/
#     OUT_DIR/tuned.json         s2kernels/kernels/tuned.json as the tuner renewed it, with which ops
#                                and steps of this run were measured: to be committed
#     OUT_DIR/results.tar        all of these, written after every part and however a run ends
#
# An OUT_DIR that has nothing but results.tar begins from that. So on a machine that is lent for one
# command at a time, and gives back a folder $OUT that it found empty, let the checkout that it is
# sent have the last results.tar, in a folder out/ that git ignores, and run
#     cp out/results.tar "$OUT"; bench/gpu.sh "$OUT"
# These are seven files, none deeper than one folder. Compiled kernels are in Triton's own cache, not
# among them.
#
# Needs python3 with torch, triton, transformers, peft, pytest, pytest-benchmark and tqdm; no network
# and no installation. Measured only where they are there, on PYTHONPATH for one: liger-kernel and
# galore-torch, and in the tests hypothesis. --rehearse does the same in two minutes at toy sizes,
# GPU or not.
set -euo pipefail

# SHARES: percent of the budget, at most. What a part does not need goes to the steps, and in a first
# run, in which all of them need theirs, these are left with 38 %.
TESTS=30 TUNE=12 OPS=20
RESERVE=25 # seconds: the imports of a command, before its own clock starts, and what it began last

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

end=$(($(date +%s) + budget))
left() { echo $((end - $(date +%s))); }
share() { echo $((budget * $1 / 100)); }

mkdir -p "$out"
out=$(cd "$out" && pwd)
[ -e "$out/tests.txt" ] || [ ! -e "$out/results.tar" ] || tar -xf "$out/results.tar" -C "$out"
touch "$out/tests.txt"
work=$(mktemp -d)

# What failing tests said, one after the other
keep_logs() {
    cat "$work"/*.kept >>"$out/log.txt" 2>/dev/null || return 0
    rm -f "$work"/*.kept
}

# results.tar takes its place whole or not at all
pack() {
    (cd "$out" && tar -cf "$work/results.tar" --exclude=results.tar -- *) &&
        mv "$work/results.tar" "$out/.results.tar" && mv "$out/.results.tar" "$out/results.tar"
}

# Commands run in the background and are waited for, as bash looks at a signal only then.
finish() {
    local rc=$? running
    trap - EXIT
    trap '' TERM INT HUP
    running=$(jobs -p)
    [ -z "$running" ] || kill $running 2>/dev/null || true
    wait || true
    keep_logs
    pack || rc=1
    rm -rf "$work"
    exit "$rc"
}
trap finish EXIT
trap 'exit 143' TERM INT HUP

cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
python=${PYTHON:-python3}

if [ -n "$rehearse" ]; then
    tests=(tests/test_swiglu_kernel.py)
    steps=(--suite toy) tune=(--toy --ops slice_grad --table "$out/tuned.json")
else
    nvidia-smi || true
    tests=(tests/test_*kernel*.py tests/test_autograd_*.py tests/test_bench_memory.py)
    tests+=(tests/test_peft_{training,states,adapters,saving,injection}.py)
    tests+=(tests/test_peft_fused*.py tests/test_peft_projections.py tests/test_fast_ops.py)
    tests+=(tests/test_flat.py tests/test_captured_*.py)
    steps=(--suite gpu) tune=()
fi

# What a test that passed depends on. The imports are those of every command below: from a cold disk
# they take longest, and are paid for here.
key=$("$python" - "$rehearse" <<'END'
import hashlib
import sys
from importlib import metadata
from pathlib import Path

import peft  # noqa: F401
import torch
import transformers  # noqa: F401

cuda = torch.cuda.is_available()
if not cuda and not sys.argv[1]:
    sys.exit("bench/gpu.sh: torch finds no GPU here; --rehearse needs none")
digest = hashlib.sha256((torch.cuda.get_device_name() if cuda else "cpu").encode())
for package in sorted(f"{found.name} {found.version}" for found in metadata.distributions()):
    digest.update(package.encode())
for folder in ("s2kernels", "autograd", "tests"):
    for path in sorted(Path(folder).rglob("*.py")):
        digest.update(path.read_bytes())
print(digest.hexdigest()[:12])
END
) || exit 2

failed=0 unfinished=()

# FILE UNTIL: seconds of the epoch, after which the file is not begun
one_file() {
    local rc=0 result rest=$(($2 - $(date +%s))) log child
    [ "$rest" -gt 0 ] || return 0
    log=$work/$(basename "$1")
    timeout -k 10 "$rest" "$python" -m pytest -q -p no:cacheprovider "$1" >"$log" 2>&1 &
    child=$!
    trap 'kill $child; exit' TERM
    wait "$child" || rc=$?
    case $rc in
        0) result=passed ;;
        5) result=skipped ;; # all of it: a package is not here
        124 | 137) result=unfinished ;;
        *) result=failed ;;
    esac
    echo "$1 $result $key" | tee -a "$out/tests.txt"
    case $result in
        failed | unfinished) { echo "== $1 $result, $rc"; tail -n 100 "$log"; } >"$log.kept" ;;
    esac
}

# UNTIL FILE...: most of their time goes into compiling kernels, on the CPU, so several at a time
run_tests() {
    local until=$1 file most=$(($(nproc) * 2 / 3 + 1))
    shift
    echo "== tests: $# files"
    for file in "$@"; do
        while [ "$(jobs -rp | wc -l)" -ge "$most" ]; do
            wait -n || true
        done
        one_file "$file" "$until" &
    done
    wait
    keep_logs
    pack
}

# FILE: how it went last with these sources and packages, "" where it was not tried
last_try() {
    awk -v file="$1" -v key="$key" '$1 == file && $3 == key { last = $2 } END { print last }' \
        "$out/tests.txt"
}

# NAME MOST COMMAND...: runs it for what is left, MOST seconds at most
measure() {
    local name=$1 most=$2 rc=0 rest said=$work/$1
    shift 2
    rest=$(left)
    [ "$rest" -le "$most" ] || rest=$most
    if [ "$rest" -le "$RESERVE" ]; then
        echo "== $name: skipped, $rest s are left"
        unfinished+=("$name")
        return
    fi
    echo "== $name" | tee -a "$out/log.txt"
    mkfifo "$said.pipe"
    (trap '' TERM && exec tee -a "$said" "$out/log.txt") <"$said.pipe" & # to the last word
    timeout -k 10 "$rest" "$python" "$@" --results "$out" --budget-s "$((rest - RESERVE))" \
        >"$said.pipe" 2>&1 &
    wait $! || rc=$?
    wait
    pack
    case $rc in
        0 | 5) ;; # 5: pytest found nothing that is not in the file
        124 | 137) echo "== $name: stopped after $rest s"; unfinished+=("$name") ;;
        *) echo "== $name FAILED, $rc"; failed=1; unfinished+=("$name") ;;
    esac
    if grep -qE 'did not fit into the budget|the budget is spent|s are spent' "$said"; then
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

[ ${#new[@]} -eq 0 ] || run_tests $((end - budget + $(share "$TESTS"))) "${new[@]}"
# A rehearsal without a GPU runs the kernels in Triton's interpreter.
[ -z "$rehearse" ] || nvidia-smi >/dev/null 2>&1 || export TRITON_INTERPRET=1
measure tune "$(share "$TUNE")" -m bench.kernels.tune "${tune[@]}"
[ -n "$rehearse" ] || cp s2kernels/kernels/tuned.json "$out/"
unset TRITON_INTERPRET
measure ops "$(share "$OPS")" \
    -m pytest bench/kernels/bench_ops.py -q -rs -p no:cacheprovider --benchmark-quiet
# What of the steps was timed in a slow moment is timed again as long as it may be: not all of it.
most=$budget
[ ${#again[@]} -eq 0 ] || most=$(($(left) * 4 / 5))
measure steps "$most" -m bench.laboratory "${steps[@]}"
if [ ${#again[@]} -gt 0 ]; then
    if [ "$(left)" -gt "$RESERVE" ]; then
        run_tests "$end" "${again[@]}"
    else
        echo "== tests: skipped, $(left) s are left: ${again[*]}"
    fi
fi

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
