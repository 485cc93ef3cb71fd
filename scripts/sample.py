# SPDX-License-Identifier: Apache-2.0
"""Draw prompts with and without an LCM-LoRA at several step counts: pictures, a labelled grid, timings.

    python scripts/sample.py --pretrained_teacher_model stable-diffusion-v1-5/stable-diffusion-v1-5 \\
        --lora outputs/lcm-lora --prompts "a red fox" "an old harbour at dawn" --output_dir outputs/samples

The grid has a row per sampler, all from the same noise. So that the teacher is shown at its best, DDIM and
DPM-Solver++ (second order, multistep) use "trailing" timesteps, which start where there is only noise
(arXiv:2305.08891; the "leading" ones of most model folders start at timestep 1 if there is one step), and
like LCM sampling they end in a clean estimate. With 1 or 2 steps the two are the same formula.
Output: <sampler>-<steps>steps/<prompt>-<image>.png, grid.png (first image of each prompt), samples.json.
Exit codes: 0 done, 2 wrong usage or unusable input, 1 anything else.
"""

import argparse
import json
import logging
import math
import re
import sys
import textwrap
import time
from itertools import product
from pathlib import Path
from pickle import UnpicklingError

DTYPES = {"no": "float32", "fp16": "float16", "bf16": "bfloat16"}
SAMPLERS = ("ddim", "dpmsolver++", "lcm-lora", "lcm-without-lora")
TITLES = dict(zip(SAMPLERS, ("DDIM", "DPM-Solver++", "LCM-LoRA", "LCM without LoRA"), strict=True))
LORA_FILE = "pytorch_lora_weights.safetensors"
MIN_CELL_PX = 128


class InputError(ValueError):
    """An input this tool cannot use; the message is one line that names it and the remedy."""


def build_parser():
    """Return the parser of the command line."""
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = cli.add_argument_group("model").add_argument
    text = "diffusers folder, Hub id, or one .safetensors or .ckpt file (SD 1.x, SD 2.x, SDXL)"
    add("--pretrained_teacher_model", required=True, metavar="MODEL", help=text)
    add("--teacher_config", metavar="MODEL", help="folder or Hub id of one file's configs (default: by Hub)")
    add("--teacher_revision", metavar="REV", help="branch, tag or commit of a Hub id (default: main)")
    add("--variant", help="weight files of a folder or Hub id, such as fp16 (default: the plain ones)")
    add("--lora", help=f"file (diffusers or kohya keys), folder with {LORA_FILE}, or Hub id (default: none)")
    add("--mixed_precision", choices=tuple(DTYPES), help="no is float32 (default: fp16 on cuda, else no)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: %(default)s)")
    group = cli.add_argument_group("sampling")
    add = group.add_argument
    prompts = group.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompts", nargs="+", metavar="TEXT", help="prompts, each in quotes")
    prompts.add_argument("--prompts_file", type=Path, metavar="FILE", help="UTF-8 text, one prompt a line")
    text = "solver steps, 1 to 1000, LCM rows to 50; a column each (default: 1 2 4 8)"
    add("--steps", nargs="+", type=int, default=[1, 2, 4, 8], metavar="N", help=text)
    text = f"rows, of {', '.join(SAMPLERS)} (default: ddim dpmsolver++, and lcm-lora with --lora)"
    add("--samplers", nargs="+", choices=SAMPLERS, metavar="NAME", help=text)
    text = "guidance of the teacher rows, the paper's w + 1; up to 1 is off (default: %(default)s)"
    add("--guidance_scale", type=float, default=7.5, metavar="G", help=text)
    text = "guidance of the LCM rows, from 1 (off) to 2 (default: %(default)s)"
    add("--lcm_guidance_scale", type=float, default=1.0, metavar="G", help=text)
    add("--negative_prompt", metavar="TEXT", help="works in rows with guidance above 1 (default: none)")
    add("--seed", type=int, default=0, help="image i of a prompt starts from seed + i (default: %(default)s)")
    add("--num_images", type=int, default=1, metavar="N", help="images per prompt (default: %(default)s)")
    add("--resolution", type=int, metavar="PX", help="side in px, multiple of 8 (default: the model's)")
    add = cli.add_argument_group("output").add_argument
    add("--output_dir", type=Path, required=True, help="folder for pictures, grid.png and samples.json")
    return cli


