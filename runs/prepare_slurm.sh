#!/usr/bin/env bash
#SBATCH --job-name=prepare
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
# Latents on several machines: one torchrun a machine, one rank a device. Pictures, model and the folder of the latents
# lie on a file system that all share. Nothing has to be restarted by hand: what a lost machine had begun is taken over
# by the others, and a job that is run again goes on where it was.
#
#   MANIFEST=work/manifest.parquet MODEL=sd_xl_base_1.0.safetensors OUT=/shared/latents sbatch runs/prepare_slurm.sh
#
# Without Slurm, on one machine:  NPROC=2 MANIFEST=… MODEL=… OUT=… bash runs/prepare_slurm.sh --area 64 --step 16
# What stands behind the script's name goes to `sumizome prepare`.
set -euo pipefail
nproc=${NPROC:-$(nvidia-smi --list-gpus 2>/dev/null | wc -l)}
command=(-m sumizome prepare "$MANIFEST" --model "$MODEL" --out "$OUT" "$@")
if [ -n "${SLURM_JOB_NODELIST:-}" ]; then
  # The rendezvous port is for this job's machines only: keep it on the cluster's own network.
  head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  srun torchrun --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "$nproc" \
    --rdzv-backend c10d --rdzv-endpoint "$head:29500" --rdzv-id "$SLURM_JOB_ID" "${command[@]}"
else
  torchrun --standalone --nproc-per-node "${nproc/#0/1}" "${command[@]}"
fi
