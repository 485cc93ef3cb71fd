# SPDX-License-Identifier: Apache-2.0
"""Compare an LCM-LoRA with the teacher's own solvers: figures with 95% intervals, plots, one HTML report.

    python scripts/evaluate.py --pretrained_teacher_model stable-diffusion-v1-5/stable-diffusion-v1-5 \\
        --lora outputs/lcm-lora --prompts_file prompts.txt --num_images 1000 --output_dir outputs/evaluation
    accelerate launch scripts/evaluate.py ...        the pictures are shared among the processes

Prompts: a text file, one a line, such as the captions of COCO. Picture i has prompt i modulo their number, and the
same noise in every row. Distances need no real pictures: they are to the teacher's own --teacher_steps samples of the
same prompts with other noise. A second such draw is the first row: its distance is the floor, what a perfect LoRA
would have. --draw_yardstick 8 keeps the features of 8 such samples of each prompt in the file --yardstick, to which
later runs measure. Pictures are drawn once, to <output_dir>/pictures/<row>/, and kept: the same command again resumes.
Output: results.json, table.md, report.html.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from lib import cli
from safetensors import SafetensorError, safe_open


def parse_args(argv=None):
    parser = cli.ToolParser(__doc__)
    add = cli.add_model_flags(parser)
    add("--lora", nargs="+", action="extend", default=[], metavar="PATH", help="LCM-LoRAs: files, folders or Hub ids")
    add_picture_flags(parser.add_argument_group("pictures"))
    add_figure_flags(parser.add_argument_group("figures"))
    add = parser.add_argument_group("output").add_argument
    add("--shown", type=cli.within(int, 0), default=4, metavar="N", help="pictures of each row in the report (4)")
    add("--output_dir", type=Path, required=True, help="folder for pictures, results and report")
    args = parser.parse_args(argv)
    args.samplers = args.samplers or [*cli.SAMPLERS[:3], *cli.samplers_for(args.lora), "lcm-without-lora"]
    for name in ("samplers", "steps", "guidance_scale", "lcm_guidance_scale", "lora", "features"):
        setattr(args, name, list(dict.fromkeys(getattr(args, name))))
    cli.refuse(parser, yardstick_problems(args))
    loras = [(path, 1.0) for path in args.lora]
    cli.refuse(parser, [*cli.model_problems(args), *cli.lora_problems(loras), *figure_problems(args)])
    cli.refuse(parser, cli.folder_problems(args.output_dir))
    return args


def add_picture_flags(group):
    cli.add_prompt_flags(group, required=False)
    add = group.add_argument
    add("--num_images", type=cli.within(int, 2), default=256, metavar="N", help="pictures a row (default: 256)")
    add("--steps", nargs="+", type=int, default=[1, 2, 4, 8], metavar="N", help="solver steps (default: 1 2 4 8)")
    text = f"of {', '.join(cli.SAMPLERS)}; see sample.py (default: those without LoRA, and what each LoRA is for)"
    add("--samplers", nargs="+", choices=cli.SAMPLERS, metavar="NAME", help=text)
    text = "guidances of the teacher's solvers, the paper's w + 1; rows for each (default: 7.5)"
    add("--guidance_scale", nargs="+", type=cli.GUIDANCE, default=[7.5], metavar="G", help=text)
    text = "guidances of the LCM rows, 1 (off) to 2; rows for each (default: 1.0)"
    add("--lcm_guidance_scale", nargs="+", type=cli.GUIDANCE, default=[1.0], metavar="G", help=text)
    add("--teacher_steps", type=int, default=50, metavar="N", help="of the teacher's own pictures (default: 50)")
    add("--resolution", type=cli.SIDE_PX, metavar="PX", help="side in px, multiple of 8 (default: the model's)")
    add("--seed", type=cli.within(int, 0, 2**30 - 1), default=0, help="of the noise (default: %(default)s)")
    add("--batch_size", type=cli.COUNT, default=8, metavar="N", help="pictures drawn together (default: %(default)s)")


def add_figure_flags(group):
    add = group.add_argument
    text = "for distances: inception, clip, dinov2, each also NAME=PATH, or PATH: a transformers folder, the "
    text += "demo's judge (.safetensors), a .py file with load(device) (default: clip)"
    add("--features", nargs="+", default=["clip"], metavar="MODEL", help=text)
    text = "CLIP model of the CLIP score, .py file, or none (default: %(default)s)"
    add("--clip_model", default="openai/clip-vit-large-patch14", metavar="MODEL", help=text)
    add("--reference", nargs="+", default=[], metavar="PATH", help="real pictures, too: folders or .tar shards")
    text = "kept features of the teacher's pictures, and their prompts (default: draw the pictures)"
    add("--yardstick", type=Path, metavar="FILE", help=text)
    add("--draw_yardstick", type=cli.within(int, 2), metavar="N", help="write --yardstick, of N pictures a prompt")


def yardstick_problems(args):
    """Return what is wrong with --yardstick, as `cli.refuse` takes it; fill in the prompts that it holds."""
    path, known, shape, steps, seed = args.yardstick, None, (0, 0), args.teacher_steps, args.seed
    flag, is_drawn = f"--yardstick {path}", bool(args.draw_yardstick)
    if is_drawn:
        args.num_images = args.draw_yardstick * len(args.prompts or ())
    elif path:
        known, shape, guidance, steps, seed = read_yardstick(path)
        args.prompts = args.prompts or known
        args.guidance_scale = list(dict.fromkeys([guidance, *args.guidance_scale]))
    args.gap = shape[0] * shape[1]
    prompts = len(args.prompts or ())
    uneven = args.num_images > prompts and args.num_images % max(1, prompts)
    far, apart = args.gap + prompts + args.num_images, abs(args.seed - seed)
    is_near = 0 < apart < far and (prompts < shape[0] or apart % max(1, shape[0]) == 0)  # may draw its very pictures
    one = "--draw_yardstick: give --yardstick FILE, one --features"
    count = f"--num_images {args.num_images}: {prompts} prompts of {flag}; give at most as many, or a multiple"
    return (
        (is_drawn and not (path and len(args.features) == 1), one),
        (is_drawn and path and path.exists(), f"{flag}: exists; remove it or name a new one"),
        *(cli.folder_problems(path.parent, "--yardstick") if is_drawn and path else ()),
        (path and not is_drawn and not known, f"{flag}: is no yardstick file; --draw_yardstick 8 makes it"),
        (is_near, f"{flag}: holds pictures of --seed {args.seed}; give --seed {seed} or {seed + far}"),
        (known and args.prompts != known[: len(args.prompts)], f"{flag}: was made with other prompts; leave them out"),
        (known and uneven, count),
        (known and steps != args.teacher_steps, f"{flag}: was made with {steps} steps; give --teacher_steps {steps}"),
        (not args.prompts, "give --prompts, --prompts_file or --yardstick"),
    )


def read_yardstick(path):
    """Return (prompts, (their number, pictures of each), guidance, steps, seed) of a yardstick's header."""
    try:
        with safe_open(path if path.is_file() else "", "np") as file:  # a FIFO would be waited for
            known, shape = file.metadata(), file.get_slice("features").get_shape()[:2]
        numbers = float(known["guidance_scale"]), int(known["teacher_steps"]), int(known["seed"])
        return json.loads(known["prompts"]), shape, *numbers
    except (OSError, SafetensorError, ValueError, LookupError, TypeError):
        return None, (0, 0), 7.5, 50, 0


