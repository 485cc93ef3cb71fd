#!/usr/bin/env bash
# Train the demo teacher again, from nothing: pictures, judge, VAE, text encoder and UNet.
set -euo pipefail
cd "$(dirname "$0")/../.."
# glibc gives every large tensor back to the kernel and takes it again; keeping it speeds training up several times.
export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=17179869184 MALLOC_TOP_PAD_=536870912
export OMP_NUM_THREADS=1 ACCELERATE_USE_CPU=true TOKENIZERS_PARALLELISM=false
exec .venv/bin/torchrun --nproc_per_node 2 scripts/demo/train_teacher.py \
  --output_dir assets/demo-teacher-sd15 --work_dir outputs/demo-teacher-sd15 "$@"
