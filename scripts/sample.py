# SPDX-License-Identifier: Apache-2.0
"""Draw prompts with and without an LCM-LoRA at several step counts: pictures, a labelled grid, timings.

    python scripts/sample.py --pretrained_teacher_model stable-diffusion-v1-5/stable-diffusion-v1-5 \\
        --lora outputs/lcm-lora --prompts "a red fox" "an old harbour at dawn" --output_dir outputs/samples

    --lora outputs/lcm-lora=1.0 --lora path/to/style=0.8           with a style, which is on in every row
    --lora outputs/lcm-lora/checkpoint-1000/unet                   a checkpoint's PEFT folder
    --steps 1 2 3 4 5 6 7 8 --base_steps 1 4 8 15 20 25 30 50      LCM rows, and the teacher's
    --samplers lcm-lora lcm-lora-ddim lcm-lora-euler               LCMScheduler, DDIM with eta 0.3, with eta 0
    --image photo.png --strength 0.6                               image-to-image
    --image photo.png --mask mask.png                              inpainting: white is drawn anew
    --controlnet MODEL --control_image edges.png                   ControlNet, alone or with --image

The grid has a row per sampler, all from the same noise. DDIM and the DPM-Solvers (second order, multistep) use
"trailing" timesteps, which start where there is only noise and show the teacher at its best (arXiv:2305.08891).
Output: <row>-<steps>steps/<prompt>-<image>.png, grid.png (first image of the first 16 prompts), samples.json.
"""

import json
import sys
import textwrap
from collections import namedtuple
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from lib import cli


def parse_args(argv=None):
    parser = cli.ToolParser(__doc__)
    add = cli.add_model_flags(parser)
    text = "file (diffusers or kohya keys), folder, PEFT folder or Hub id; the first is the LCM-LoRA, others "
    text += "are styles, on in every row; repeat the flag, =0.8 sets a weight (default: none)"
    add("--lora", action="append", default=[], metavar="PATH[=WEIGHT]", help=text)
    add("--controlnet", metavar="MODEL", help="folder or Hub id of a ControlNet (default: none)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: %(default)s)")
    add_sampling_flags(parser.add_argument_group("sampling"))
    add = parser.add_argument_group("pictures to start from").add_argument
    add("--image", type=cli.a_file, metavar="FILE", help="picture that image-to-image changes, or inpainting keeps")
    add("--mask", type=cli.a_file, metavar="FILE", help="inpainting: white is drawn anew, black stays")
    text = "share of the noise that --image gets, 0 to 1; that share of steps is done (default: 0.8, with --mask 1)"
    add("--strength", type=cli.within(float, 1e-6, 1), metavar="S", help=text)
    add("--control_image", type=cli.a_file, metavar="FILE", help="what --controlnet reads: edges, depth, a pose")
    scale = cli.within(float, -100, 100)
    add("--controlnet_scale", type=scale, default=1.0, metavar="S", help="its weight (default: %(default)s)")
    add = parser.add_argument_group("output").add_argument
    add("--output_dir", type=Path, required=True, help="folder for pictures, grid.png and samples.json")
    add("--strip", action="store_true", help="also write strip.png: a column a prompt, a row a sampler and step count")
    args = parser.parse_args(argv)
    fill_in(args)
    cli.refuse(parser, [*cli.model_problems(args), *cli.lora_problems(args.loras), *task_problems(args)])
    cli.refuse(parser, cli.folder_problems(args.output_dir))
    return args


def add_sampling_flags(group):
    cli.add_prompt_flags(group)
    add = group.add_argument
    text = "solver steps, 1 to 1000, LCM rows to 50; a column each (default: those of 1 2 4 8 of which "
    add("--steps", nargs="+", type=int, metavar="N", help=text + "--strength leaves a step)")
    add("--base_steps", nargs="+", type=int, metavar="N", help="steps of the teacher rows (default: --steps)")
    text = f"rows, of {', '.join(cli.SAMPLERS)} (default: ddim dpmsolver++, and what the LoRA is for)"
    add("--samplers", nargs="+", choices=cli.SAMPLERS, metavar="NAME", help=text)
    text = "guidance of the teacher rows, the paper's w + 1; up to 1 is off (default: %(default)s)"
    add("--guidance_scale", type=cli.GUIDANCE, default=7.5, metavar="G", help=text)
    text = "guidance of the LCM rows, from 1 (off) to 2, a row each (default: 1.0)"
    add("--lcm_guidance_scale", type=cli.GUIDANCE, nargs="+", default=[1.0], metavar="G", help=text)
    text = "strengths of the LCM-LoRA, times its weight; a row each (default: 1.0)"
    add("--lora_strengths", type=cli.within(float, -100, 100), nargs="+", default=[1.0], metavar="S", help=text)
    add("--negative_prompt", type=cli.utf8, metavar="TEXT", help="works in rows with guidance above 1 (default: none)")
    add("--seed", type=cli.within(int, 0, 2**62), default=0, help="image i of a prompt starts from seed + i")
    add("--num_images", type=cli.COUNT, default=1, metavar="N", help="images per prompt (default: %(default)s)")
    add("--resolution", type=cli.SIDE_PX, metavar="PX", help="side, a multiple of 8 (default: model's or picture's)")


