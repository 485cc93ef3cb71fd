# SPDX-License-Identifier: Apache-2.0
"""Measure training steps in processes of their own: one case in rounds, or the list of cases within a time limit."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

from lib import write_whole
from lib.benchmark.table import gpu_table

REAL_MODELS = ("sd15", "sdxl", "ssd1b")
DEMO_MODELS = {"sd15": "demo", "sdxl": "demo-sdxl"}  # which --tiny measures in place of the real ones
KNOWN_MODELS = (*REAL_MODELS, *DEMO_MODELS.values())
RECIPES = ("reference", "ours")
MEASURE_ONCE = Path(__file__).with_name("measure_once.py")
ESTIMATE_MEMORY = Path(__file__).resolve().parents[2] / "estimate_memory.py"
COMPARED = ("samples_per_second", "seconds_per_step", "cpu_seconds_per_step", "allocated_gib")
PRINTED = (*COMPARED, "reserved_gib", "model_tflop_per_second", "matmul_tflop_per_second", "share_of_matmul_rate")
OPTIONS = {
    "checkpointing": "--gradient_checkpointing", "8-bit": "--use_8bit_adam", "4-bit": "--use_4bit_base",
    "compile": "--compile", "cached": "--cached",
}  # fmt: skip
PLAIN_OPTIONS = ("checkpointing", "8-bit")  # what the reference knows


def list_cases():
    """Return [(model, batch, precision, options)] of `train --all`, the most telling cases first."""
    sizes = [("sdxl", 4), ("sd15", 16), ("sdxl", 1), ("sdxl", 12), ("sd15", 4)]
    usual = {"sdxl": {"checkpointing", "8-bit"}, "sd15": {"8-bit"}}
    cases = [(*size, "fp16", usual[size[0]]) for size in sizes]
    for options in ({"cached"}, {"8-bit"}, {"4-bit"}, {"checkpointing"}, {"compile"}):
        cases += [(*size, "fp16", usual[size[0]] ^ options) for size in sizes[:2]]  # one option on or off
    for options in (set(), {"cached"}, {"compile"}):
        cases += [(*size, "bf16", usual[size[0]] ^ options) for size in sizes]
    for options in ({"cached"}, {"compile"}, {"4-bit"}):
        cases += [(*size, "fp16", usual[size[0]] ^ options) for size in sizes[2:]]
    return [(*case, [name for name in OPTIONS if name in options]) for *case, options in cases]


def start_worker(**streams):
    """Return a process that imports its packages and then waits for the words of one measurement."""
    line = [sys.executable, str(MEASURE_ONCE)]
    return subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **streams)


def words_of(model, recipe, args, flags):
    steps = ["--steps", str(args.steps), "--warmup_steps", str(args.warmup_steps)]
    return ["--model", model, "--recipe", recipe, *steps, *flags]


def measure_one(args, words):
    rounds = [{} for _ in range(args.repeats)]
    for measured in rounds:
        for recipe in args.recipe:
            worker = start_worker()
            line = words_of(args.model, recipe, args, ["--cached"] * args.cached + words)
            output, _ = worker.communicate(json.dumps(line))
            if worker.returncode:
                print(f"error: the recipe {recipe} failed, exit code {worker.returncode}", file=sys.stderr)
                return 2 if worker.returncode == 2 else 1
            measured[recipe] = json.loads(output.splitlines()[-1])
    report = {"model": args.model, "cached": args.cached, "trainer_flags": words, "rounds": rounds, "ratios": {}}
    if set(args.recipe) == set(RECIPES):
        report["ratios"] = {n: [each["ours"][n] / each["reference"][n] for each in rounds] for n in COMPARED}
        pairs = [pair for each in rounds for pair in zip(*(each[name]["losses"] for name in RECIPES), strict=True)]
        report["loss_difference"] = max(abs(ours - plain) / plain for plain, ours in pairs)
    show_rounds(report)
    if args.json:
        write_whole(args.json, json.dumps(report, indent=1))
    return 0


def show_rounds(report):
    rounds, ratios = report["rounds"], report["ratios"].items()
    found = [(f"{recipe} {name}", [each[recipe][name] for each in rounds]) for recipe in rounds[0] for name in PRINTED]
    for name, values in [*found, *((f"ours / reference, {name}", values) for name, values in ratios)]:
        print(f"{name:44}{median(values):.4g} ({min(values):.4g} to {max(values):.4g})")
    if "loss_difference" in report:
        print(f"greatest relative difference of a loss: {report['loss_difference']:.1e}")


class Sweep:
    """The rows of `train --all`: each is written as soon as it is measured."""

    def __init__(self, args):
        self.args, self.ends = args, time.monotonic() + 60 * args.minutes
        self.row_s = max(180, 15 * args.minutes)  # a measurement is given up after it: the rows after it tell more
        self.report = {"machine": {}, "rows": []}
        self.plain = {}  # figures of the reference by what it knows of a case
        self.estimates = ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 4))

    def seconds_left(self):
        return self.ends - time.monotonic()

    def words(self, model, batch, precision, options):
        model = DEMO_MODELS[model] if self.args.tiny else model
        flags = [OPTIONS[name] for name in options]
        # The CPU has no fp16 matrix products worth the name, and bf16 takes the same code.
        precision = "bf16" if self.args.tiny else precision
        flags += ["--train_batch_size", str(batch), "--mixed_precision", precision]
        return model, flags + ["--resolution", "64"] * self.args.tiny

    def estimate(self, row, case):
        model, flags = self.words(*case)
        line = [sys.executable, str(ESTIMATE_MEMORY), "--model", model, *flags, "--validation_steps", "-1"]
        done = subprocess.run(line, capture_output=True, text=True, timeout=max(self.seconds_left(), 1))
        if done.returncode == 0:
            row["estimated_gib"] = float(re.search(r"peak +([\d.]+)", done.stdout)[1])

    def run(self, worker, case, recipe):
        """Return the figures of one measurement; None where the time ended before it did."""
        model, flags = self.words(*case)
        line = words_of(model, recipe, self.args, flags)
        try:
            output, errors = worker.communicate(json.dumps(line), timeout=max(min(self.seconds_left(), self.row_s), 1))
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.communicate()
            return {"failed": f"not done in {self.row_s:g} s"} if self.seconds_left() > 0 else None
        if worker.returncode:
            last = (errors.strip().splitlines() or [f"exit code {worker.returncode}"])[-1]
            is_memory = re.search("out of memory|ALLOC_FAILED|unable to find an engine", errors)  # as in the trainers
            return {"failed": "out of memory" if is_memory else last[:200].replace("|", "/")}
        figures = json.loads(output.splitlines()[-1])
        self.report["machine"] = {name: figures[name] for name in ("device", "torch", "cuda")}
        return {name: figures[name] for name in PRINTED}


def measure_all(args):
    """Measure the list of cases until the time is over; the next process imports while one measures."""
    if not (args.tiny or shutil.which("nvidia-smi") or Path("/proc/driver/nvidia/version").exists()):
        print("error: --all measures a CUDA GPU, and no driver is found; --tiny tries it on a CPU", file=sys.stderr)
        return 2
    sweep = Sweep(args)
    worker = start_worker(stderr=subprocess.PIPE)
    for case in list_cases():
        model, batch, precision, options = case
        row = {"model": model, "batch": batch, "precision": precision, "options": options, "tiny": args.tiny}
        row["estimated_gib"] = None
        if not args.tiny:  # whose models the estimate does not know
            sweep.estimates.submit(sweep.estimate, row, case)
        plain_case = (model, batch, precision, [name for name in options if name in PLAIN_OPTIONS])
        for recipe, one in (("ours", case), ("reference", plain_case)):
            if sweep.seconds_left() <= 0:
                break
            known = sweep.plain.get(str(one)) if recipe == "reference" else None
            if known is None:
                this, worker = worker, start_worker(stderr=subprocess.PIPE)
                known = sweep.run(this, one, recipe)
            if known is None:
                break
            row[recipe] = known
            if recipe == "reference":
                sweep.plain[str(one)] = known
            else:
                sweep.report["rows"].append(row)
            write_whole(args.json, json.dumps(sweep.report, indent=1))
            speed = known.get("failed") or f"{known['samples_per_second']:.2f} samples/s"
            print(f"{model} {batch} {precision} {' '.join(options)}, {recipe}: {speed}", file=sys.stderr)
        if sweep.seconds_left() <= 0:
            break
    worker.kill()
    worker.communicate()
    sweep.estimates.shutdown(cancel_futures=sweep.seconds_left() <= 0)
    write_whole(args.json, json.dumps(sweep.report, indent=1))
    print(gpu_table(sweep.report))
    return 0 if sweep.report["rows"] else 1
