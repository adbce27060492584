#!/usr/bin/env bash
# One training stage on several machines under Slurm:
#
#   sbatch --nodes 2 configs/cluster/slurm.sh stage1 configs/cluster/ddp-2x8.yaml
#
# Submit it from the project folder, which all machines must share. One task a machine; accelerate starts one
# process for each of its GPUs. Before the time limit Slurm sends SIGUSR1, on which the training saves and exits
# (after a SIGTERM the launcher would give it only 30 seconds). Submit it again to resume. Afterwards `dvc commit stage1`
# tells DVC that the stage was run.
#SBATCH --job-name=vlv
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
#SBATCH --output=work/slurm-%j.log
set -euo pipefail

stage="${1:?which stage: stage1 or stage2}"
plan="${2:?which accelerate file, such as configs/cluster/ddp-2x8.yaml}"
gpus="${SLURM_GPUS_ON_NODE:-8}"
main="$(scontrol show hostnames "${SLURM_JOB_NODELIST:?to be run by sbatch}" | head -n 1)"

# Each machine has its own SLURM_NODEID, so it is read there and not here.
# shellcheck disable=SC2016
srun --kill-on-bad-exit=1 bash -c '
  trap "" USR1 # the launcher ignores it, its processes handle it
  exec accelerate launch --config_file "$1" \
    --num_machines "$SLURM_NNODES" --num_processes "$((SLURM_NNODES * $3))" --machine_rank "$SLURM_NODEID" \
    --main_process_ip "$4" --main_process_port 29500 -m vlv run "$2"
' worker "$plan" "$stage" "$gpus" "$main"