def parse_args(argv=None):
    """Return the checked command line, prompts read and samplers chosen; a wrong one exits with 2."""
    parser = build_parser()
    args = parser.parse_args(argv)
    samplers = args.samplers or ["ddim", "dpmsolver++"] + ["lcm-lora"] * bool(args.lora)
    args.samplers, args.steps = list(dict.fromkeys(samplers)), list(dict.fromkeys(args.steps))
    if args.prompts_file:
        text = args.prompts_file.read_text("utf-8-sig", "replace") if args.prompts_file.is_file() else ""
        args.prompts = [line.strip() for line in text.splitlines() if line.strip()]
    for is_wrong, message in problems(args):
        if is_wrong:
            parser.exit(2, f"{parser.prog}: error: {message}\n")
    return args


def problems(args):
    """Return pairs (whether it is so, message) of what can be wrong with the values of the flags."""
    teacher, lora, config = Path(args.pretrained_teacher_model), Path(args.lora or ""), args.teacher_config
    model, side = f"--pretrained_teacher_model {args.pretrained_teacher_model}", args.resolution
    scales = (args.guidance_scale, args.lcm_guidance_scale)
    no_index = teacher.is_dir() and not (teacher / "model_index.json").exists()
    no_lora_file = bool(args.lora) and lora.is_dir() and not (lora / LORA_FILE).exists()
    max_steps = 50 if any(name.startswith("lcm") for name in args.samplers) else 1000
    # diffusers 0.42 adds a timestep -1 to trailing schedules of these (61, 103, ...): a division rounds up.
    unmade = [n for n in args.steps if 1 <= n <= 1000 and math.ceil(1000 / (1000 / n)) != n]
    return (
        (not is_source(args.pretrained_teacher_model), f"{model}: not there; give a folder, file or Hub id"),
        (no_index, f"{model}: holds no model_index.json; give the folder that save_pretrained wrote"),
        (config and not is_source(config), f"--teacher_config {config}: not there; give a folder or Hub id"),
        (config and not teacher.is_file(), f"--teacher_config: {teacher} is no single file, leave it out"),
        (args.teacher_revision and teacher.exists(), f"--teacher_revision: {teacher} is local, leave it out"),
        (args.variant and teacher.is_file(), f"--variant: {teacher} is one file, leave it out"),
        (args.lora and not is_source(args.lora), f"--lora {lora}: not there; give a file, folder or Hub id"),
        (no_lora_file, f"--lora {lora}: holds no {LORA_FILE}; name the file itself"),
        ("lcm-lora" in args.samplers and not args.lora, "--samplers lcm-lora: give --lora too"),
        (not args.prompts, f"--prompts_file {args.prompts_file}: not there or empty; write a prompt a line"),
        (min(args.steps) < 1 or max(args.steps) > max_steps, f"--steps {args.steps}: give 1 to {max_steps}"),
        (unmade, f"--steps {unmade}: diffusers makes no such schedule; give one less"),
        (not all(0 <= scale <= 100 for scale in scales), f"guidance scales {scales}: give 0 to 100"),
        (not 0 <= args.seed < 2**62, f"--seed {args.seed}: give 0 to 2^62 - 1"),
        (args.num_images < 1, f"--num_images {args.num_images}: give 1 or more"),
        (side is not None and (side < 8 or side % 8), f"--resolution {side}: give a multiple of 8"),
        (args.output_dir.is_file(), f"--output_dir {args.output_dir}: is a file, give a folder"),
    )


def is_source(name):
    """Return whether a path exists or can be a Hub id: `name` or `owner/name`, not like a weight file."""
    is_id = re.fullmatch(r"(?!.*\.(safetensors|ckpt|bin|pt)$)\w[\w.-]*(/\w[\w.-]*)?", name)
    return Path(name).exists() or bool(is_id)


# --help and wrong flags must not wait for torch, so the command line is read before the heavy imports.
if __name__ == "__main__":
    ARGS = parse_args()
for package in ("xformers", "bitsandbytes"):
    logging.getLogger(package).setLevel(logging.ERROR)  # on import they warn of CUDA code not needed here

import diffusers
import torch
import transformers
from diffusers.loaders import single_file_utils as sf
from peft import get_peft_model_state_dict
from PIL import Image, ImageDraw, ImageFont
from safetensors import SafetensorError
from tqdm import tqdm

# What the libraries raise for a file that is missing, damaged or made for something else.
LOAD_ERRORS = (OSError, ValueError, LookupError, TypeError, RuntimeError, SafetensorError, UnpicklingError)


