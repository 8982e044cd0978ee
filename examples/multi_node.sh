#!/usr/bin/env bash
# Two machines, each with the ranks of its own devices. On each of them, with its number and the first one's address:
#
#     examples/multi_node.sh 0 FIRST_HOST -- --model DIR_OR_ID --spec ulysses=8,ring=2 --prompt "a cat"
#     examples/multi_node.sh 1 FIRST_HOST -- --model DIR_OR_ID --spec ulysses=8,ring=2 --prompt "a cat"
#
# Ulysses within a machine, where links are fast; a ring across. DEVICES: of each machine; NODES, PORT: as torchrun's.
# XDIT_COMPILE_SECRET, the same text on all machines, signs what ranks tell each other. Their network must be private.
set -euo pipefail
node=$1 host=$2
shift 3
exec python -m torch.distributed.run --nnodes "${NODES:-2}" --node-rank "$node" --nproc-per-node "${DEVICES:-8}" \
    --master-addr "$host" --master-port "${PORT:-29500}" "$(dirname "$0")/image_pipeline.py" "$@"
