#!/usr/bin/env bash
# All that a machine with a CUDA GPU measures in ten minutes:
#
#     bench/gpu.sh OUT_DIR [--budget-s 570] [--plan] [--rehearse]
#
# and then what there was no time for, with what the first call wrote:
#
#     bench/gpu.sh OUT_DIR --budget-s 240
#
# bench/campaign.py says what it does. PYTHON names the interpreter; by default it is the first of
# python3, python and .venv/bin/python that has torch.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
if [[ -z ${PYTHON:-} ]]; then
    for each in python3 python .venv/bin/python; do
        if "$each" -c 'import sys, importlib.util as u; sys.exit(not u.find_spec("torch"))' 2>/dev/null
        then
            PYTHON=$each
            break
        fi
    done
    if [[ -z ${PYTHON:-} ]]; then
        echo "no torch in python3, python or .venv/bin/python: set PYTHON=/path/to/python" >&2
        exit 2
    fi
fi
nvidia-smi 2>/dev/null || echo "no GPU here"
exec "$PYTHON" -m bench.campaign "$@"