def load_pipeline(model, revision=None, variant=None, dtype=torch.float32, device="cpu", config=None):
    """Return the pipeline of a folder, Hub id or single file; raises InputError if it is no SD or SDXL."""
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    families = (diffusers.StableDiffusionPipeline, diffusers.StableDiffusionXLPipeline)
    # Without the safety checker: 1.2 GB less to load, no blackened pictures. SDXL ignores these words.
    parts = {"safety_checker": None, "requires_safety_checker": False, "feature_extractor": None}
    load, remedy = diffusers.DiffusionPipeline.from_pretrained, "check its name and files"
    source = {"revision": revision, "variant": variant}
    try:
        if Path(model).is_file():
            is_xl = sf.infer_diffusers_model_type(sf.load_single_file_checkpoint(str(model))).startswith("xl")
            load, source = families[is_xl].from_single_file, {"config": config and str(config)}
            remedy = "give --teacher_config FOLDER, a local diffusers model of the same architecture"
        pipe = load(str(model), dtype=dtype, **source, **parts).to(device)  # fails if the file lacks weights
    except (*LOAD_ERRORS, sf.SingleFileComponentError) as error:
        raise InputError(f"{model} does not load; {remedy} ({textwrap.shorten(str(error), 240)})") from error
    if not isinstance(pipe, families):
        raise InputError(f"model {model} is a {type(pipe).__name__}; give an SD 1.x, SD 2.x or SDXL")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load_lora(pipe, lora):
    """Load a LoRA (file, folder or Hub id); raises InputError unless all its UNet tensors fit."""
    logs = diffusers.utils.logging
    logs.set_verbosity(logs.CRITICAL)  # diffusers logs what it raises, and only warns of keys without a place
    try:
        weights = pipe.lora_state_dict(str(lora), unet_config=pipe.unet.config)[0]
        pipe.load_lora_weights(str(lora), adapter_name="lcm")
    except LOAD_ERRORS as error:
        why = textwrap.shorten(str(error), 240)
        raise InputError(f"LoRA {lora} does not load; give one made for this model ({why})") from error
    finally:
        logs.set_verbosity_error()
    found = sum(key.startswith("unet.") and weight.ndim > 1 for key, weight in weights.items())
    fitted = len(get_peft_model_state_dict(pipe.unet, adapter_name="lcm")) if found else 0
    if not found or fitted < found:
        raise InputError(f"LoRA {lora}: {fitted} of {found} UNet tensors fit; give one made for this model")
    pipe.unet.eval()  # new layers come in training mode, where a LoRA trained with dropout still drops


def set_sampler(pipe, name):
    """Give the pipeline the scheduler of a sampler (one of SAMPLERS); its LoRA is on for lcm-lora only."""
    # Clipping to [-1, 1] is for pixels, not latents; DDIMScheduler does it when a config does not mention it.
    options = {"timestep_spacing": "trailing", "clip_sample": False, "thresholding": False}
    kind = diffusers.LCMScheduler
    if name == "ddim":
        kind = diffusers.DDIMScheduler
        options["set_alpha_to_one"] = True
    elif name == "dpmsolver++":
        kind = diffusers.DPMSolverMultistepScheduler
        options |= {"algorithm_type": name, "solver_order": 2, "lower_order_final": True}
        options |= {"final_sigmas_type": "zero", "use_karras_sigmas": False}
    if pipe.get_list_adapters():
        (pipe.enable_lora if name == "lcm-lora" else pipe.disable_lora)()
    elif name == "lcm-lora":
        raise InputError("sampler lcm-lora: the pipeline has no LoRA; load one first")
    pipe.scheduler = kind.from_config(pipe.scheduler.config, **options)


def draw(pipe, prompts, steps, guidance, seeds, negative_prompt=None, resolution=None, output_type="pil"):
    """Return (list of images, seconds per picture in text encoder, UNet and VAE); seeds: one per prompt."""
    # Noise is drawn on the CPU: so a seed is the same noise on every device.
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    negative_prompts = None if negative_prompt is None else [negative_prompt] * len(prompts)
    texts = {"prompt": list(prompts), "negative_prompt": negative_prompts}
    images = {"height": resolution, "width": resolution, "generator": generators, "output_type": output_type}
    device = pipe.device
    wait = (lambda: None) if device.type == "cpu" else (lambda: torch.accelerator.synchronize(device))
    wait()
    started = time.perf_counter()
    result = pipe(num_inference_steps=steps, guidance_scale=guidance, **texts, **images).images
    wait()
    return list(result), (time.perf_counter() - started) / len(prompts)


