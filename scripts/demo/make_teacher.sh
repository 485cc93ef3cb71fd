#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Train the demo teacher again, from nothing: pictures, judge, VAE, text encoder and UNet.
set -euo pipefail
cd "$(dirname "$0")/../.."
. scripts/environment.sh
export ACCELERATE_USE_CPU=true
exec .venv/bin/torchrun --nproc_per_node 2 scripts/demo/train_teacher.py \
  --output_dir assets/demo-teacher-sd15 --work_dir outputs/demo-teacher-sd15 "$@"
