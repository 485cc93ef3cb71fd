#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Lint and tests; sets up the environment first. Arguments go to pytest: bash scripts/test.sh tests/test_math.py -x
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/dev/environment.sh
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/python scripts/dev/check_shared.py
exec .venv/bin/python -m pytest "$@"
