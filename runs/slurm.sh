#!/usr/bin/env bash
# A run of any length on a Slurm cluster, in jobs that follow one another:   sbatch --nodes 32 runs/slurm.sh run.toml
#
# One torchrun a node starts one process a card. Slurm sends SIGTERM two minutes before the time limit, and when the job
# is preempted: every rank finishes its step, the checkpoint is written, and the job puts itself back in the queue. After
# a node's failure it does the same, on whatever nodes it gets; their number may change between jobs as long as it
# divides micro_batches_per_step. A run that is done, or an error that would come again, ends the chain.
# `scancel --signal=USR1 JOB` writes a checkpoint and trains on.
#SBATCH --job-name=sumizome
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=sumizome-%j.log
set -uo pipefail
run=$1
shift
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
started=$(date +%s)

# Slurm signals every process of a step, and the workers set their own handlers. torchrun itself would die of SIGUSR1, and
# kill its workers 30 s after SIGTERM, which is too soon for a large checkpoint: it ignores both, where it can be told to.
srun --kill-on-bad-exit=1 bash -c '
  trap "" USR1
  patient=()
  if torchrun --help | grep -q -- --signals-to-handle; then
    trap "" TERM
    patient=(--signals-to-handle SIGINT,SIGHUP,SIGQUIT)
  fi
  exec torchrun "${patient[@]}" --nnodes "$SLURM_NNODES" --nproc-per-node "${SLURM_GPUS_ON_NODE:-8}" \
    --rdzv-backend c10d --rdzv-endpoint "'"$first"':29500" --rdzv-id "$SLURM_JOB_ID" \
    -m sumizome train "$@"' train "$run" "$@"
status=$?

# torchrun says 0 when all steps are done and 1 for everything else: an error of settings comes at once, a stop does not.
if [ "$status" -ne 0 ] && [ $(($(date +%s) - started)) -gt 600 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
