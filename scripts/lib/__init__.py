# SPDX-License-Identifier: Apache-2.0
"""What the commands share."""

import logging

for _package in ("xformers", "bitsandbytes"):  # before any import of diffusers, at which they warn of CUDA code
    logging.getLogger(_package).setLevel(logging.ERROR)
