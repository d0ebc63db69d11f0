#!/usr/bin/env bash
# What a cut cost, and routers trained after it: examples/check_and_recover.sh [OUT]
set -euo pipefail
cd "$(dirname "$0")/.."

# --8<-- [start:cut]
OUT=${1:-demo-output/checked}
CKPT=examples/demo-mixtral
TEXT=examples/calibration.txt
SIZE="--samples 8 --sequence-length 256"

vllm-moe-prune run $CKPT "$OUT" --calibration $TEXT $SIZE --heldout 4 --overwrite
# --8<-- [end:cut]
# --8<-- [start:recover]
vllm-moe-prune recover "$OUT" "$OUT-recovered" --method router --source $CKPT \
    --calibration $TEXT $SIZE --steps 10 --heldout 2 --overwrite
# --8<-- [end:recover]
# --8<-- [start:check]
vllm-moe-prune compare $CKPT "$OUT" "$OUT-recovered" \
    --text examples/heldout/chat.txt --sequence-length 256 --max-tokens 1024
vllm-moe-prune report "$OUT"
# --8<-- [end:check]
