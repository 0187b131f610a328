#!/usr/bin/env bash
# All that a machine with a CUDA GPU measures in ten minutes:
#
#     bench/gpu.sh OUT_DIR [--budget-s 570] [--plan] [--rehearse]
#
# and then what there was no time for, with what the first call wrote:
#
#     bench/gpu.sh OUT_DIR --budget-s 240
#
# bench/campaign.py says what it does. PYTHON names the interpreter, python3 by default.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
nvidia-smi 2>/dev/null || echo "no GPU here"
exec "${PYTHON:-python3}" -m bench.campaign "$@"
