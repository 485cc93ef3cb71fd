# SPDX-License-Identifier: Apache-2.0
"""What scripts/evaluate.py is made of: feature models, statistics, the report."""
