#!/bin/bash
# One job on several nodes under Slurm, which share a file system:
#
#   sbatch --nodes 4 docker/cluster/slurm.sh run /shared/CKPT /shared/OUT --for cpu
#
# What follows the script are the arguments of vllm-moe-prune. After a failure submit the
# same with --resume; another number of nodes will do. RANKS_PER_NODE: see below.
#SBATCH --job-name=vllm-moe-prune
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --time=12:00:00
#SBATCH --output=%x-%j.log
set -euo pipefail

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# One rank for each GPU; without GPUs one for each socket.
ranks=${RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-2}}
cpus=${SLURM_CPUS_ON_NODE:-2}
# The same on all nodes, or ranks refuse each other; torchrun would set 1.
export OMP_NUM_THREADS=$((cpus > ranks ? cpus / ranks : 1))

exec srun --kill-on-bad-exit=1 torchrun \
    --nnodes "$SLURM_NNODES" --nproc-per-node "$ranks" \
    --rdzv-backend c10d --rdzv-endpoint "$first:29500" --rdzv-id "$SLURM_JOB_ID" \
    --max-restarts 0 -m vllm_moe_prune "$@"
