# SPDX-License-Identifier: Apache-2.0
"""The two training scripts as modules, for the tools: one reader of shards, one opener of pictures, one loader."""

import os
import signal
import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import train_lcm_lora_sd15 as sd15
import train_lcm_lora_sdxl as sdxl

if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # as `started` leaves it
    signal.signal(signal.SIGINT, signal.default_int_handler)
if ("TORCHELASTIC_RUN_ID" if "RANK" in os.environ else "ACCELERATE_DYNAMO_MODE") in os.environ:
    sd15.end_with_parent(signal.SIGTERM)  # torchrun may be killed; `accelerate launch` passes no signal on
UnusableInput = sd15.UnusableInput
INPUT_ERRORS = (sd15.UnusableInput, sdxl.UnusableInput)  # each script has a class of its own
DTYPES = sd15.DTYPES


def exit_code(main, args):
    """Return what `main(args)` returns, or 2 after one line for input that cannot be used."""
    try:
        return main(args) or 0
    except INPUT_ERRORS as error:
        traceback.clear_frames(error.__traceback__)  # frees the bars, which are then closed above the line
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped by SIGINT", file=sys.stderr)
        return 128 + signal.SIGINT
