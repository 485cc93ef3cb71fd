#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Measure speed and memory on this machine: training steps, the data loader, drawing.

    python scripts/benchmark.py train --all --minutes 8 --json outputs/gpu.json --markdown outputs/gpu.md
    python scripts/benchmark.py train --model sdxl --train_batch_size 4 --mixed_precision fp16 \\
        --gradient_checkpointing --json outputs/one.json
    python scripts/benchmark.py table outputs/gpu.json        # the table of README.md and docs/performance.md
    python scripts/benchmark.py loader --output_dir outputs/loader
    python scripts/benchmark.py inference --random_weights sdxl --batch_sizes 1 8 --json outputs/times.json

`COMMAND --help` describes each command. Exit codes: 0 done; 2 wrong usage or unusable input; 1 anything else.
"""

import argparse
import sys
from itertools import chain
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]
from lib.benchmark import sweep, table
from lib.benchmark.sweep import KNOWN_MODELS, REAL_MODELS, RECIPES

TRAIN_HELP = """Measure training steps: samples/s, peak memory, share of the matmul rate.

`ours` is the training script's own step. `reference` is the recipe in common use, written plainly in
lib/benchmark/reference_recipe.py. Flags that are not listed here go to the training script, for both. Weights of
sd15, sdxl and ssd1b are random, in the published configurations; the pictures are made up.

Each measurement is a process of its own, and the recipes take turns. Memory is the peak of the updates: allocated
and reserved by CUDA's allocator, or resident beyond a process that has imported its packages. Model FLOPs are the
least that a step needs. Ratios are ours / reference, by round.
--all measures a fixed list of cases, the most telling ones first, within --minutes, and writes every row as soon
as it is measured."""
LOADER_HELP = """Measure the loader on one core: pictures a second from shards to batches, beside plain decoding.

The shards hold JPEGs made on the spot (noise at every scale, quality 90). Measured are the trainer's stream with
its shuffle, filters, crop and batches, without loader workers, and Pillow's full-size decoding of the same bytes.
JPEGs of twice the training size or more are decoded at half size, so the loader can be the faster of the two.
Rates are pictures per CPU second, so that other work on the machine counts for little."""
INFERENCE_HELP = """Time 4 steps with an LCM-LoRA against 25 steps of the standard pipeline.

