#!/usr/bin/env bash
# Half of the expert weights zero, stored without the zeros: examples/faster_on_cpu.sh [OUT]
set -euo pipefail
cd "$(dirname "$0")/.."

# --8<-- [start:commands]
OUT=${1:-demo-output/faster}
CKPT=examples/demo-mixtral
TEXT=examples/calibration.txt

vllm-moe-prune run $CKPT "$OUT" --recipe wanda50 --slim sparsegpt --storage bitmask \
    --calibration $TEXT --samples 8 --sequence-length 256 --overwrite
vllm-moe-prune compare $CKPT "$OUT"
vllm-moe-prune convert "$OUT" "$OUT-dense" --storage dense --overwrite
vllm-moe-prune serve "$OUT" --dry-run
# --8<-- [end:commands]