def fill_in(args):
    if args.image and not args.strength:
        args.strength = 1.0 if args.mask else 0.8
    args.steps = args.steps or [n for n in (1, 2, 4, 8) if n * (args.strength if args.image else 1) >= 1] or [8]
    args.loras = [cli.split_weight(text) for text in args.lora]
    args.samplers = args.samplers or ["ddim", "dpmsolver++", *cli.samplers_for(source for source, _ in args.loras[:1])]
    for name in ("samplers", "steps", "base_steps", "lcm_guidance_scale", "lora_strengths"):
        setattr(args, name, list(dict.fromkeys(getattr(args, name) or args.steps)))


def task_problems(args):
    lcm = [name for name in args.samplers if name.startswith("lcm")]
    base = [name for name in args.samplers if name not in lcm]
    least = min((args.steps if lcm else []) + (args.base_steps if base else []))
    none_left = f"--strength {args.strength} of {least} steps is no step; give more of either"
    control = f"--controlnet {args.controlnet}: not there; give a folder or Hub id"
    return (
        (not args.lora and {*args.samplers} & {*cli.LORA_SAMPLERS}, "--samplers: lcm-lora and its kinds need --lora"),
        *cli.step_problems(args.steps, lcm),
        *(cli.step_problems(args.base_steps, base, "--base_steps") if base else ()),
        (args.mask and not args.image, "--mask: give --image too, the picture to be inpainted"),
        (args.strength and not args.image, "--strength: give --image too, the picture to start from"),
        (bool(args.controlnet) != bool(args.control_image), "--controlnet and --control_image: give both"),
        (args.controlnet and not cli.is_source(args.controlnet), control),
        (args.image and int(least * args.strength) < 1, none_left),
    )


# --help and wrong flags must not wait for torch, so the command line is read before the heavy imports.
if __name__ == "__main__":
    ARGS = cli.started(parse_args())

import diffusers
from lib import pipelines
from lib.pipelines import draw, load_lora, load_teacher, set_sampler
from lib.trainers import UnusableInput, exit_code
from PIL import Image
from tqdm import tqdm

SampleRow = namedtuple("SampleRow", "name label sampler guidance steps weights")


def sample_rows(args):
    rows, adapters = [], ["lcm", *(f"style{i}" for i in range(1, len(args.loras)))]
    weights = {name: weight for name, (_, weight) in zip(adapters, args.loras, strict=False)}
    for sampler in args.samplers:
        is_lcm = sampler.startswith("lcm")
        strengths = args.lora_strengths if sampler in cli.LORA_SAMPLERS else [1.0]
        guidances = args.lcm_guidance_scale if is_lcm else [args.guidance_scale]
        for guidance, strength in product(guidances, strengths):
            name, label = sampler, f"{cli.TITLES[sampler]}\nguidance {guidance:g}"
            name += f"-guidance{guidance:g}" * (len(guidances) > 1)
            if len(strengths) > 1:
                name, label = f"{name}-strength{strength:g}", f"{label}\nLoRA x {strength:g}"
            mine = {key: w * strength if key == "lcm" else w for key, w in weights.items()}
            rows.append(SampleRow(name, label, sampler, guidance, args.steps if is_lcm else args.base_steps, mine))
    return rows


