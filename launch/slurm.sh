#!/usr/bin/env bash
# Slurm: srun starts one torchrun on each machine; no ssh, no hostfile.
#   sbatch --nodes 4 launch/slurm.sh launch/finetune.py RECIPE.yaml [--flag value ...] [--deepspeed FILE]
#SBATCH --job-name=dsee
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --signal=TERM@120
#SBATCH --output=%x-%j.log
set -euo pipefail

processes=${NUM_PROCESSES:-${SLURM_GPUS_ON_NODE:-1}}
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
first=${hosts%%$'\n'*}
# The port must be the same for all: asked of the first machine, where it has to be free.
free_port='import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])'
port=${MASTER_PORT:-$(srun --nodes 1 --ntasks 1 --nodelist "$first" python -c "$free_port")}
cores=${SLURM_CPUS_ON_NODE:-$(nproc)}
# What sbatch was told of cores, srun is not told by itself (since Slurm 22.05).
[[ -z ${SLURM_CPUS_PER_TASK:-} ]] || export SRUN_CPUS_PER_TASK=${SRUN_CPUS_PER_TASK:-$SLURM_CPUS_PER_TASK}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > processes ? cores / processes : 1))}
# Seconds that torchrun leaves its ranks to save, within those of --signal; an older PyTorch always 30.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-110}

command=(srun --kill-on-bad-exit=1 torchrun --nnodes "$SLURM_JOB_NUM_NODES" --nproc_per_node "$processes"
  --rdzv_backend c10d --rdzv_id "$SLURM_JOB_ID" --rdzv_endpoint "$first:$port" "$@")
echo "+ ${command[*]@Q}" >&2
exec "${command[@]}"