def figure_problems(args):
    missing = [path for path in args.reference if not Path(path).exists()]
    files = [path for path in (*args.features, args.clip_model) if path.endswith((".py", ".safetensors"))]
    lost = [path for path in files if not Path(path.rpartition("=")[2]).is_file()]
    return (
        (not args.lora and {*args.samplers} & {*cli.LORA_SAMPLERS}, "--samplers: lcm-lora and its kinds need --lora"),
        *cli.step_problems(args.steps, args.samplers),
        *cli.step_problems([args.teacher_steps], [], "--teacher_steps"),
        (missing, f"--reference {', '.join(missing)}: not there; give a folder of pictures or .tar shards"),
        (lost, f"model {', '.join(lost)}: not there; give a file"),
    )


# --help and wrong flags must not wait for torch, so the command line is read before the heavy imports.
if __name__ == "__main__":
    ARGS = cli.started(parse_args())

import torch
from accelerate.utils import gather_object, release_memory
from lib.evaluation import measures as m
from lib.evaluation.pictures import REFERENCE_SEED, Gallery, list_rows, teacher_row
from lib.evaluation.report import full_table, html_report, markdown_table, summary
from lib.pipelines import device_name, family_of, load_lora, load_teacher, start_offload, writing_to
from lib.trainers import exit_code, sd15
from tqdm import tqdm


def draw_pictures(args, gallery, rows, accelerator):
    missing = gallery.missing(rows)
    count = sum(gather_object([sum(len(block) for blocks in missing.values() for block in blocks)]))
    if count:
        pipe = load_teacher(args, accelerator.device)
        for index, path in enumerate(args.lora):
            load_lora(pipe, path, f"lcm{index}")
        start_offload(pipe, args, accelerator.device)
        with writing_to(args.output_dir):
            gallery.draw(pipe, missing, not accelerator.is_main_process)
        release_memory(pipe)
    gather_object([None])  # waits; accelerate's barrier fails where each process sees a GPU of its own alone
    return count


