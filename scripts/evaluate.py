# SPDX-License-Identifier: Apache-2.0
"""Compare an LCM-LoRA with the teacher's own solvers: figures with 95% intervals, plots, one HTML report.

    python scripts/evaluate.py --pretrained_teacher_model stable-diffusion-v1-5/stable-diffusion-v1-5 \\
        --lora outputs/lcm-lora --prompts_file prompts.txt --num_images 1000 --output_dir outputs/evaluation
    accelerate launch scripts/evaluate.py ...        the pictures are shared among the processes

Prompts: a text file, one a line; for COCO or PartiPrompts put their captions there (the first column of
PartiPrompts' tsv). Picture i has prompt i modulo their number, and the same noise in every row.
The yardstick needs no real pictures: the teacher's own --teacher_steps samples of the same prompts with other
noise. A second such draw is the first row: its distance is the floor, what a perfect LoRA would have.
Pictures are drawn once, to <output_dir>/pictures/<row>/, and kept: the same command again resumes.
Output: results.json, table.md, report.html. Exit codes: 0 done, 2 wrong usage or unusable input, 1 other.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from model_args import (
    SAMPLERS,
    InputError,
    add_model_flags,
    add_prompt_flags,
    lora_problems,
    model_problems,
    read_prompts,
    refuse,
    step_problems,
)


def build_parser():
    """Return the parser of the command line."""
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = add_model_flags(cli)
    text = "LCM-LoRAs to compare: files, folders with one, PEFT folders or Hub ids (default: none)"
    add("--lora", nargs="+", default=[], metavar="PATH", help=text)
    group = cli.add_argument_group("pictures")
    add_prompt_flags(group)
    add = group.add_argument
    text = "pictures a row; 1000 or more for figures to publish (default: %(default)s)"
    add("--num_images", type=int, default=256, metavar="N", help=text)
    text = "solver steps, LCM rows to 50 (default: 1 2 4 8)"
    add("--steps", nargs="+", type=int, default=[1, 2, 4, 8], metavar="N", help=text)
    text = f"of {', '.join(SAMPLERS)} (default: all, lcm-lora with --lora)"
    add("--samplers", nargs="+", choices=SAMPLERS, metavar="NAME", help=text)
    text = "guidances of the teacher's solvers, the paper's w + 1; rows for each (default: 7.5)"
    add("--guidance_scale", nargs="+", type=float, default=[7.5], metavar="G", help=text)
    text = "guidances of the LCM rows, 1 (off) to 2; rows for each (default: 1.0)"
    add("--lcm_guidance_scale", nargs="+", type=float, default=[1.0], metavar="G", help=text)
    add(
        "--teacher_steps",
        type=int,
        default=50,
        metavar="N",
        help="DDIM steps of the yardstick, at the first guidance (default: %(default)s)",
    )
    add("--resolution", type=int, metavar="PX", help="side in px, multiple of 8 (default: the model's)")
    add("--seed", type=int, default=0, help="of the noise (default: %(default)s)")
    add(
        "--batch_size",
        type=int,
        default=8,
        metavar="N",
        help="pictures drawn together (default: %(default)s)",
    )
    add = cli.add_argument_group("figures").add_argument
    text = "for distances: inception, clip, dinov2, each also NAME=PATH, or PATH: a transformers folder, the "
    text += "demo's judge (.safetensors), a .py file with load(device) (default: clip)"
    add("--features", nargs="+", default=["clip"], metavar="MODEL", help=text)
    text = "CLIP model of the CLIP score, .py file, or none (default: %(default)s)"
    add("--clip_model", default="openai/clip-vit-large-patch14", metavar="MODEL", help=text)
    text = "none, vgg (torch-fidelity, see requirements-eval.txt) or a .py file (default: %(default)s)"
    add("--lpips", default="none", metavar="MODEL", help=text)
    text = "real pictures to measure the distance to as well: a folder, or .tar shards (default: none)"
    add("--reference", nargs="+", default=[], metavar="PATH", help=text)
    add = cli.add_argument_group("output").add_argument
    add(
        "--shown",
        type=int,
        default=4,
        metavar="N",
        help="pictures of each row in the report (default: %(default)s)",
    )
    add("--output_dir", type=Path, required=True, help="folder for pictures, results and report")
    return cli


def parse_args(argv=None):
    """Return the checked command line, prompts read and samplers chosen; a wrong one exits with 2."""
    parser = build_parser()
    args = parser.parse_args(argv)
    samplers = args.samplers or [name for name in SAMPLERS if args.lora or name != "lcm-lora"]
    args.samplers = samplers
    for name in ("samplers", "steps", "guidance_scale", "lcm_guidance_scale", "lora", "features"):
        setattr(args, name, list(dict.fromkeys(getattr(args, name))))
    if args.prompts_file:
        args.prompts = read_prompts(args.prompts_file)
    loras = [(path, 1.0) for path in args.lora]
    refuse(parser, [*model_problems(args), *lora_problems(loras), *problems(args)])
    return args


def problems(args):
    """Return pairs (whether it is so, message) of what can be wrong with the values of the flags."""
    scales, side = args.guidance_scale + args.lcm_guidance_scale, args.resolution
    missing = [path for path in args.reference if not Path(path).exists()]
    files = [
        path
        for path in (*args.features, args.clip_model, args.lpips)
        if path.endswith((".py", ".safetensors"))
    ]
    lost = [path for path in files if not Path(path.rpartition("=")[2]).is_file()]
    sizes = {
        "--num_images": (args.num_images, 2),
        "--batch_size": (args.batch_size, 1),
        "--shown": (args.shown, 0),
    }
    return (
        ("lcm-lora" in args.samplers and not args.lora, "--samplers lcm-lora: give --lora too"),
        (not args.prompts, f"--prompts_file {args.prompts_file}: not there or empty; write a prompt a line"),
        *step_problems(args.steps, args.samplers),
        *step_problems([args.teacher_steps], []),
        (not all(0 <= scale <= 100 for scale in scales), f"guidance scales {scales}: give 0 to 100"),
        *((value < least, f"{flag} {value}: give {least} or more") for flag, (value, least) in sizes.items()),
        (not 0 <= args.seed < 2**30, f"--seed {args.seed}: give 0 to 2^30 - 1"),
        (side is not None and (side < 8 or side % 8), f"--resolution {side}: give a multiple of 8"),
        (missing, f"--reference {', '.join(missing)}: not there; give a folder of pictures or .tar shards"),
        (lost, f"model {', '.join(lost)}: not there; give a file"),
        (
            args.lpips not in ("none", "vgg") and args.lpips not in files,
            f"--lpips {args.lpips}: give none, vgg or a .py file",
        ),
        (args.output_dir.is_file(), f"--output_dir {args.output_dir}: is a file, give a folder"),
    )


# --help and wrong flags must not wait for torch, so the command line is read before the heavy imports.
if __name__ == "__main__":
    ARGS = parse_args()

import json

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, release_memory
from drawing import load_lora, load_teacher
from evaluation.gallery import Gallery, list_rows, real_files
from evaluation.measures import NOTES, Measures, distances_to, records, score_row, titles
from evaluation.report import html_report, markdown_table
from evaluation.statistics import bias_curve
from PIL import Image
from tqdm import tqdm


def draw_pictures(args, gallery, rows, accelerator):
    """Draw the pictures that are missing, each process its share; return their number over all processes."""
    missing = gallery.missing(rows)
    counts = [len(block) for blocks in missing.values() for block in blocks]
    if sum(gather_object([sum(counts)])):
        pipe = load_teacher(args, accelerator.device)
        for index, path in enumerate(args.lora):
            load_lora(pipe, path, f"lcm{index}")
        gallery.draw(pipe, missing, not accelerator.is_main_process)
        release_memory(pipe)
    accelerator.wait_for_everyone()
    return sum(gather_object([sum(counts)]))


def measure(args, gallery, rows, accelerator):
    """Return (rows with their figures, bias of each feature model, titles of the figures)."""
    measures = Measures(args, accelerator.device)
    yardstick, teacher = rows[:2]
    references = {"teacher": measures.row(gallery, yardstick, teacher)}
    references["teacher"] = {name: references["teacher"][name] for name in measures.features}
    if args.reference:
        size = Image.open(gallery.path(teacher, 0)).size
        references["real"] = measures.real(args.reference, size, accelerator)
    found, bias = [], {}
    distances = distances_to(references) if accelerator.is_main_process else {}
    for row in tqdm(rows[1:], desc="measuring", unit="row", disable=not accelerator.is_main_process):
        values, took = measures.row(gallery, row, teacher), records(gallery, row)
        if not accelerator.is_main_process:
            continue
        if row is teacher:
            bias = {name: bias_curve(values[name], references["teacher"][name]) for name in measures.features}
        peaks = [record["peak_gib"] for record in took if record["peak_gib"] is not None]
        found.append({
            "name": row.name, "label": row.label, "sampler": row.sampler, "steps": row.steps,
            "guidance": row.guidance, "lora": row.lora and row.lora[1],
            "figures": score_row(values, distances, took),
            "evaluations": took[0]["evaluations"], "peak_gib": max(peaks, default=None),
        })  # fmt: skip
    return found, bias, titles(measures.features, references)


def write(args, results, gallery, rows):
    """Write results.json, table.md and report.html."""
    shown = min(args.shown, args.num_images)
    results |= {"shown": shown, "prompts": args.prompts}
    pictures = {(row.name, i): Image.open(gallery.path(row, i)) for row in rows[1:] for i in range(shown)}
    table = markdown_table(results)
    page = html_report(results, pictures)
    (args.output_dir / "results.json").write_text(json.dumps(results, indent=1, ensure_ascii=False), "utf-8")
    (args.output_dir / "table.md").write_text(f"{table}\n\n" + "\n\n".join(NOTES) + "\n", "utf-8")
    (args.output_dir / "report.html").write_text(page, "utf-8")
    print(f"{table}\n\n{args.output_dir / 'report.html'}")


def describe_run(args, accelerator):
    """Return the settings that the report names."""
    device = accelerator.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    return {
        "teacher": Path(args.pretrained_teacher_model).name,
        "LoRAs": ", ".join(Path(p).name for p in args.lora),
        "pictures a row": args.num_images, "prompts": len(args.prompts),
        "teacher's steps": args.teacher_steps,
        "seed": args.seed, "precision": args.mixed_precision or ("fp16" if device.type == "cuda" else "no"),
        "batch size": args.batch_size, "device": name, "processes": accelerator.num_processes,
    }  # fmt: skip


def main(args):
    """Draw what is missing, measure, write; return the exit code."""
    accelerator = Accelerator()
    try:
        gallery = Gallery(args, accelerator.process_index, accelerator.num_processes)
        real_files(args.reference)
        Measures(args, "cpu")  # a judge that is not to be had should be known before hours of drawing
        rows = list_rows(args)
        drawn = draw_pictures(args, gallery, rows, accelerator)
        found, bias, figures = measure(args, gallery, rows, accelerator)
    except InputError as error:
        print(f"evaluate.py: error: {error}", file=sys.stderr)
        return 2
    if accelerator.is_main_process:
        settings = describe_run(args, accelerator)
        results = {"settings": settings, "notes": NOTES, "figures": figures, "bias": bias, "rows": found}
        print(f"{drawn} pictures drawn, {len(rows) * args.num_images - drawn} kept from before")
        write(args, results, gallery, rows)
    accelerator.end_training()
    return 0


if __name__ == "__main__":
    sys.exit(main(ARGS))
