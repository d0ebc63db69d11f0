#!/usr/bin/env bash
# The plan with the least loss that fits a size: examples/fit_memory.sh [OUT]
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${1:-demo-output/fit}
CKPT=examples/demo-mixtral
TEXT=examples/calibration.txt
PLAN=$OUT.plan.json
mkdir -p "$(dirname "$OUT")"
RECIPE=$OUT.yaml
# A short search; without --recipe, tune tries more candidates.
cat >"$RECIPE" <<'YAML'
tune: {experts: [reap], budgets: [global], shares: [0, 0.5], layers: [], slims: [wanda], owl: false}
YAML

# --8<-- [start:commands]
vllm-moe-prune recommend $CKPT --memory 6MB
vllm-moe-prune tune $CKPT --bytes 6MB --recipe "$RECIPE" -o "$PLAN" --plot "$OUT.png" \
    --calibration $TEXT --samples 8 --sequence-length 256 --heldout 2
vllm-moe-prune cut $CKPT --plan "$PLAN" -o "$OUT" --overwrite
# --8<-- [end:commands]
