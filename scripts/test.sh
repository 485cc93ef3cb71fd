#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Lint and tests; sets up the environment first. Arguments go to pytest: bash scripts/test.sh tests/test_math.py -x
# With --gpu first, only the tests that need a CUDA GPU run: bash scripts/test.sh --gpu -k attention
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/dev/environment.sh
if [ "${1:-}" = --gpu ]; then
  shift
  exec .venv/bin/python -m pytest -n 0 -m gpu -rs tests/test_gpu.py "$@"
fi
.venv/bin/ruff check --quiet .
.venv/bin/ruff format --check --quiet .
.venv/bin/python scripts/dev/check_shared.py
exec .venv/bin/python -m pytest "$@"
