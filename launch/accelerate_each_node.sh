#!/usr/bin/env bash
# Several machines without ssh between them: run this on each one, with the same arguments.
#   MACHINE_RANK=0 NUM_MACHINES=2 MASTER_ADDR=10.0.0.1 launch/accelerate_each_node.sh \
#     launch/finetune.py RECIPE.yaml [--flag value ...] --deepspeed null
# MASTER_PORT (default 29500) must be the same on all machines and free on the first one. ACCELERATE_CONFIG
# names another YAML file, NUM_PROCESSES the processes of one machine (default: its GPUs).
set -euo pipefail
: "${MACHINE_RANK:?this machine, 0 to NUM_MACHINES - 1}" "${NUM_MACHINES:?how many}"
: "${MASTER_ADDR:?address of machine 0}"

config=${ACCELERATE_CONFIG:-$(dirname "$0")/../ds_configs/accelerate_multi_node.yaml}
processes=${NUM_PROCESSES:-$(python -c 'import torch; print(torch.cuda.device_count() or 1)')}
cores=$(nproc)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > processes ? cores / processes : 1))}

command=(accelerate launch --config_file "$config" --num_machines "$NUM_MACHINES" --machine_rank "$MACHINE_RANK"
  --num_processes "$((processes * NUM_MACHINES))" --main_process_ip "$MASTER_ADDR"
  --main_process_port "${MASTER_PORT:-29500}" "$@")
echo "+ ${command[*]@Q}" >&2
exec "${command[@]}"
