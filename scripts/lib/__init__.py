# SPDX-License-Identifier: Apache-2.0
"""What the commands share."""

import logging
import os
import sys

sys.excepthook = lambda kind, *rest: kind is KeyboardInterrupt or sys.__excepthook__(kind, *rest)  # Ctrl-C
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # imports warn of parts that are not used here
for _package in ("xformers", "bitsandbytes"):  # before any import of diffusers, at which they warn of CUDA code
    logging.getLogger(_package).setLevel(logging.ERROR)
if hasattr(sys.stdout, "reconfigure"):  # to a pipe or file Windows writes cp1252, which cannot hold every path
    sys.stdout.reconfigure(errors="backslashreplace")
