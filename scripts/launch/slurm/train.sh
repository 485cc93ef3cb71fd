#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# Train on one or several nodes. A job that is preempted or out of time saves a checkpoint, requeues itself and
# resumes.
#
#     export SHARDS=/data/laion OUTPUT_DIR=/scratch/me/lcm-lora VENV=$HOME/lcm
#     sbatch scripts/launch/slurm/train.sh --max_train_steps 10000
#     MODEL=sd15 RECIPE=sd15-80gb sbatch --nodes=2 scripts/launch/slurm/train.sh --max_train_steps 10000
#
# Submit it from the repository's folder. Words after the script's name go to the training script. Variables:
#   SHARDS      folder of shards, or whatever --train_shards_path_or_url accepts
#   OUTPUT_DIR  folder on a disk that outlives the job and that all nodes see
#   MODEL       sdxl (default) or sd15            TEACHER     Hub id, folder or file
#   RECIPE      file of scripts/launch/recipes without .txt (default MODEL-24gb), a path, or none; on 8 GPUs an update
#               then has 128 samples, with --train_batch_size 2 --gradient_accumulation_steps 1 it has 16
#   VENV        virtual environment to activate (default .venv, where it exists)
#   LOCAL_DISK  node-local disk (default /tmp)    STAGE=1     copy SHARDS, a folder, to LOCAL_DISK first
#   OFFLINE=1   nodes without network: first fetch the teacher elsewhere with `hf download TEACHER`, and for SDXL the
#               VAE with `hf download madebyollin/sdxl-vae-fp16-fix`, and a LoRA that --init_lora names by its Hub id
# Tokens come from `hf auth login` and `wandb login`; none belongs in this file.
#SBATCH --job-name=lcm-lora
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
export SLURM_EXPORT_ENV=ALL # after `sbatch --export=NAME=...` srun would pass on those names alone
fail() {
    echo "error: $1" >&2
    exit 2
}
# No longer RUNNING once `scancel JOB` or a requeue ends the job; nothing where squeue gets no answer.
state() {
    for _ in 1 2 3; do # a busy controller lets it time out
        squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T && return
        sleep 2
    done
}
requeue() { # unless `scancel JOB` ends the job, which must then stay ended
    local now
    now=$(state)
    if [[ $now == RUNNING ]]; then
        echo "stopped by a signal: requeued, to go on from the newest checkpoint"
        scontrol requeue "$SLURM_JOB_ID"
    else
        echo "stopped by a signal and not requeued, because the job is ${now:-unknown to squeue}; submit it again to go on"
    fi
}
# Before training nothing has to be saved. A command is waited for in the background, because bash runs a trap only then.
trap 'requeue; exit 3' USR1 TERM
MODEL=${MODEL:-sdxl}
case $MODEL in
    sd15) TEACHER=${TEACHER:-stable-diffusion-v1-5/stable-diffusion-v1-5} ;;
    sdxl) TEACHER=${TEACHER:-stabilityai/stable-diffusion-xl-base-1.0} ;;
    *) fail "MODEL=$MODEL: must be sd15 or sdxl" ;;
esac
[[ -n ${SHARDS:-} ]] || fail "SHARDS is not set; name the training shards"
[[ -n ${OUTPUT_DIR:-} ]] || fail "OUTPUT_DIR is not set; name a folder on a disk that outlives the job"

RECIPE=${RECIPE:-$MODEL-24gb}
flags=()
if [[ $RECIPE != none ]]; then
    [[ -f $RECIPE ]] || RECIPE=scripts/launch/recipes/$RECIPE.txt
    [[ -f $RECIPE ]] || fail "RECIPE: there is no $RECIPE; ls scripts/launch/recipes lists the recipes"
    flags+=("@$RECIPE")
fi
if [[ -f ${VENV:-.venv}/bin/activate ]]; then
    # shellcheck disable=SC1091 # the user's environment
    source "${VENV:-.venv}/bin/activate"
elif [[ -n ${VENV:-} ]]; then
    fail "VENV=$VENV: has no bin/activate; name a virtual environment"
fi

# Each training process gets its share of the CPUs for loader workers and keeps one for itself.
# Where GPUs are no resource of Slurm's (gres), it does not tell how many a node has.
GPUS=${SLURM_GPUS_ON_NODE:-$(nvidia-smi -L 2>/dev/null | grep -c '^GPU ')} NNODES=${SLURM_NNODES:-1}
((GPUS > 0)) || GPUS=1
((${SLURM_NTASKS:-$NNODES} == NNODES)) || fail "--ntasks: give one task a node; it starts a process for each GPU"
WORKERS=$((${SLURM_CPUS_PER_TASK:-$GPUS} / GPUS - 1))
flags+=(--dataloader_num_workers $((WORKERS < 0 ? 0 : WORKERS > 8 ? 8 : WORKERS)))

