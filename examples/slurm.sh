#!/bin/bash
# Adversarial training on two nodes of eight GPUs, requeued before its time is over and resumed where it was.
#
#     sbatch examples/slurm.sh recipes/cifar10_dm.yaml runs/dm
#     sbatch examples/slurm.sh recipes/cifar10_dm.yaml runs/dm --set parallel=fsdp2    # weights in shards
#
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=B:TERM@300

export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1) MASTER_PORT=29500

srun torchrun --nnodes "$SLURM_NNODES" --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint "$MASTER_ADDR:$MASTER_PORT" \
  --rdzv-id "$SLURM_JOB_ID" -m fastadv.train -c "$1" --out "$2" "${@:3}" &
running=$!

# Five minutes before the end: each process finishes its step, one checkpoint is written, and the job queues again.
trap 'scancel --signal=TERM "$SLURM_JOB_ID.0"; wait "$running"; scontrol requeue "$SLURM_JOB_ID"' TERM
wait "$running"
