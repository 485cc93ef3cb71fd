#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Train a demo teacher again, from nothing: `make_teacher.sh sd15` (pictures, judge, VAE, text encoder, UNet) or
# `make_teacher.sh sdxl` (pictures, text encoders, UNet; judge and VAE are those of sd15); then draw its samples of
# 50 steps, whose features scripts/evaluate.py --yardstick compares with.
set -euo pipefail
cd "$(dirname "$0")/../.."
family=${1:?name the family: sd15 or sdxl}
. scripts/dev/environment.sh
export ACCELERATE_USE_CPU=true
parts=()
[ "$family" = sd15 ] || parts=(--parts_from assets/demo-teacher-sd15 --unet_updates 3000)
.venv/bin/torchrun --nproc_per_node 2 scripts/demo/train_teacher.py --family "$family" ${parts[@]+"${parts[@]}"} \
  --output_dir "assets/demo-teacher-$family" --work_dir "outputs/demo-teacher-$family" "${@:2}"
.venv/bin/python scripts/demo/landscapes.py --captions 192 > outputs/demo-prompts.txt
rm -f "assets/demo-teacher-$family/reference.safetensors"
.venv/bin/torchrun --nproc_per_node 2 scripts/evaluate.py --draw_yardstick 8 --batch_size 64 \
  --pretrained_teacher_model "assets/demo-teacher-$family" --prompts_file outputs/demo-prompts.txt \
  --features assets/demo-teacher-sd15/judge.safetensors --clip_model none \
  --yardstick "assets/demo-teacher-$family/reference.safetensors" --output_dir "outputs/demo-yardstick-$family"
