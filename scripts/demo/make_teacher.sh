#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Train a demo teacher again, from nothing: `make_teacher.sh sd15` (pictures, judge, VAE, text encoder, UNet) or
# `make_teacher.sh sdxl` (pictures, text encoders, UNet; judge and VAE are those of sd15); then draw its samples of
# 50 steps, whose features scripts/demo/measure.py compares with.
set -euo pipefail
cd "$(dirname "$0")/../.."
family=${1:?name the family: sd15 or sdxl}
. scripts/environment.sh
export ACCELERATE_USE_CPU=true
parts=()
[ "$family" = sd15 ] || parts=(--parts_from assets/demo-teacher-sd15 --unet_updates 3000)
.venv/bin/torchrun --nproc_per_node 2 scripts/demo/train_teacher.py --family "$family" "${parts[@]}" \
  --output_dir "assets/demo-teacher-$family" --work_dir "outputs/demo-teacher-$family" "${@:2}"
.venv/bin/torchrun --nproc_per_node 2 scripts/demo/measure.py --draw_reference 8 \
  --pretrained_teacher_model "assets/demo-teacher-$family"
