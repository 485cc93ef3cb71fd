# SPDX-License-Identifier: Apache-2.0
import os

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # imports warn of parts that are not used here
