#!/usr/bin/env bash
# torchrun instead of DeepSpeed's launcher: one machine, or this script on each of several.
#   launch/torchrun.sh launch/finetune.py RECIPE.yaml [--flag value ...] [--deepspeed FILE]
# Several machines: NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 [MASTER_PORT=29500] in front, on each one.
# NUM_PROCESSES=N: processes of one machine (default: all visible GPUs; 2 without a GPU).
set -euo pipefail

processes=${NUM_PROCESSES:-$(python -c 'import torch; print(torch.cuda.device_count() or 2)')}
cores=$(nproc)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > processes ? cores / processes : 1))}

nodes=${NNODES:-1}
if ((nodes == 1)); then
  port=${MASTER_PORT:-$(python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')}
  where=(--master_addr 127.0.0.1 --master_port "$port")
else
  : "${NODE_RANK:?this machine, 0 to NNODES - 1}" "${MASTER_ADDR:?address of machine 0}"
  where=(--nnodes "$nodes" --node_rank "$NODE_RANK" --master_addr "$MASTER_ADDR"
    --master_port "${MASTER_PORT:-29500}")
fi

command=(torchrun --nproc_per_node "$processes" "${where[@]}" "$@")
echo "+ ${command[*]@Q}" >&2
exec "${command[@]}"