def measure_rows(args, gallery, yardstick, rows, judges, accelerator):
    teacher, names = rows[0], judges.features
    if yardstick:
        drawn = judges.row(gallery, yardstick)
        references = {"teacher": {name: drawn[name] for name in names}}
    else:
        args.resolution = args.resolution or min(gallery.picture(teacher, 0).size)  # that of the yardstick, too
        references = {"teacher": m.load_yardstick(args, names)}
    if args.reference:
        references["real"] = judges.real(args.reference, gallery.picture(teacher, 0).size, accelerator)
    found = []
    distances = m.distances_to(references, len(gallery.prompts)) if accelerator.is_main_process else {}
    for row in tqdm(rows, desc="measuring", unit="row", disable=not accelerator.is_main_process):
        values = judges.row(gallery, row)
        took = gather_object([gallery.record(row, i) | {"block": block[0]} for block in gallery.blocks for i in block])
        if not accelerator.is_main_process:
            continue
        found.append({
            "name": row.folder, "label": row.label, "sampler": row.sampler, "steps": row.steps,
            "guidance": row.guidance, "lora": row.lora and row.lora[1],
            "figures": m.score_row(values, distances, took),
            "evaluations": took[0]["evaluations"], "drawn_on": sorted({record["place"] for record in took}),
        })  # fmt: skip
    return found, m.titles(names, references)


def write_report(args, results, gallery, rows):
    shown = min(args.shown, args.num_images)
    results |= {"shown": shown, "prompts": args.prompts}
    pictures = {(row.folder, i): gallery.picture(row, i) for row in rows for i in range(shown)}
    head, body, floor = summary(results)
    brief = f"{markdown_table(head, body)}\n\n{floor}"
    table = "\n\n".join([brief, markdown_table(*full_table(results)), *m.NOTES])
    sd15.write_atomically(args.output_dir / "report.html", html_report(results, pictures))
    sd15.write_atomically(args.output_dir / "table.md", table + "\n")
    sd15.write_atomically(args.output_dir / "results.json", json.dumps(results, indent=1, ensure_ascii=False))
    print(f"{brief}\n\n{args.output_dir / 'report.html'}")


def report_settings(args, accelerator):
    return {
        "teacher": Path(args.pretrained_teacher_model).name, "LoRAs": ", ".join(Path(p).name for p in args.lora),
        "pictures a row": args.num_images, "prompts": len(args.prompts), "teacher's steps": args.teacher_steps,
        "seed": args.seed, "precision": args.mixed_precision, "batch size": args.batch_size,
        "device": device_name(accelerator.device), "processes": accelerator.num_processes,
        "yardstick": args.yardstick and str(args.yardstick),
    }  # fmt: skip


def main(args):
    accelerator = sd15.make_accelerator(wait_hours=12, mixed_precision="no")  # for the slowest's pictures
    judges = m.Measures(args, accelerator.device)  # before hours of drawing, because one may not load
    if args.reference:
        m.check_real(args.reference, accelerator)
    args.teacher_revision = family_of(args).check_teacher(args)
    args.mixed_precision = args.mixed_precision or ("fp16" if accelerator.device.type == "cuda" else "no")
    gallery = Gallery(args, accelerator.process_index, accelerator.num_processes, args.gap)
    if args.draw_yardstick:
        rows = [teacher_row(args, "yardstick", args.seed + len(args.prompts))]
        args.lora, yardstick = [], None
    else:
        rows = list_rows(args)
        yardstick = None if args.yardstick else teacher_row(args, "reference", args.seed + REFERENCE_SEED)
        if args.yardstick:
            m.load_yardstick(args, judges.features)
    drawn = draw_pictures(args, gallery, [*rows, *[yardstick] * bool(yardstick)], accelerator)
    judges.to(accelerator.device)
    torch.backends.cudnn.allow_tf32 = False  # figures would differ between cards in the third digit
    if args.draw_yardstick:
        features = {name: each for name, each in judges.row(gallery, rows[0]).items() if name in judges.features}
        if accelerator.is_main_process:
            with writing_to(args.yardstick.parent):
                m.save_yardstick(args, features, min(gallery.picture(rows[0], 0).size))
        accelerator.end_training()
        return
    found, figures = measure_rows(args, gallery, yardstick, rows, judges, accelerator)
    if accelerator.is_main_process:
        results = {"settings": report_settings(args, accelerator), "notes": m.NOTES}
        results["settings"]["timed on"] = "; ".join(sorted({place for row in found for place in row["drawn_on"]}))
        results |= {"figures": figures, "rows": found}
        accelerator.print(f"{drawn} pictures drawn; those from before were kept")
        with writing_to(args.output_dir):
            write_report(args, results, gallery, rows)
    accelerator.end_training()


if __name__ == "__main__":
    sys.exit(exit_code(main, ARGS))
