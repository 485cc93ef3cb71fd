# SPDX-License-Identifier: Apache-2.0
"""What the commands share."""

import logging
import os

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # imports warn of parts that are not used here
for _package in ("xformers", "bitsandbytes"):  # before any import of diffusers, at which they warn of CUDA code
    logging.getLogger(_package).setLevel(logging.ERROR)