def draw_all(pipe, args, scales):
    """Draw and save all pictures; return (records, first pictures by (prompt index, sampler, steps))."""
    records, pictures = [], {}
    options = {"negative_prompt": args.negative_prompt, "resolution": args.resolution}
    jobs = list(product(args.steps, enumerate(args.prompts), range(args.num_images)))
    for sampler, guidance in scales.items():
        set_sampler(pipe, sampler)
        draw(pipe, args.prompts[:1], 1, guidance, [args.seed], **options)  # the warm-up, not timed
        for steps, (index, prompt), image in tqdm(jobs, TITLES[sampler], unit="picture"):
            seed, path = args.seed + image, Path(f"{sampler}-{steps}steps", f"{index}-{image}.png")
            (picture,), seconds = draw(pipe, [prompt], steps, guidance, [seed], **options)
            (args.output_dir / path).parent.mkdir(parents=True, exist_ok=True)
            picture.save(args.output_dir / path)
            record = {"sampler": sampler, "steps": steps, "guidance": guidance, "prompt": prompt}
            records.append(record | {"seed": seed, "image": path.as_posix(), "seconds": round(seconds, 4)})
            pictures.setdefault((index, sampler, steps), picture)
    return records, pictures


def make_grid(prompts, labels, steps, pictures):
    """Return one picture: a block per prompt, in it a row per sampler (labels: name -> text)."""
    cell = next(iter(pictures.values()))
    factor = -(-MIN_CELL_PX // min(cell.size))
    width, height = cell.width * factor, cell.height * factor
    gap, font = max(6, width // 32), ImageFont.load_default(min(max(14, width // 16), 40))
    line = round(1.25 * sum(font.getmetrics()))
    margin = 2 * gap + max(round(font.getlength(part)) for part in "\n".join(labels.values()).split("\n"))
    lefts = [margin + column * (width + gap) for column in range(len(steps) + 1)]
    headings = [textwrap.wrap(prompt, int(lefts[-1] / font.getlength("n"))) for prompt in prompts]
    tall = (1 + sum(map(len, headings))) * line + len(prompts) * len(labels) * (height + gap) + 2 * gap
    grid = Image.new("RGB", (lefts[-1], tall), "white")
    pen = ImageDraw.Draw(grid)
    for left, count in zip(lefts, steps, strict=False):
        pen.text((left + width // 2, gap), f"{count} step{'s' * (count > 1)}", "black", font, anchor="ma")
    top = line + 2 * gap
    for index, lines in enumerate(headings):
        for text in lines:
            pen.text((gap, top), text, "black", font)
            top += line
        for sampler, text in labels.items():
            pen.multiline_text((gap, top + height // 2), text, "black", font, anchor="lm")
            for left, count in zip(lefts, steps, strict=False):
                picture = pictures[index, sampler, count]
                grid.paste(picture.resize((width, height), Image.Resampling.NEAREST), (left, top))
            top += height + gap
    return grid


def choose_device(name):
    """Return the torch device that --device names; raises InputError for one that is not usable here."""
    try:
        best = torch.accelerator.current_accelerator(check_available=True) or "cpu"
        return torch.empty(0, device=best if name == "auto" else name).device
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name}: not usable here; give cpu or auto") from error


def main(args):
    """Load the models, draw the pictures, write grid and records; return the exit code."""
    try:
        device = choose_device(args.device)
        dtype = getattr(torch, DTYPES[args.mixed_precision or ("fp16" if device.type == "cuda" else "no")])
        source = (args.pretrained_teacher_model, args.teacher_revision, args.variant)
        pipe = load_pipeline(*source, dtype, device, args.teacher_config)
        if args.lora:
            load_lora(pipe, args.lora)
    except InputError as error:
        print(f"sample.py: error: {error}", file=sys.stderr)
        return 2
    scales = {n: args.lcm_guidance_scale if n[:3] == "lcm" else args.guidance_scale for n in args.samplers}
    records, pictures = draw_all(pipe, args, scales)
    labels = {name: f"{TITLES[name]}\nguidance {scale:g}" for name, scale in scales.items()}
    make_grid(args.prompts, labels, args.steps, pictures).save(args.output_dir / "grid.png")
    (args.output_dir / "samples.json").write_text(json.dumps(records, indent=1, ensure_ascii=False), "utf-8")
    print(f"{len(records)} pictures, grid.png and samples.json in {args.output_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main(ARGS))