--random_weights draws noise with the real architecture and a random LoRA of rank 64, in the real time. Standard
rows have no LoRA layers, the model's own scheduler and guidance 7.5, so two UNet evaluations a step; LCM rows have
guidance 1 and one. A cell is the median of --repeats runs after two that do not count (in them --compile
compiles). Rows are appended to --json."""


class OneLineErrors(argparse.ArgumentParser):
    """A parser of the tool or of one command, with its text as it is written and errors of one line."""

    def __init__(self, **options):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options)

    def error(self, message):
        self.exit(2, f"error: {message}\n")


def add_train(commands):
    cli = commands.add_parser("train", description=TRAIN_HELP)
    add = cli.add_argument
    add("--model", default="demo", help=f"{', '.join(KNOWN_MODELS)}, or a diffusers folder (default: demo)")
    add("--recipe", nargs="+", choices=RECIPES, default=RECIPES, help="what to measure (default: both)")
    add("--cached", action="store_true", help="`ours` trains from cached latents and text")
    add("--warmup_steps", type=positive, default=3, metavar="N", help="updates before the clock (default: 3)")
    add("--steps", type=positive, default=5, metavar="N", help="timed updates of a measurement (default: 5)")
    add("--repeats", type=positive, default=3, metavar="N", help="rounds of each recipe (default: 3; --all: 1)")
    add("--json", type=Path, metavar="FILE", help="figures as JSON")
    add("--all", action="store_true", help="measure the list of cases; give no --model and no trainer flags")
    add("--tiny", action="store_true", help="--all with the demo teachers at 64 px, to try it on a CPU")
    add("--minutes", type=float, default=8, metavar="M", help="time for --all (default: %(default)s)")
    add("--markdown", type=Path, metavar="FILE", help="table of --all as Markdown")


def add_loader(commands):
    cli = commands.add_parser("loader", description=LOADER_HELP)
    add = cli.add_argument
    add("--output_dir", required=True, type=Path, metavar="DIR", help="folder for loader.json")
    cases = [(512, 512), (768, 512), (1024, 512), (1024, 1024)]
    text = "side of the pictures and training resolution, px (default: 512:512 768:512 1024:512 1024:1024)"
    add("--cases", nargs="+", default=cases, type=loader_case, metavar="SIDE:RESOLUTION", help=text)
    add("--pictures", type=positive, default=64, metavar="N", help="of one measurement (default: %(default)s)")
    add("--repeats", type=positive, default=7, metavar="N", help="of each measurement (default: %(default)s)")


def add_inference(commands):
    from lib.cli import add_model_flags

    cli = commands.add_parser("inference", description=INFERENCE_HELP)
    add = add_model_flags(cli, required=False)
    add("--random_weights", choices=REAL_MODELS, help="in place of a model: its architecture, random weights")
    add("--lora", metavar="PATH", help="LCM-LoRA of --pretrained_teacher_model (default: a random one)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: %(default)s)")
    add = cli.add_argument_group("measurement").add_argument
    text = "pictures drawn together, each a column of rows (default: 1)"
    add("--batch_sizes", nargs="+", type=positive, default=[1], metavar="N", help=text)
    add("--lcm_steps", type=int, default=4, metavar="N", help="steps with the LoRA (default: %(default)s)")
    add("--steps", type=int, default=25, metavar="N", help="steps without it (default: %(default)s)")
    add("--resolution", type=int, metavar="PX", help="side in px, multiple of 8 (default: the model's)")
    add("--repeats", type=positive, default=3, metavar="N", help="runs a cell (default: %(default)s)")
    add("--compile", action="store_true", help="also with the UNet through torch.compile")
    text = "add the LoRA into the weights, as one does to serve it (default: beside them, as loaded)"
    add("--fuse_lora", action="store_true", help=text)
    add("--json", type=Path, metavar="FILE", help="list of rows to append to (default: none)")


def add_table(commands):
    cli = commands.add_parser("table", description="Write the GPU table of README.md and docs/performance.md.")
    text = "JSON of `train --all`; none: the places read `not measured`"
    cli.add_argument("figures", type=Path, nargs="?", metavar="FILE", help=text)


def positive(text):
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be at least 1")
    return int(text)


def loader_case(text):
    side, resolution = (positive(part) for part in text.split(":"))
    return side, resolution


def check_train(args, words, error):
    """End with exit code 2 where the flags of `train` contradict each other."""
    if args.all:
        if words or args.model != "demo" or args.cached:
            given = " ".join([*words, *["--cached"] * args.cached, *["--model"] * (args.model != "demo")])
            error(f"--all has cases of its own: leave out {given}")
        if not args.json:
            error("--all: give --json FILE, which keeps the rows of a run that is cut short")
    elif args.model not in KNOWN_MODELS and not (Path(args.model) / "model_index.json").is_file():
        error(f"--model {args.model}: must be {', '.join(KNOWN_MODELS)}, or a folder with model_index.json")


def check_inference(args, error):
    """End with exit code 2 where the flags of `inference` are wrong."""
    from lib.cli import lora_problems, model_problems, step_problems

    model, side = args.pretrained_teacher_model, args.resolution
    found = chain(
        [
            (bool(model) == bool(args.random_weights), "give --pretrained_teacher_model or --random_weights"),
            (args.lora and not model, f"--lora {args.lora}: needs --pretrained_teacher_model"),
            (side is not None and (side < 8 or side % 8), f"--resolution {side}: give a multiple of 8"),
            (args.json and args.json.is_dir(), f"--json {args.json}: is a folder"),
        ],
        step_problems([args.lcm_steps], ["lcm-lora"]), step_problems([args.steps], []),
        model_problems(args) if model else (), lora_problems([(args.lora, 1)] * bool(args.lora)),
    )  # fmt: skip
    for is_wrong, message in found:
        if is_wrong:
            error(message)


def parse_args(argv=None):
    """Return (checked flags, words for the training script); wrong flags exit with 2 and one line."""
    parser = OneLineErrors(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (add_train, add_loader, add_inference, add_table):
        add(commands)
    error = parser.error
    args, words = parser.parse_known_args(argv)
    if args.command != "train" and words:
        error(f"unrecognized arguments: {' '.join(words)}")
    if args.command == "train":
        check_train(args, words, error)
    elif args.command == "inference":
        check_inference(args, error)
    elif args.command == "table" and args.figures and not args.figures.is_file():
        error(f"{args.figures}: no such file; `train --all --json FILE` writes one")
    return args, words


def main(args, words):
    """Run the command; return the exit code. What imports torch is imported here, after the flags are checked."""
    if args.command == "table":
        return table.write_tables(args.figures)
    if args.command == "train":
        return sweep.measure_all(args) if args.all else sweep.measure_one(args, words)
    if args.command == "loader":
        from lib.benchmark.loader_speed import measure_loader as measure
    else:
        from lib.benchmark.inference_speed import measure_inference as measure
    from lib.trainers import exit_code

    return exit_code(measure, args)


if __name__ == "__main__":
    sys.exit(main(*parse_args()))
