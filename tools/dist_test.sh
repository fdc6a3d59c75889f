#!/usr/bin/env bash
# Test with one process a GPU, started by torchrun.
#   bash tools/dist_test.sh CONFIG CHECKPOINT GPUS [arguments of tools/test.py]
# Several nodes: run the same command on each with NNODES, NODE_RANK and MASTER_ADDR set (PORT too
# where 29500 is taken). Without a GPU the processes run on the CPU.
set -euo pipefail
if [ $# -lt 3 ]; then
    sed -n '2,5p' "$0" | cut -c3-
    exit 2
fi
exec "${PYTHON:-python}" -m torch.distributed.run \
    --nnodes="${NNODES:-1}" \
    --node_rank="${NODE_RANK:-0}" \
    --nproc_per_node="$3" \
    --master_addr="${MASTER_ADDR:-127.0.0.1}" \
    --master_port="${PORT:-29500}" \
    "$(dirname "$0")/test.py" "$1" "$2" --launcher pytorch "${@:4}"
