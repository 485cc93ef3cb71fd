#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Distil a LoRA of few steps from a small teacher in assets/, and show what it is worth: in a grid and in a table.
# `demo.sh` takes the Stable Diffusion 1.5 one, `demo.sh sdxl` that of SDXL.
# Needs Python 3.11 or later and two CPU cores. A second run reuses what is there; delete outputs/ to start over.
set -euo pipefail
cd "$(dirname "$0")/.."
family=${1:-sd15}
case $family in
  sd15) data=outputs/demo-data kind=() updates=360 ;;
  sdxl) data=outputs/demo-data-varied kind=(--varied) updates=270 ;;
  *) echo "error: $family: name sd15 or sdxl" >&2; exit 2 ;;
esac
teacher=assets/demo-teacher-$family out=outputs/demo-$family
. scripts/dev/environment.sh
export PATH=$PWD/.venv/bin:$PATH ACCELERATE_USE_CPU=true

say() { printf '\n== %s\n' "$*"; }

say "1/4 pictures to train on: $data"
if [ ! -e "$data/complete" ]; then
  python scripts/demo/landscapes.py --output_dir "$data" --num_samples 8000 ${kind[@]+"${kind[@]}"}
  touch "$data/complete"
fi

say "2/4 training: $out"
if [ ! -e "$out/pytorch_lora_weights.safetensors" ]; then
  torchrun --nproc_per_node 2 "train_lcm_lora_$family.py" \
    --pretrained_teacher_model "$teacher" --train_shards_path_or_url "$data" --output_dir "$out" \
    --resolution 64 --train_batch_size 16 --max_train_steps "$updates" --learning_rate 2e-3 \
    --lr_scheduler linear --lora_rank 32 --num_ddim_timesteps 20 --w_min 5.5 --w_max 7.5 \
    --loss_space epsilon --phases 2 --vae_encode_batch_size 16 --validation_steps 180 --checkpointing_steps 90 \
    --checkpoints_total_limit 1 --dataloader_num_workers 0
fi

say "3/4 pictures: $out/grid.png, $out/strip/strip.png"
if [ ! -e "$out/grid.png" ]; then
  python scripts/sample.py --pretrained_teacher_model "$teacher" --lora "$out" --output_dir "$out" \
    --samplers ddim dpmsolver++ lcm-lora-euler --prompts \
    "mountains at sunset with clouds and a balloon" "sea at night with a clear sky and a lighthouse" \
    "forest at noon with snow and a house"
fi
if [ ! -e "$out/strip/strip.png" ]; then
  python scripts/sample.py --pretrained_teacher_model "$teacher" --lora "$out" --output_dir "$out/strip" --strip \
    --samplers ddim lcm-lora-euler --base_steps 50 4 --steps 4 --prompts \
    "mountains at sunset with clouds and a balloon" "sea at night with a clear sky and a lighthouse" \
    "forest at noon with snow and a house" "desert at dawn with a clear sky and a tent" \
    "hills at noon with clouds and a windmill" "sea at dawn with clouds and a lighthouse" \
    "desert at sunset with a clear sky and birds"
fi

say "4/4 table: $out/evaluation/table.md, report.html"
if [ ! -e "$out/evaluation/results.json" ]; then
  torchrun --nproc_per_node 2 scripts/evaluate.py --pretrained_teacher_model "$teacher" \
    --lora "$out" --yardstick "$teacher/reference.safetensors" \
    --features assets/demo-teacher-sd15/judge.safetensors --clip_model none --num_images 128 --batch_size 64 \
    --guidance_scale 7.5 2 3 5 --samplers dpmsolver++ lcm-without-lora lcm-lora-euler \
    --output_dir "$out/evaluation"
else
  sed '/^Teacher/q' "$out/evaluation/table.md"
fi
