#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# Encode training shards once, with one GPU for each job of the array. A preempted job requeues itself and resumes.
#
#     SHARDS=/data/laion OUTPUT_DIR=/data/laion-cache VENV=$HOME/lcm \
#         sbatch --array=0-15 scripts/launch/slurm/cache_latents.sh --resolution 1024
#
# Submit it from the repository's folder. Job i of n, 0 to n-1, encodes every n-th shard from the i-th on and writes
# OUTPUT_DIR/part-i; then train with SHARDS='OUTPUT_DIR/part-*/*.tar'. Run some of the 16 again by PARTS=16 and
# `sbatch --array=3,7`. Variables:
#   SHARDS      folder of .tar files              TEACHER     Hub id, folder or file
#   OUTPUT_DIR  folder for the cached shards      OFFLINE=1   nodes without network
#   VENV        virtual environment to activate (default .venv, where it exists)
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
export SLURM_EXPORT_ENV=ALL # after `sbatch --export=NAME=...` srun would pass on those names alone
fail() {
    echo "error: $1" >&2
    exit 2
}
TEACHER=${TEACHER:-stabilityai/stable-diffusion-xl-base-1.0}
[[ -n ${SHARDS:-} ]] || fail "SHARDS is not set; name the folder of shards"
[[ -n ${OUTPUT_DIR:-} ]] || fail "OUTPUT_DIR is not set; name a folder for the cached shards"
if [[ -f ${VENV:-.venv}/bin/activate ]]; then
    # shellcheck disable=SC1091 # the user's environment
    source "${VENV:-.venv}/bin/activate"
elif [[ -n ${VENV:-} ]]; then
    fail "VENV=$VENV: has no bin/activate; name a virtual environment"
fi
if [[ ${OFFLINE:-0} == 1 ]]; then
    export HF_HUB_OFFLINE=1
fi

[[ -n ${SLURM_ARRAY_TASK_ID:-} ]] || fail "is no job of an array; submit it by sbatch --array=0-7"
if [[ -z ${PARTS:-} ]]; then
    [[ $SLURM_ARRAY_TASK_MIN == 0 && $SLURM_ARRAY_TASK_COUNT == $((SLURM_ARRAY_TASK_MAX + 1)) ]] ||
        fail "--array: number the jobs 0 to n-1; to run some of n jobs again, set PARTS=n"
    PARTS=$SLURM_ARRAY_TASK_COUNT
fi
[[ $PARTS =~ ^[1-9][0-9]*$ ]] || fail "PARTS=$PARTS: must be the number of jobs"
((SLURM_ARRAY_TASK_ID < PARTS)) || fail "--array: job $SLURM_ARRAY_TASK_ID is none of $PARTS, 0 to $((PARTS - 1))"
for part in "$OUTPUT_DIR"/part-*; do # of which some shards would be there twice
    number=${part##*/part-}
    [[ -d $part && $number =~ ^[0-9]+$ ]] && ((10#$number >= PARTS)) &&
        fail "$part: is of more than $PARTS jobs; set PARTS to their number"
done
# As the training scripts list a folder, and below it, in an order that is the same on all nodes; each file once, however
# many links lead to it.
mapfile -t all < <(export LC_ALL=C && find -L "$SHARDS/" -mindepth 1 -name '.*' -prune -o -type f -regextype posix-extended \
    -iregex '.*\.(tar|tgz|tbz2?|txz|tar\.(gz|bz2|xz))' -printf '%D:%i %p\n' | sort -k2 |
    awk '!seen[$1]++ { sub(/^[^ ]+ /, ""); print }')
mine=()
for ((i = SLURM_ARRAY_TASK_ID; i < ${#all[@]}; i += PARTS)); do
    mine+=("${all[i]}")
done
[[ ${#mine[@]} != 0 ]] || fail "SHARDS=$SHARDS: holds ${#all[@]} .tar files, none of them for this job"

requeue() { # Nothing has to be saved, because a cached shard is complete or absent.
    # The last job of an array to start has the array's number as its SLURM_JOB_ID. After `scancel JOB` squeue no
    # longer reports RUNNING, and the job must stay ended.
    local job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID now=
    for _ in 1 2 3; do # a busy controller lets squeue time out
        now=$(squeue --noheader --jobs="$job" --format=%T) && break
        sleep 2
    done
    if [[ $now == RUNNING ]]; then
        echo "stopped by a signal: requeued, to make the shards that are missing"
        scontrol requeue "$job"
    else
        echo "stopped by a signal and not requeued, because the job is ${now:-unknown to squeue}; submit it again"
    fi
}
stopped=0
trap stopped=1 USR1 TERM
# Since Slurm 22.05 srun takes the CPUs of a task from this variable alone.
[[ -n ${SLURM_CPUS_PER_TASK:-} ]] && export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
srun python scripts/cache_latents.py --mixed_precision fp16 \
    --pretrained_teacher_model "$TEACHER" --train_shards_path_or_url "${mine[@]}" \
    --output_dir "$OUTPUT_DIR/part-$SLURM_ARRAY_TASK_ID" "$@" &
wait $!
code=$?
# A preemption may signal the step alone, whose code is then 128 + 15.
[[ $stopped == 1 || $code == 143 ]] && requeue
exit "$code"
