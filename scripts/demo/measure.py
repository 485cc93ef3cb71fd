# SPDX-License-Identifier: Apache-2.0
"""Measure an LCM-LoRA of the demo teacher against the teacher's own solvers: a table and results.json.

    python scripts/demo/measure.py --lora outputs/demo-sd15 --output_dir outputs/demo-sd15

`distance` is the Fréchet distance, on the judge's features, to the teacher's guided 50-step samples of the
same prompts and other noise; that of the teacher's own 50-step samples is the floor. Those features are kept
in the teacher's folder; after a change of the teacher, `--draw_reference 8` makes them again, from 8 pictures
of each prompt. `accuracy` is the share of caption attributes that the judge finds in the picture. 95%
intervals: the jackknife over 20 groups of prompts for distances, the bootstrap for accuracies.
Under `torchrun --nproc_per_node N` the pictures are shared among N processes.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from judge import Judge
from landscapes import ATTRIBUTES, caption_of
from safetensors.torch import load_file, save_file
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
from drawing import draw, load_lora, load_pipeline, set_sampler
from evaluation.statistics import bootstrap_mean, frechet_distance, jackknife

STEPS = (1, 2, 4, 8)
TEACHER_STEPS, TEACHER_GUIDANCE = 50, 7.5
OTHER_GUIDANCES = (2.0, 3.0, 5.0)
BATCH = 64
PROMPTS, PROMPT_SEED = 192, 7
NAMES = {
    "ddim": "DDIM",
    "dpmsolver++": "DPM-Solver++",
    "lcm-lora": "LCM-LoRA",
    "lcm-without-lora": "LCMScheduler without the LoRA",
}


def list_rows():
    """Return every (sampler, steps, guidance) of the comparison."""
    rows = [("ddim", TEACHER_STEPS, TEACHER_GUIDANCE)]
    for sampler in ("ddim", "dpmsolver++"):
        rows += [(sampler, steps, g) for g in (TEACHER_GUIDANCE, *OTHER_GUIDANCES) for steps in STEPS]
    return rows + [(sampler, steps, 1.0) for sampler in ("lcm-lora", "lcm-without-lora") for steps in STEPS]


def draw_row(pipe, sampler, steps, guidance, captions, seeds):
    """Return (pictures uint8 [n,H,W,3], seconds a picture) of captions, in batches."""
    set_sampler(pipe, sampler)
    pictures, seconds = [], 0.0
    for start in range(0, len(captions), BATCH):
        part = slice(start, start + BATCH)
        images, each = draw(pipe, captions[part], steps, guidance, seeds[part], output_type="np")
        pictures.append((np.asarray(images) * 255).round().astype(np.uint8))
        seconds += each * len(images)
    return np.concatenate(pictures), seconds / len(captions)


def read_everywhere(judge, pictures, seconds):
    """Return the judge's (features, predictions) of all processes' pictures in order, and mean seconds."""
    parts = gather_object([(*judge.read(torch.as_tensor(pictures)), seconds)])
    features, predicted, times = zip(*parts, strict=True)
    return torch.cat(features), torch.cat(predicted), sum(times) / len(times)


def list_prompts(count):
    """Return (labels [count, 4], captions) of the first of the `PROMPTS` random captions."""
    rng = np.random.default_rng(PROMPT_SEED)
    labels = np.stack([rng.integers(len(names), size=PROMPTS) for names in ATTRIBUTES], 1)[:count]
    return torch.as_tensor(labels), [caption_of(row) for row in labels.tolist()]


def reference_distance(features, reference):
    """Return the Fréchet distance of features [P, D] to those of the same prompts' S pictures [P, S, D]."""
    return frechet_distance(features, reference.flatten(0, 1))


