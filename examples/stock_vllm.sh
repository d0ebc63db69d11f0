#!/usr/bin/env bash
# As many experts in every layer: loads in unmodified vLLM: examples/stock_vllm.sh [OUT]
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${1:-demo-output/stock}
CKPT=examples/demo-mixtral
TEXT=examples/calibration.txt

# --8<-- [start:commands]
vllm-moe-prune run $CKPT "$OUT" --recipe expert-drop --budget per-layer \
    --calibration $TEXT --samples 8 --sequence-length 256 --overwrite
vllm-moe-prune verify "$OUT" --source $CKPT
grep -A 2 architectures "$OUT/config.json"
# --8<-- [end:commands]
grep -q '"MixtralForCausalLM"' "$OUT/config.json"
