#!/usr/bin/env bash
# The plan with the least loss that fits a size: examples/fit_memory.sh [OUT]
set -euo pipefail
cd "$(dirname "$0")/.."

# --8<-- [start:commands]
OUT=${1:-demo-output/fit}
CKPT=examples/demo-mixtral
TEXT=examples/calibration.txt
mkdir -p "$(dirname "$OUT")"
cat >"$OUT.yaml" <<'YAML'
tune: # a short search; without --recipe, tune tries many more candidates
  experts: [reap]
  budgets: [global]
  shares: [0, 0.5]
  layers: []
  slims: [wanda]
  owl: false
YAML

vllm-moe-prune recommend $CKPT --memory 6MB
vllm-moe-prune tune $CKPT --bytes 6MB --recipe "$OUT.yaml" -o "$OUT.plan.json" \
    --plot "$OUT.png" --calibration $TEXT --samples 8 --sequence-length 256 --heldout 2
vllm-moe-prune cut $CKPT --plan "$OUT.plan.json" -o "$OUT" --overwrite
# --8<-- [end:commands]