# Since Slurm 22.05 srun takes the CPUs of a task from this variable alone.
[[ -n ${SLURM_CPUS_PER_TASK:-} ]] && export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK

# Caches and data lie on the node's own disk. The path must not change between jobs, because a resumed run compares
# the shards' path.
LOCAL=${LOCAL_DISK:-/tmp}/lcm-lora-$(id -u)
export TRITON_CACHE_DIR=$LOCAL/triton TORCHINDUCTOR_CACHE_DIR=$LOCAL/inductor WANDB_CACHE_DIR=$LOCAL/wandb
srun mkdir -p "$LOCAL" &
wait $! || fail "LOCAL_DISK: $LOCAL cannot be made on every node"
if [[ ${STAGE:-0} == 1 ]]; then
    # A folder for each set of files, which has its name once it is whole: no job reads another's shards or half a copy.
    [[ -d $SHARDS ]] || fail "SHARDS=$SHARDS: STAGE=1 copies a folder; name one"
    STAGED=$LOCAL/shards-$( (echo "$SHARDS" && find -L "$SHARDS/" -type f -printf '%P %s\n' | sort) | cksum | cut -d' ' -f1)
    # shellcheck disable=SC2016 # expanded by the inner shell
    srun bash -c 'set -o pipefail
        copy() { tar -ch -C "$1" --null -T <(cd "$1" && find -L . -type f -print0) | tar -x -C "$2"; } # follows links
        [[ -d $2 ]] || { rm -rf "$2.$3" && mkdir "$2.$3" && copy "$1" "$2.$3" && mv -T "$2.$3" "$2"; } ||
            { rm -rf "$2.$3"; [[ -d $2 ]]; }' \
        stage "$SHARDS" "$STAGED" "$SLURM_JOB_ID" &
    wait $! || fail "SHARDS=$SHARDS: cannot be copied to $LOCAL"
    SHARDS=$STAGED
fi
if [[ ${OFFLINE:-0} == 1 ]]; then
    export HF_HUB_OFFLINE=1 WANDB_MODE=offline
fi
# torchrun kills processes that do not end within it, and they need an update or more and a checkpoint's time.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}
# One run in wandb, however often the job is requeued; a checkpoint of it has its id, also for a job of another number.
export WANDB_RESUME=allow
grep -qs '"wandb_run": "' "$OUTPUT_DIR"/checkpoint-*/checkpoint.json ||
    export WANDB_RUN_ID=${WANDB_RUN_ID:-lcm-lora-$SLURM_JOB_ID}

# One process is started with plain python, several with torchrun.
if ((NNODES * GPUS == 1)); then
    launcher=(python)
else
    HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    launcher=(torchrun --nnodes "$NNODES" --nproc_per_node "$GPUS")
    launcher+=(--master_addr "$HEAD" --master_port $((20000 + SLURM_JOB_ID % 20000)))
fi

# What runs on each node. A signal reaches every process of the step: the training processes save a checkpoint and
# exit with 3, which torchrun turns into 1. torchrun starts with the signals ignored, because it has to outlive them.
# shellcheck disable=SC2317,SC2329 # srun calls it
launch() {
    local stopped=0 code command=("$@")
    if [[ $1 == torchrun ]]; then
        command=(torchrun --node_rank "$SLURM_NODEID" "${@:2}")
    fi
    trap stopped=1 USR1 TERM
    (trap '' USR1 TERM && exec "${command[@]}") &
    wait $!
    while kill -0 $! 2>/dev/null; do wait $!; done # a signal ended the wait, not the training
    wait $!                                        # it may have ended while the trap ran; bash keeps its code
    code=$?
    [[ $code != 0 && $stopped == 1 ]] && exit 3
    exit "$code"
}
export -f launch

# Slurm sends USR1 to this shell 300 s before the end; scancel passes it on to the processes of srun. Those of a job that
# is being ended have had TERM, and scancel would try again and again to signal them.
trap '[[ $(state) =~ ^(RUNNING)?$ ]] && scancel --signal=USR1 "$SLURM_JOB_ID"' USR1 TERM
# shellcheck disable=SC2016 # expanded by the inner shell
srun --wait=60 bash -c 'launch "$@"' launch \
    "${launcher[@]}" "train_lcm_lora_$MODEL.py" "${flags[@]}" \
    --pretrained_teacher_model "$TEACHER" --train_shards_path_or_url "$SHARDS" --output_dir "$OUTPUT_DIR" \
    --resume_from_checkpoint latest "$@" &
wait $!
while kill -0 $! 2>/dev/null; do wait $!; done
wait $!
code=$?
[[ $code == 3 ]] && requeue
exit "$code"
