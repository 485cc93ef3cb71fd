#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Measure a training step: samples/s, seconds per part, peak memory, FLOPs; and a plain recipe beside it.

    python scripts/benchmark_training.py --model sdxl --recipe reference ours --train_batch_size 4 \\
        --mixed_precision bf16 --gradient_checkpointing --json outputs/benchmark.json
    python scripts/benchmark_training.py --model demo --recipe reference ours --json outputs/benchmark.json

`ours` is the training script's own step. `reference` is the recipe in common use, written plainly in
scripts/benchmark/reference.py. Flags that are not listed here go to the training script, for both. Weights of
sd15, sdxl and ssd1b are random, in the published configurations; pictures are made up.

Each measurement is a process of its own; recipes take turns. Memory is what weights, gradients, optimizer and
activations take at the peak of the updates: of CUDA's allocator, or resident beyond a process that has only
imported its packages. Model FLOPs are the least that a step needs. Ratios are ours / reference, by round.
Exit codes: 0 done; 2 wrong usage or unusable input; 1 anything else.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import median

REAL_MODELS = ("sd15", "sdxl", "ssd1b")
RECIPES = ("reference", "ours")
ONE_RUN = Path(__file__).resolve().parent / "benchmark" / "one_run.py"
COMPARED = ("samples_per_second", "seconds_per_step", "cpu_seconds_per_step", "peak_memory_gib")
PRINTED = (*COMPARED, "model_tflop_per_second", "matmul_tflop_per_second", "share_of_matmul_rate")


def parse_args(argv=None):
    """Return (this tool's flags, words for the training script); wrong flags exit with 2."""
    cli = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = cli.add_argument
    add("--model", default="demo", help="sd15, sdxl, ssd1b, demo, or a diffusers folder (default: demo)")
    add("--recipe", nargs="+", choices=RECIPES, default=RECIPES, help="what to measure (default: both)")
    add("--cached", action="store_true", help="`ours` trains from cached latents and text")
    add("--warmup_steps", type=int, default=2, metavar="N", help="updates before the clock (default: 2)")
    add("--steps", type=int, default=5, metavar="N", help="timed updates of a measurement (default: 5)")
    add("--repeats", type=int, default=3, metavar="N", help="measurements of each recipe (default: 3)")
    add("--json", type=Path, metavar="FILE", help="where the figures go")
    own, words = cli.parse_known_args(argv)
    for name in ("warmup_steps", "steps", "repeats"):
        if getattr(own, name) < 1:
            cli.error(f"--{name} {getattr(own, name)}: must be at least 1")
    known = (*REAL_MODELS, "demo")
    if own.model not in known and not (Path(own.model) / "model_index.json").is_file():
        cli.error(f"--model {own.model}: must be {', '.join(known)}, or a folder with model_index.json")
    return own, words


def measure(own, words, recipe):
    """Return the figures of one recipe, measured once in a process of its own; its failure ends this one."""
    line = [
        sys.executable,
        str(ONE_RUN),
        "--model",
        own.model,
        "--recipe",
        recipe,
        *["--cached"] * own.cached,
    ]
    line += ["--steps", str(own.steps), "--warmup_steps", str(own.warmup_steps), *words]
    worker = subprocess.run(line, stdout=subprocess.PIPE, text=True)
    if worker.returncode:
        print(f"error: the recipe {recipe} failed, exit code {worker.returncode}", file=sys.stderr)
        sys.exit(2 if worker.returncode == 2 else 1)
    return json.loads(worker.stdout.splitlines()[-1])


def summarize(runs):
    """Return the medians of a recipe's measurements, and the ranges of what is compared."""
    result = dict(runs[0])
    for name in ("seconds_per_part", "cpu_seconds_per_part"):
        result[name] = {part: median(run[name][part] for run in runs) for part in runs[0][name]}
    for name in PRINTED:
        result[name] = median(run[name] for run in runs)
    for name in COMPARED:
        result[f"{name}_range"] = [min(run[name] for run in runs), max(run[name] for run in runs)]
    return result


def compare(ours, reference):
    """Return ours / reference by round, median and range, and how far the losses of an update differ."""
    pairs, ratios = list(zip(ours, reference, strict=True)), {}
    for name in COMPARED:
        values = [one[name] / other[name] for one, other in pairs]
        ratios |= {name: median(values), f"{name}_range": [min(values), max(values)]}
    losses = [losses for one, other in pairs for losses in zip(one["losses"], other["losses"], strict=True)]
    return ratios | {"loss_difference": max(abs(a - b) / b for a, b in losses)}


def show(report):
    """Print the figures of every recipe and their ratios."""
    for recipe, figures in report["recipes"].items():
        print(f"\n{recipe} ({figures['device']}, {figures['dtype']})")
        for name in PRINTED:
            low, high = figures.get(f"{name}_range", [figures[name]] * 2)
            print(f"  {name:26}{figures[name]:10.4f}   {low:.4f} to {high:.4f}")
        for name, seconds in figures["seconds_per_part"].items():
            cpu_seconds = figures["cpu_seconds_per_part"][name]
            print(f"    {name:24}{seconds:10.4f} s {cpu_seconds:10.4f} CPU s")
    if "ratios" in report:
        print("\nours / reference")
        for name in COMPARED:
            low, high = report["ratios"][f"{name}_range"]
            print(f"  {name:26}{report['ratios'][name]:10.4f}   {low:.4f} to {high:.4f}")
        print(f"  greatest relative difference of a loss {report['ratios']['loss_difference']:.1e}")


def main(own, words):
    """Measure each recipe --repeats times, taking turns; print and write the figures."""
    runs = {recipe: [] for recipe in own.recipe}
    for number in range(own.repeats):
        for recipe, measured in runs.items():
            measured.append(measure(own, words, recipe))
            speed = measured[-1]["samples_per_second"]
            print(f"round {number + 1} of {own.repeats}, {recipe}: {speed:.3f} samples/s", file=sys.stderr)
    report = {"model": own.model, "cached": own.cached, "trainer_flags": words}
    report["recipes"] = {recipe: summarize(measured) for recipe, measured in runs.items()}
    if len(runs) == len(RECIPES):
        report["ratios"] = compare(runs["ours"], runs["reference"])
    show(report)
    if own.json:
        own.json.parent.mkdir(parents=True, exist_ok=True)
        own.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main(*parse_args())