def fitted_picture(path, side):
    """Return a picture file, its smaller side scaled to `side` px if given, with sides that are multiples of 8 px."""
    picture = pipelines.read_picture(path)
    factor = side / min(picture.size) if side else 1
    width, height = (max(8, round(length * factor) // 8 * 8) for length in picture.size)
    return picture.resize((width, height), Image.Resampling.LANCZOS)


def start_pictures(args):
    """Return what the pipeline of the task takes beside prompts: pictures, strengths, sizes."""
    extra = {}
    if args.image:
        extra = {"image": fitted_picture(args.image, args.resolution), "strength": args.strength}
    if args.mask:
        masks = [pipelines.read_picture(args.mask, colour).convert("L") for colour in ("white", "black")]
        if masks[0].tobytes() != masks[1].tobytes():
            raise UnusableInput(f"--mask {args.mask}: is transparent in part; save it in black and white")
        mask = masks[0].resize(extra["image"].size, Image.Resampling.NEAREST)
        extra |= {"mask_image": mask, "width": mask.width, "height": mask.height}
    if args.controlnet:
        picture = fitted_picture(args.control_image, args.resolution)
        if args.image:
            extra["control_image"] = picture.resize(extra["image"].size)
        else:
            extra |= {"image": picture, "width": picture.width, "height": picture.height}
        extra["controlnet_conditioning_scale"] = args.controlnet_scale
    return extra


def task_pipeline(pipe, args):
    """Return the pipeline of the task, which shares the modules of `pipe`, with the ControlNet if any."""
    kind, parts = diffusers.AutoPipelineForText2Image, {}
    if args.image:
        kind = diffusers.AutoPipelineForImage2Image
    if args.mask:
        kind = diffusers.AutoPipelineForInpainting
    if args.controlnet:
        options = {"torch_dtype": pipe.unet.dtype, "cache_dir": args.cache_dir}
        try:
            net, info = diffusers.ControlNetModel.from_pretrained(args.controlnet, output_loading_info=True, **options)
        except pipelines.LOAD_ERRORS as error:
            why = textwrap.shorten(str(error), 240)
            raise UnusableInput(f"--controlnet {args.controlnet} does not load ({why})") from error
        widths = [(part.config.cross_attention_dim, *part.config.block_out_channels) for part in (net, pipe.unet)]
        if widths[0] != widths[1] or info["missing_keys"] or info["unexpected_keys"]:
            raise UnusableInput(f"--controlnet {args.controlnet}: is for another kind of model; take another")
        parts["controlnet"] = net.to(pipe.device).eval()
    if args.image or parts:
        pipe = kind.from_pipe(pipe, add_watermarker=False, **parts)
        pipe.set_progress_bar_config(disable=True)
    return pipe


def draw_all(pipe, args, rows, extra):
    records, pictures = [], {}
    options = {"negative_prompt": args.negative_prompt, **(extra or {"resolution": args.resolution})}
    for row in rows:
        given = options | set_sampler(pipe, row.sampler, row.weights)
        jobs = list(product(row.steps, enumerate(args.prompts), range(args.num_images)))
        draw(pipe, args.prompts[:1], min(row.steps), row.guidance, [args.seed], **given)  # not timed
        for steps, (index, prompt), image in tqdm(jobs, row.label.replace("\n", ", "), unit="picture"):
            seed, path = args.seed + image, Path(f"{row.name}-{steps}steps", f"{index}-{image}.png")
            (picture,), seconds = draw(pipe, [prompt], steps, row.guidance, [seed], is_strict=True, **given)
            (args.output_dir / path).parent.mkdir(parents=True, exist_ok=True)
            picture.save(args.output_dir / path)
            record = {"sampler": row.sampler, "steps": steps, "guidance": row.guidance, "prompt": prompt}
            if len(args.loras) > 1 or len(args.lora_strengths) > 1 or {*row.weights.values()} - {1}:
                record["lora_weights"] = row.weights
            records.append(record | {"seed": seed, "image": path.as_posix(), "seconds": round(seconds, 4)})
            if index < pipelines.GRID_PROMPTS:  # all would fill the memory
                pictures.setdefault((index, row.name, steps), picture)
    return records, pictures


def main(args):
    # Pictures first: a model takes minutes to load.
    rows, extra, device = sample_rows(args), start_pictures(args), pipelines.choose_device(args.device)
    if (args.output_dir / "samples.json").exists():
        print(f"--output_dir {args.output_dir} holds another run's pictures; those of the same names are overwritten")
    pipe = load_teacher(args, device)
    for index, (source, _) in enumerate(args.loras):
        load_lora(pipe, source, f"style{index}" if index else "lcm")
    pipe = task_pipeline(pipe, args)
    pipelines.start_offload(pipe, args, device)
    with pipelines.writing_to(args.output_dir):
        records, pictures = draw_all(pipe, args, rows, extra)
        (args.output_dir / "samples.json").write_text(json.dumps(records, indent=1, ensure_ascii=False), "utf-8")
        steps = sorted({count for row in rows for count in row.steps})
        labels = {row.name: row.label for row in rows}
        grid = pipelines.make_grid(args.prompts[: pipelines.GRID_PROMPTS], labels, steps, pictures)
        grid.save(args.output_dir / "grid.png")
        if args.strip:
            pipelines.make_strip(labels, pictures).save(args.output_dir / "strip.png")
    print(f"{len(records)} pictures, grid.png and samples.json in {args.output_dir}")


if __name__ == "__main__":
    sys.exit(exit_code(main, ARGS))
