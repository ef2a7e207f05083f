#!/usr/bin/env bash
# One machine, all its GPUs (without a GPU: two processes on the CPU).
#   launch/single_node.sh launch/finetune.py RECIPE.yaml [--flag value ...] [--deepspeed FILE]
# NUM_PROCESSES=N takes the first N of the visible GPUs; MASTER_PORT=P fixes the port.
set -euo pipefail

gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
processes=${NUM_PROCESSES:-$((gpus ? gpus : 2))}
((!gpus || processes <= gpus)) || { echo "NUM_PROCESSES is $processes, but $gpus GPUs are visible" >&2; exit 2; }
port=${MASTER_PORT:-$(python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')}

if ((gpus)) && [[ -n ${CUDA_VISIBLE_DEVICES:-} ]]; then
  [[ $CUDA_VISIBLE_DEVICES =~ ^[0-9,]+$ ]] || { echo "DeepSpeed's launcher takes numbers alone in CUDA_VISIBLE_DEVICES," \
    "found $CUDA_VISIBLE_DEVICES: use launch/torchrun.sh" >&2; exit 2; }
  # With --num_gpus DeepSpeed would drop CUDA_VISIBLE_DEVICES and start at GPU 0.
  where=(--include "localhost:$(cut -d, -f"1-$processes" <<<"$CUDA_VISIBLE_DEVICES")")
else
  where=(--num_gpus "$processes")
fi
if ((!gpus)) && [[ -z ${OMP_NUM_THREADS:-} ]]; then
  cores=$(nproc)
  export OMP_NUM_THREADS=$((cores > processes ? cores / processes : 1))
fi

# An empty hostfile name: DeepSpeed would otherwise take /job/hostfile where there is one.
command=(deepspeed --hostfile= --no_local_rank "${where[@]}" --master_port "$port" "$@")
echo "+ ${command[*]@Q}" >&2
exec "${command[@]}"
