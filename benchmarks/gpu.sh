#!/usr/bin/env bash
# Every benchmark that a GPU makes meaningful, in one call of at most nine minutes.
#   benchmarks/gpu.sh [FOLDER]     JSON lines go to FOLDER (runs/gpu), one file a benchmark; all are printed too.
# PYTHON chooses the interpreter. A benchmark that runs out of its time is stopped, and the rest go on.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-runs/gpu}
mkdir -p "$folder"

measure() { # SECONDS NAME BENCHMARK [FLAG...]
  local seconds=$1 name=$2 script=benchmarks/$3.py
  shift 3
  timeout "$seconds" "${PYTHON:-python3}" "$script" --json "$@" | tee "$folder/$name.jsonl" ||
    echo "$name: stopped or failed" >&2
}

"${PYTHON:-python3}" -c 'import torch; print(torch.cuda.get_device_name())'
measure 60 sparse_residual_fp32 sparse_residual --device cuda
measure 60 sparse_residual_bf16 sparse_residual --device cuda --dtype bfloat16
measure 120 training_step training_step --hidden 2048 --layers 24 --batch 4 --lengths 128 1024
measure 90 training_step_checkpointing training_step --hidden 4096 --layers 16 --batch 1 --lengths 2048 --checkpointing
measure 120 memory memory --hidden 4096 --layers 32 --length 1024 --checkpointing
measure 60 pruned_forward pruned_forward --quick