def score(features, predicted, labels, reference):
    """Return distance and accuracies with the half-widths of their 95% intervals."""
    right = (predicted == labels).double()
    figures = {
        "distance": jackknife(reference_distance, features, reference),
        "accuracy": bootstrap_mean(right.mean(1)),
        "all_right": bootstrap_mean(right.prod(1)),
    }
    half_widths = {f"{name}_95": (f["high"] - f["low"]) / 2 for name, f in figures.items()}
    return {name: f["value"] for name, f in figures.items()} | half_widths


class Bench:
    """The teacher's pipeline, the prompts and the judge; this process draws its share of the prompts."""

    def __init__(self, args, accelerator):
        """Load the pipeline, with the LoRA where there is one."""
        self.labels, self.captions = list_prompts(args.num_images)
        self.judge = Judge.load(args.judge)
        self.pipe = load_pipeline(args.pretrained_teacher_model)
        if args.lora:
            load_lora(self.pipe, args.lora)
        with accelerator.split_between_processes(list(range(args.num_images))) as share:
            self.share = share

    def draw(self, row, noise=0):
        """Return (features, predictions, mean seconds a picture) of a row with all processes' pictures."""
        captions = [self.captions[i] for i in self.share]
        seeds = [noise * PROMPTS + i for i in self.share]
        pictures, seconds = draw_row(self.pipe, *row, captions, seeds)
        return read_everywhere(self.judge, pictures, seconds)


def progress(items, desc, unit, accelerator):
    """Return a progress bar over items, shown by the main process."""
    return tqdm(items, desc=desc, unit=unit, disable=not accelerator.is_main_process)


def draw_reference(args, accelerator):
    """Write the features [P, S, D] f16 of S pictures of each prompt, drawn as the first row is."""
    bench = Bench(args, accelerator)
    noises = progress(range(1, args.draw_reference + 1), "reference", "set", accelerator)
    features = torch.stack([bench.draw(list_rows()[0], noise)[0] for noise in noises], dim=1)
    if accelerator.is_main_process:
        save_file({"features": features.half()}, args.reference)
        print(f"{args.reference}: {tuple(features.shape)}")


def measure(args, accelerator):
    """Return the results: floor, teacher and one row each of `list_rows`."""
    bench = Bench(args, accelerator)
    reference = load_file(args.reference)["features"][: args.num_images].double()
    results = []
    for sampler, steps, guidance in progress(list_rows(), "measuring", "row", accelerator):
        row = {"sampler": sampler, "steps": steps, "guidance": guidance}
        if sampler == "dpmsolver++" and steps <= 2:  # the same formula as DDIM's: see scripts/sample.py
            results.append(pick(results, "ddim", steps, guidance) | row)
            continue
        features, predicted, seconds = bench.draw((sampler, steps, guidance))
        scores = score(features, predicted, bench.labels, reference)
        results.append(row | scores | {"seconds": seconds})
    return {"floor": results[0]["distance"], "num_images": args.num_images, "rows": results}


def best(rows, sampler, steps):
    """Return the row with the least distance of a sampler at a step count, over guidances."""
    return min(
        (r for r in rows if (r["sampler"], r["steps"]) == (sampler, steps)), key=lambda r: r["distance"]
    )


def pick(rows, sampler, steps, guidance):
    """Return the row of a sampler, a step count and a guidance."""
    return next(r for r in rows if (r["sampler"], r["steps"], r["guidance"]) == (sampler, steps, guidance))


