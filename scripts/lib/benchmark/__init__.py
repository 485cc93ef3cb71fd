# SPDX-License-Identifier: Apache-2.0
import logging
import os

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # imports warn of parts that are not used here
for package in ("xformers", "bitsandbytes"):
    logging.getLogger(package).setLevel(logging.ERROR)
