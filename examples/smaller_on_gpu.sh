#!/usr/bin/env bash
# 4-bit experts, and a quarter of the MoE sublayers removed: examples/smaller_on_gpu.sh [OUT]
set -euo pipefail
cd "$(dirname "$0")/.."

# --8<-- [start:commands]
OUT=${1:-demo-output/smaller}
CKPT=examples/demo-mixtral
TEXT=examples/calibration.txt

vllm-moe-prune recommend $CKPT --memory 3MB
vllm-moe-prune run $CKPT "$OUT" --recipe turbo --calibration $TEXT \
    --samples 8 --sequence-length 256 --overwrite
vllm-moe-prune verify "$OUT" --source $CKPT
vllm-moe-prune serve "$OUT" --dry-run
# --8<-- [end:commands]