def table(results):
    """Return the comparison as Markdown."""
    rows = results["rows"]
    chosen = [rows[0]]
    for sampler in ("ddim", "dpmsolver++"):
        for steps in STEPS:
            chosen += [pick(rows, sampler, steps, TEACHER_GUIDANCE), best(rows, sampler, steps)]
    chosen += [
        pick(rows, sampler, steps, 1.0) for sampler in ("lcm-without-lora", "lcm-lora") for steps in STEPS
    ]
    lines = [
        "| sampler | steps | guidance | distance | accuracy | all four right | ms a picture |",
        "|---|---|---|---|---|---|---|",
    ]
    for row, before in zip(chosen, [None, *chosen], strict=False):
        if row is before:
            continue
        free = row["sampler"] in ("ddim", "dpmsolver++") and row["guidance"] != TEACHER_GUIDANCE
        lines.append(
            f"| {NAMES[row['sampler']]} | {row['steps']} | {row['guidance']:g}{' (best)' if free else ''} "
            f"| {row['distance']:.1f} ± {row['distance_95']:.1f} "
            f"| {row['accuracy']:.3f} ± {row['accuracy_95']:.3f} "
            f"| {row['all_right']:.2f} ± {row['all_right_95']:.2f} | {1000 * row['seconds']:.0f} |"
        )
    return "\n".join(lines)


def goals(results):
    """Return the comparison in four sentences: excess distance over the floor, and accuracy, as ratios."""
    rows, floor = results["rows"], results["floor"]

    def excess(row):
        return row["distance"] - floor

    lcm = {steps: pick(rows, "lcm-lora", steps, 1.0) for steps in STEPS}
    lines = []
    for steps in (2, 4):
        for sampler in ("ddim", "dpmsolver++"):
            guided, least = pick(rows, sampler, steps, TEACHER_GUIDANCE), best(rows, sampler, steps)
            lines.append(
                f"- {steps} steps: LCM-LoRA's excess distance is {excess(lcm[steps]) / excess(guided):.3f} "
                f"of {NAMES[sampler]}'s at guidance {TEACHER_GUIDANCE:g}, "
                f"{excess(lcm[steps]) / excess(least):.3f} of its least (guidance {least['guidance']:g})"
            )
    for steps in (1, 4):
        ratio = lcm[steps]["accuracy"] / rows[0]["accuracy"]
        lines.append(f"- {steps} steps: LCM-LoRA's accuracy is {ratio:.3f} of the teacher's at 50")
    return "\n".join(lines)


def parse_args():
    """Return the arguments; wrong ones end with a message and exit code 2."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--pretrained_teacher_model", default="assets/demo-teacher-sd15", help="default: %(default)s"
    )
    parser.add_argument(
        "--judge", default="assets/demo-teacher-sd15/judge.safetensors", help="default: %(default)s"
    )
    parser.add_argument("--lora", help="folder or file of the LoRA")
    parser.add_argument("--output_dir", type=Path, help="folder for results.json and table.md")
    parser.add_argument("--num_images", type=int, default=128, help="pictures a row (default: %(default)s)")
    parser.add_argument(
        "--draw_reference", type=int, metavar="N", help="make the teacher's reference, N pictures a prompt"
    )
    args = parser.parse_args()
    args.reference = Path(args.pretrained_teacher_model) / "reference.safetensors"
    if args.draw_reference:
        args.num_images, args.lora = PROMPTS, None
    elif not (args.lora and args.output_dir):
        parser.error("--lora and --output_dir are needed")
    elif not args.reference.is_file():
        parser.error(f"{args.reference}: no such file; --draw_reference 8 makes it")
    if not 40 <= args.num_images <= PROMPTS:
        parser.error(f"--num_images {args.num_images}: must be 40 to {PROMPTS}; intervals are of 20 groups")
    return args


def main():
    """Measure from the command line."""
    args = parse_args()
    accelerator = Accelerator(cpu=True)
    if args.draw_reference:
        draw_reference(args, accelerator)
        accelerator.end_training()
        return
    results = measure(args, accelerator)
    if accelerator.is_main_process:
        args.output_dir.mkdir(parents=True, exist_ok=True)
        (args.output_dir / "results.json").write_text(json.dumps(results, indent=1))
        note = f"Floor of the distance: {results['floor']:.2f}. {args.num_images} pictures a row."
        text = f"{table(results)}\n\n{note}\n\n{goals(results)}\n"
        (args.output_dir / "table.md").write_text(text)
        print(text)
    accelerator.end_training()


if __name__ == "__main__":
    main()
