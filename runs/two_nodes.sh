#!/usr/bin/env bash
# One run over two machines, without a batch system. Start this on both, with the same arguments but for the number:
#
#     runs/two_nodes.sh 0 node-a run.toml      on node-a
#     runs/two_nodes.sh 1 node-a run.toml      on node-b
#
# Both need the same version installed, and model, latents and run_dir at the same paths (a shared file system; latents
# may be on S3). With `parallel.strategy = "hybrid"` weights are cut up within a machine and repeated across the two.
# Either machine may be lost at any time: start both again and training goes on from the last checkpoint.
# The rendezvous port speaks no password: keep it inside a private network.
set -euo pipefail
node=$1 first=$2 run=$3
cards=${CARDS:-$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)}

exec torchrun \
  --nnodes 2 --node-rank "$node" --nproc-per-node "${cards/#0/1}" \
  --master-addr "$first" --master-port "${PORT:-29500}" \
  -m sumizome train "$run" "${@:4}"
