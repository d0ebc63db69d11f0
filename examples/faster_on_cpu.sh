#!/usr/bin/env bash
# Half of the expert weights leave: experts, and zeros that are not stored: examples/faster_on_cpu.sh [OUT]
set -euo pipefail
cd "$(dirname "$0")/.."

# --8<-- [start:commands]
OUT=${1:-demo-output/faster}
CKPT=examples/demo-mixtral
TEXT=examples/calibration.txt

vllm-moe-prune run $CKPT "$OUT" --for cpu --total 0.5 \
    --calibration $TEXT --samples 8 --heldout 4 --sequence-length 256 --overwrite
vllm-moe-prune compare $CKPT "$OUT"
vllm-moe-prune convert "$OUT" "$OUT-dense" --storage dense --overwrite
vllm-moe-prune serve "$OUT" --dry-run
# --8<-- [end:commands]
