# SPDX-License-Identifier: Apache-2.0
"""What the commands share."""

import logging
import os
import sys


def write_whole(path, text):
    """Write a file whole or not at all; several processes may write the same one at a time."""
    scratch = path.with_name(f".writing-{os.getpid()}-{path.name}")
    scratch.write_text(text, encoding="utf-8")
    os.replace(scratch, path)


def without_traceback(kind, error, trace):
    if kind is PermissionError:  # of any path, which pathlib raises below a folder that may not be entered
        print(f"error: {error.filename}: {error.strerror}; give this user the right, or name another", file=sys.stderr)
        os._exit(2)
    return kind is KeyboardInterrupt or sys.__excepthook__(kind, error, trace)


sys.excepthook = without_traceback
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # imports warn of parts that are not used here
for _package in ("xformers", "bitsandbytes"):  # before any import of diffusers, at which they warn of CUDA code
    logging.getLogger(_package).setLevel(logging.ERROR)
if hasattr(sys.stdout, "reconfigure"):  # to a pipe or file Windows writes cp1252, which cannot hold every path
    sys.stdout.reconfigure(errors="backslashreplace")
