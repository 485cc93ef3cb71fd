#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# Encode training shards once, one GPU a job of the array; a preempted job requeues itself and goes on.
#
#     SHARDS=/data/laion OUTPUT_DIR=/data/laion-cache sbatch --array=0-15 scripts/slurm/cache_latents.sh \
#         --resolution 1024
#
# Run it from the repository's folder. Job number i of n takes every n-th shard from the i-th on and writes
# OUTPUT_DIR/part-i; then train with --train_shards_path_or_url OUTPUT_DIR/part-*. Variables:
#   SHARDS      folder of .tar files              TEACHER     Hub id, folder or file
#   OUTPUT_DIR  folder for the cached shards      OFFLINE=1   no network on the node
#SBATCH --job-name=cache-latents
#SBATCH --array=0-7
#SBATCH --ntasks=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --output=%x-%A_%a.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@120

set -uo pipefail
TEACHER=${TEACHER:-stabilityai/stable-diffusion-xl-base-1.0}
SHARDS=${SHARDS:?name the folder of shards}
OUTPUT_DIR=${OUTPUT_DIR:?name a folder for the cached shards}
if [[ ${OFFLINE:-0} == 1 ]]; then
    export HF_HUB_OFFLINE=1
fi

mapfile -t all < <(find "$SHARDS" -name '*.tar' | sort)
mine=()
for ((i = SLURM_ARRAY_TASK_ID - SLURM_ARRAY_TASK_MIN; i < ${#all[@]}; i += SLURM_ARRAY_TASK_COUNT)); do
    mine+=("${all[i]}")
done
if [[ ${#mine[@]} == 0 ]]; then
    echo "SHARDS $SHARDS: no .tar file for this job; there are ${#all[@]}"
    exit 2
fi

# shellcheck disable=SC2317 # the trap calls it
requeue() { # a shard is there whole or not at all, so nothing has to be saved
    # A job that `scancel` ends is not running any more, and stays ended.
    if [[ $(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T) == RUNNING ]]; then
        echo "stopped by a signal: requeued, to make the shards that are missing"
        scontrol requeue "$SLURM_JOB_ID"
    fi
}
trap requeue USR1 TERM
srun accelerate launch --config_file scripts/accelerate/single_gpu.yaml scripts/cache_latents.py \
    --pretrained_teacher_model "$TEACHER" --train_shards_path_or_url "${mine[@]}" \
    --output_dir "$OUTPUT_DIR/part-$SLURM_ARRAY_TASK_ID" "$@" &
wait $!
