#!/usr/bin/env bash
# What only a GPU makes meaningful: tests/gpu first, then every case of benchmarks/gpu.py, within nine minutes.
#   benchmarks/gpu.sh [FOLDER] [--seconds 540] [--only CASE...]     on a GPU
#   benchmarks/gpu.sh --device cpu --tiny [FOLDER]                  a dry run of every case, anywhere
# PYTHON chooses the interpreter. FOLDER (runs/gpu) gets results.jsonl and log.txt; lines and a summary are printed.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
# DeepSpeed's builds wait for ever on the lock of one that was killed.
[[ -z "${TORCH_EXTENSIONS_DIR:-}" ]] || rm -f "$TORCH_EXTENSIONS_DIR"/*/lock
exec "${PYTHON:-python3}" benchmarks/gpu.py "$@"
