#!/usr/bin/env bash
# The same number of experts in every layer, for unmodified vLLM: examples/stock_vllm.sh [OUT]
set -euo pipefail
cd "$(dirname "$0")/.."

# --8<-- [start:commands]
OUT=${1:-demo-output/stock}
CKPT=examples/demo-mixtral
TEXT=examples/calibration.txt

vllm-moe-prune run $CKPT "$OUT" --budget per-layer \
    --calibration $TEXT --samples 8 --sequence-length 256 --overwrite
vllm-moe-prune verify "$OUT" --source $CKPT
grep -A 2 architectures "$OUT/config.json"
# --8<-- [end:commands]
grep -q '"MixtralForCausalLM"' "$OUT/config.json"
