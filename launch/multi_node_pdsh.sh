#!/usr/bin/env bash
# Several machines, started from one of them over ssh: DeepSpeed's own launcher with a hostfile.
#   launch/multi_node_pdsh.sh launch/finetune.py RECIPE.yaml [--flag value ...] [--deepspeed FILE]
# HOSTFILE (default launch/hostfile) lists the machines, the first one leads; MASTER_ADDR is the address by
# which the others reach it (default: the first one of its `hostname -I`); MASTER_PORT=P fixes the port.
set -euo pipefail

hostfile=${HOSTFILE:-$(dirname "$0")/hostfile}
[[ -f $hostfile ]] || { echo "$hostfile does not exist; copy launch/hostfile.example" >&2; exit 2; }
# DeepSpeed puts both into the other machines' command line as they are.
for path in "$PWD" "$(command -v python)"; do [[ $path =~ ^[A-Za-z0-9_./:=,@+-]+$ ]] || {
  echo "DeepSpeed quotes no path, found $path: start from another folder, or use launch/torchrun.sh" >&2; exit 2; }; done
# Free on this machine; the first machine of the hostfile is meant to be this one.
port=${MASTER_PORT:-$(python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')}

command=(deepspeed --hostfile "$hostfile" --launcher pdsh --force_multi --no_local_rank --master_port "$port")
if [[ -n ${MASTER_ADDR:-} ]]; then
  command+=(--master_addr "$MASTER_ADDR")
fi
# DeepSpeed makes one line of the words, with --force_multi for one machine too; pdsh fills in its %h and the like, and
# a shell there expands it: bash or zsh.
quote='import os, re, sys
for word in map(os.fsencode, sys.argv[1:]):
    bare = re.fullmatch(rb"[\w./:=,@+-]+", word)
    print(word.decode() if bare else "$\x27%s\x27" % "".join(f"\\x{byte:02x}" for byte in word))'
mapfile -t words < <(python -c "$quote" "$@")
command+=("${words[@]}")
echo "+ ${command[*]@Q}" >&2
exec "${command[@]}"
