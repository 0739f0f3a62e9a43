#!/usr/bin/env bash
# Trains on several machines. Run it on each machine, in the same folder of a shared disk:
#
#   HEAD=node1 docs/torchrun.sh mpt/source --data.data_root /shared/data
#
# The first argument is the recipe; the others are passed to `mpt fit`. See docs/multinode.md.
set -euo pipefail

RECIPE=${1:?Expected a recipe: HEAD=node1 $0 mpt/source}
HEAD=${HEAD:?Expected the name or address of one of the machines: HEAD=node1 $0 $RECIPE}
NODES=${NODES:-2} # machines
GPUS=${GPUS:-8}   # processes per machine
RESTARTS=${RESTARTS:-3}

# Look up the address of rank 0 at each restart: its machine may have changed.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

exec torchrun \
  --nnodes "$NODES" --nproc-per-node "$GPUS" --max-restarts "$RESTARTS" \
  --rdzv-backend c10d --rdzv-endpoint "$HEAD:${PORT:-29500}" --rdzv-id "${JOB:-mpt}" \
  -m mpt_lightning fit --config "$RECIPE" --config trainer/multinode \
  --trainer.num_nodes "$NODES" --trainer.devices "$GPUS" --ckpt_path last "${@:2}"
