#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Measure speed and memory on this machine: training steps and the data loader.

    python scripts/benchmark.py train --all --minutes 8 --json outputs/gpu.json
    python scripts/benchmark.py train --model sdxl --train_batch_size 4 --mixed_precision fp16 \\
        --gradient_checkpointing --json outputs/one.json
    python scripts/benchmark.py table outputs/gpu.json        # the table of README.md and docs/performance.md
    python scripts/benchmark.py loader --output_dir outputs/loader
"""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]
from lib import cli
from lib.benchmark import sweep, table
from lib.benchmark.sweep import KNOWN_MODELS, RECIPES

TRAIN_HELP = """Measure training steps: samples/s, peak memory, share of the matmul rate.

`ours` is the training script's own step. `reference` is the recipe in common use, written plainly in
lib/benchmark/reference_recipe.py. Flags that are not listed here go to the training script, for both. Weights of
sd15, sdxl and ssd1b are random, in the published configurations; the pictures are made up.

Each measurement is a process of its own, and the recipes take turns. Memory is the peak of the updates: allocated
and reserved by CUDA's allocator, or resident beyond a process that has imported its packages. FLOPs are those
of an update, with what checkpointing computes again. Ratios are ours / reference, by round.
--all measures a fixed list of cases, the most telling first, within --minutes, and writes each row at once."""
LOADER_HELP = """Measure the loader on one core: pictures a second from shards to batches, beside plain decoding.

The shards hold JPEGs made on the spot (noise at every scale, quality 90). Measured are the trainer's stream with
its shuffle, filters, crop and batches, without loader workers, and Pillow's full-size decoding of the same bytes.
JPEGs of twice the training size or more are decoded at half size, so the loader can be the faster of the two.
Rates are pictures per CPU second, so that other work on the machine counts for little."""


def add_train(commands):
    add = commands.add_parser("train", description=TRAIN_HELP).add_argument
    add("--model", default="demo", help=f"{', '.join(KNOWN_MODELS)}, or a diffusers folder (default: demo)")
    add("--recipe", nargs="+", choices=RECIPES, default=RECIPES, help="what to measure (default: both)")
    add("--cached", action="store_true", help="`ours` trains from cached latents and text")
    add("--warmup_steps", type=cli.COUNT, default=3, metavar="N", help="updates before the clock (default: 3)")
    add("--steps", type=cli.COUNT, default=5, metavar="N", help="timed updates of a measurement (default: 5)")
    add("--repeats", type=cli.COUNT, default=3, metavar="N", help="rounds of each recipe (default: 3; --all: 1)")
    add("--json", type=Path, metavar="FILE", help="figures as JSON")
    add("--all", action="store_true", help="measure the list of cases; give no --model and no trainer flags")
    add("--tiny", action="store_true", help="--all with the demo teachers at 64 px, to try it on a CPU")
    add("--minutes", type=cli.within(float, 0, 1e5), default=8, metavar="M", help="time for --all (default: 8)")


def add_loader(commands):
    add = commands.add_parser("loader", description=LOADER_HELP).add_argument
    add("--output_dir", required=True, type=Path, metavar="DIR", help="folder for loader.json")
    cases = [(512, 512), (768, 512), (1024, 512), (1024, 1024)]
    text = "side of the pictures and training resolution, px (default: 512:512 768:512 1024:512 1024:1024)"
    add("--cases", nargs="+", default=cases, type=loader_case, metavar="SIDE:RESOLUTION", help=text)
    add("--pictures", type=cli.COUNT, default=64, metavar="N", help="of one measurement (default: %(default)s)")
    add("--repeats", type=cli.COUNT, default=7, metavar="N", help="of each measurement (default: %(default)s)")


def add_table(commands):
    parser = commands.add_parser("table", description="Write the GPU table of README.md and docs/performance.md.")
    parser.add_argument("figures", type=Path, nargs="?", metavar="FILE", help="JSON of `train --all`; none: no figure")


def loader_case(text):
    side, resolution = (cli.COUNT(part) for part in text.split(":"))
    return side, resolution


def train_problems(args, words):
    given = [*words, *["--cached"] * args.cached, *["--model"] * (args.model != "demo")]
    is_known = args.model in KNOWN_MODELS or (Path(args.model) / "model_index.json").is_file()
    return (
        (args.all and given, f"--all has cases of its own: leave out {' '.join(given)}"),
        (args.all and not args.json, "--all: give --json FILE, which keeps the rows of a run that is cut short"),
        (not is_known, f"--model {args.model}: must be {', '.join(KNOWN_MODELS)}, or a folder with model_index.json"),
        (args.json and args.json.exists() and not args.json.is_file(), f"--json {args.json}: is no file; name one"),
    )


def parse_args(argv=None):
    parser = cli.ToolParser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (add_train, add_loader, add_table):
        add(commands)
    args, words = parser.parse_known_args(argv)
    if args.command == "train":
        cli.refuse(parser, train_problems(args, words))
    elif words:
        parser.error(f"unknown flag {words[0].partition('=')[0]}")
    elif args.command == "table" and args.figures and not args.figures.is_file():
        parser.error(f"{args.figures}: no such file; `train --all --json FILE` writes one")
    folder, file = (vars(args).get(name) for name in ("output_dir", "json"))
    if folder or file:
        cli.refuse(parser, cli.folder_problems(folder or file.parent, "--output_dir" if folder else "--json"))
    return args, words


def main(args, words):
    """Run the command; return the exit code. What imports torch is imported here, after the flags are checked."""
    if args.command == "table":
        return table.write_tables(args.figures)
    if args.command == "train":
        return sweep.measure_all(args) if args.all else sweep.measure_one(args, words)
    from lib.benchmark.loader_speed import measure_loader
    from lib.trainers import exit_code

    return exit_code(measure_loader, args)


if __name__ == "__main__":
    sys.exit(main(*parse_args()))
