#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# Train on the GPUs of one node; preempted or out of time, the job saves, requeues itself and goes on.
#
#     export SHARDS=/data/laion OUTPUT_DIR=/scratch/me/lcm-lora
#     sbatch scripts/slurm/train_sdxl.sh --max_train_steps 10000
#
# Run it from the repository's folder. What follows the name goes to the training script. Variables:
#   SHARDS      folder of shards, or what --train_shards_path_or_url takes
#   OUTPUT_DIR  on a disk that outlives the job
#   TEACHER     Hub id, folder or file            LOCAL_DISK  node-local disk (default /tmp)
#   STAGE=1     copy SHARDS, a folder, to LOCAL_DISK first
#   OFFLINE=1   no network on the node: fetch the teacher first on another one, with `hf download TEACHER`
# Tokens come from `hf auth login` and `wandb login`; none belongs in this file.
#SBATCH --job-name=lcm-lora-sdxl
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@300

set -uo pipefail
SCRIPT=train_lcm_lora_sdxl.py
TEACHER=${TEACHER:-stabilityai/stable-diffusion-xl-base-1.0}
SHARDS=${SHARDS:?name the training shards}
OUTPUT_DIR=${OUTPUT_DIR:?name a folder on a disk that outlives the job}
PROCESSES=${SLURM_GPUS_ON_NODE:-1}
CONFIG=scripts/accelerate/$([[ $PROCESSES -gt 1 ]] && echo multi_gpu || echo single_gpu).yaml

# Caches and data on the node's own disk, by a name that stays: a resumed run compares the shards' path.
LOCAL=${LOCAL_DISK:-/tmp}/$USER-lcm-lora
export TRITON_CACHE_DIR=$LOCAL/triton TORCHINDUCTOR_CACHE_DIR=$LOCAL/inductor WANDB_CACHE_DIR=$LOCAL/wandb
mkdir -p "$LOCAL/shards"
if [[ ${STAGE:-0} == 1 ]]; then
    cp --update --recursive "$SHARDS/." "$LOCAL/shards/" || exit 2
    SHARDS=$LOCAL/shards
fi
if [[ ${OFFLINE:-0} == 1 ]]; then
    export HF_HUB_OFFLINE=1 WANDB_MODE=offline
fi
# One run in wandb, however often the job is requeued.
export WANDB_RUN_ID=${WANDB_RUN_ID:-lcm-lora-$SLURM_JOB_ID} WANDB_RESUME=allow

# What runs on each node. A signal reaches all processes here: the training processes save a checkpoint and
# exit with 3, which the launcher turns into 1; it ignores signals, as it has to outlive them.
# shellcheck disable=SC2317 # srun calls it
launch() {
    local stopped=0 code
    trap stopped=1 USR1 TERM
    (trap '' USR1 TERM && exec accelerate launch "$@") &
    wait $!
    code=$?
    while kill -0 $! 2>/dev/null; do # a signal ended the wait, not the training
        wait $!
        code=$?
    done
    [[ $code != 0 && $stopped == 1 ]] && exit 3
    exit "$code"
}
export -f launch

# USR1 comes to this shell 300 s before the end, and goes on to the processes of srun.
trap 'scancel --signal=USR1 "$SLURM_JOB_ID"' USR1 TERM
# shellcheck disable=SC2016 # expanded by the inner shell
srun --wait=60 bash -c 'launch "$@"' launch \
    --config_file "$CONFIG" --num_processes "$PROCESSES" "$SCRIPT" \
    --pretrained_teacher_model "$TEACHER" --train_shards_path_or_url "$SHARDS" --output_dir "$OUTPUT_DIR" \
    --resume_from_checkpoint latest "$@" &
wait $!
code=$?
while kill -0 $! 2>/dev/null; do
    wait $!
    code=$?
done
# A job that `scancel` ends is not running any more, and stays ended.
if [[ $code == 3 && $(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T) == RUNNING ]]; then
    echo "stopped by a signal: requeued, to go on from the newest checkpoint"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
