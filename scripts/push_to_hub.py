#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Publish what a training run left: LoRA files, pictures and model card, nothing else.

    python scripts/push_to_hub.py --folder outputs/lcm-lora --hub_model_id me/lcm-lora-of-my-model

For a run that trained where there is no network, or whose own upload failed. The folder is the run's
--output_dir, or a checkpoint in it. Where the Hub fails it is tried again, with growing pauses.
Exit codes: 0 published; 2 wrong usage, an unusable folder, or the Hub refuses; 1 the upload failed.
"""

import argparse
import sys
from pathlib import Path
from types import SimpleNamespace


def parse_args(argv=None):
    """Return the checked flags; wrong ones end the process with exit code 2 and one line."""
    cli = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = cli.add_argument
    add("--folder", required=True, type=Path, metavar="PATH", help="--output_dir of a run, or a checkpoint")
    add("--hub_model_id", metavar="ID", help="Hub repository (default: the folder's name)")
    text = "Hub token (default: the one that `hf auth login` or HF_TOKEN left)"
    add("--hub_token", metavar="TOKEN", help=text)
    args = cli.parse_args(argv)
    if not (args.folder / "pytorch_lora_weights.safetensors").is_file():
        message = f"--folder {args.folder}: holds no pytorch_lora_weights.safetensors; name a finished run"
        cli.exit(2, f"error: {message}\n")
    return args


if __name__ == "__main__":
    ARGS = parse_args()  # before the imports below, which take seconds

sys.path.insert(0, str(Path(__file__).parent.parent))
import train_lcm_lora_sd15 as trainer


def main(args):
    """Return the exit code of an upload."""
    run = SimpleNamespace(
        output_dir=str(args.folder), hub_model_id=args.hub_model_id, hub_token=args.hub_token
    )
    try:
        trainer.make_repository(run)
        print(f"uploaded to {trainer.push(run)}")
    except trainer.UnusableInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except trainer.UploadFailed as error:
        print(f"error: not uploaded: {error}; run the same command again", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(ARGS))
