#!/bin/bash
# Slurm: sbatch --nodes 4 recipes/machines/slurm.sh recipes/cifar10/resnet44_gbn.yaml --rung ra --out runs
# Preempted, or two minutes before its time is up, the run saves; requeued or submitted again, it goes on.
#SBATCH --job-name=gbnzoo
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --signal=TERM@120
#SBATCH --requeue
export MAIN_PROCESS_IP=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export NUM_PROCESSES=$((SLURM_JOB_NUM_NODES * SLURM_GPUS_ON_NODE))
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=90
# SLURM_NODEID is another one on each node: it is read there.
srun --kill-on-bad-exit=1 bash -c 'exec accelerate launch --config_file recipes/machines/nodes.yaml \
    --num_machines "$SLURM_JOB_NUM_NODES" --num_processes "$NUM_PROCESSES" \
    --machine_rank "$SLURM_NODEID" --main_process_ip "$MAIN_PROCESS_IP" \
    -m gbnzoo.train "$@" --processes "$NUM_PROCESSES" --resume' gbnzoo "$@"
