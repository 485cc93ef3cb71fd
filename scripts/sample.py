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
import pickle
import re
import sys
import textwrap
import time
import warnings
from itertools import product
from pathlib import Path

LABELS = {
    "ddim": "teacher, DDIM",
    "dpmsolver++": "teacher, DPM-Solver++",
    "lcm-lora": "LCM-LoRA",
    "lcm-without-lora": "LCM, no LoRA",
}
LORA_FILE = "pytorch_lora_weights.safetensors"
MIN_CELL_PX = 128


class InputError(ValueError):
    """An input this tool cannot use; the message is one line that names it and the remedy."""


def build_parser():
    """Return the parser of the command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument_group("model").add_argument
    text = "diffusers folder, Hub id, or one .safetensors or .ckpt file (SD 1.x, SD 2.x, SDXL)"
    add("--pretrained_teacher_model", required=True, metavar="MODEL", help=text)
    add("--teacher_revision", metavar="REV", help="branch, tag or commit of a Hub id (default: main)")
    add("--variant", help="weight files of a folder or Hub id, such as fp16 (default: the plain ones)")
    text = f"file (diffusers or kohya keys), folder with {LORA_FILE}, or Hub id (default: none)"
    add("--lora", help=text)
    text = "dtype of weights and sampling; no is float32 (default: fp16 on cuda, else no)"
    add("--mixed_precision", choices=("no", "fp16", "bf16"), help=text)
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: %(default)s)")

    group = parser.add_argument_group("sampling")
    add = group.add_argument
    prompts = group.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompts", nargs="+", metavar="TEXT", help="prompts, each in quotes")
    prompts.add_argument("--prompts_file", type=Path, metavar="FILE", help="UTF-8 text, one prompt a line")
    text = "solver steps, 1 to 1000, for LCM up to 50; a column each (default: 1 2 4 8)"
    add("--steps", nargs="+", type=int, default=[1, 2, 4, 8], metavar="N", help=text)
    text = f"rows, of {', '.join(LABELS)} (default: ddim dpmsolver++, and lcm-lora with --lora)"
    add("--samplers", nargs="+", choices=tuple(LABELS), metavar="NAME", help=text)
    text = "guidance of the teacher rows, the paper's w + 1; up to 1 is off (default: %(default)s)"
    add("--guidance_scale", type=float, default=7.5, metavar="G", help=text)
    text = "guidance of the LCM rows, from 1 (off) to about 2 (default: %(default)s)"
    add("--lcm_guidance_scale", type=float, default=1.0, metavar="G", help=text)
    add("--negative_prompt", metavar="TEXT", help="works in rows with guidance above 1 (default: none)")
    add("--seed", type=int, default=0, help="image i of a prompt starts from seed + i (default: %(default)s)")
    add("--num_images", type=int, default=1, metavar="N", help="images per prompt (default: %(default)s)")
    add("--resolution", type=int, metavar="PX", help="side in pixels, a multiple of 8 (default: the model's)")

    add = parser.add_argument_group("output").add_argument
    add("--output_dir", type=Path, required=True, help="folder for pictures, grid.png and samples.json")
    return parser


def parse_args(argv=None):
    """Return the checked command line, prompts read and samplers chosen; one that cannot work exits with 2."""
    parser = build_parser()
    args = parser.parse_args(argv)
    samplers = args.samplers or ["ddim", "dpmsolver++"] + ["lcm-lora"] * bool(args.lora)
    args.samplers, args.steps = list(dict.fromkeys(samplers)), list(dict.fromkeys(args.steps))
    if args.prompts_file:
        text = args.prompts_file.read_text("utf-8", "replace") if args.prompts_file.is_file() else ""
        args.prompts = [line.strip() for line in text.splitlines() if line.strip()]
    for is_wrong, message in problems(args):
        if is_wrong:
            parser.exit(2, f"{parser.prog}: error: {message}\n")
    return args


def problems(args):
    """Return pairs (whether it is so, message) of what can be wrong with the values of the flags."""
    teacher, lora = Path(args.pretrained_teacher_model), Path(args.lora or "")
    model, side = f"--pretrained_teacher_model {args.pretrained_teacher_model}", args.resolution
    scales = (args.guidance_scale, args.lcm_guidance_scale)
    no_index = teacher.is_dir() and not (teacher / "model_index.json").exists()
    no_lora_file = bool(args.lora) and lora.is_dir() and not (lora / LORA_FILE).exists()
    other_file = teacher.is_file() and teacher.suffix not in (".safetensors", ".ckpt")
    return (
        (not is_source(args.pretrained_teacher_model), f"{model}: not there; give a folder, file or Hub id"),
        (other_file, f"{model}: give a folder, or a file that ends in .safetensors or .ckpt"),
        (no_index, f"{model}: holds no model_index.json; give the folder that save_pretrained wrote"),
        (args.teacher_revision and teacher.exists(), f"--teacher_revision: {model} is local, leave it out"),
        (args.variant and teacher.is_file(), f"--variant: {model} is one file, leave it out"),
        (args.lora and not is_source(args.lora), f"--lora {lora}: not there; give a file, folder or Hub id"),
        (no_lora_file, f"--lora {lora}: holds no {LORA_FILE}; name the file itself"),
        ("lcm-lora" in args.samplers and not args.lora, "--samplers lcm-lora: give --lora too"),
        (not args.prompts, f"--prompts_file {args.prompts_file}: not there or empty; write a prompt a line"),
        (not all(1 <= n <= 1000 for n in args.steps), f"--steps {args.steps}: give numbers from 1 to 1000"),
        (not all(0 <= scale <= 100 for scale in scales), f"guidance scales {scales}: give 0 to 100"),
        (not 0 <= args.seed < 2**63, f"--seed {args.seed}: give 0 to 2^63 - 1"),
        (args.num_images < 1, f"--num_images {args.num_images}: give 1 or more"),
        (side is not None and (side < 8 or side % 8), f"--resolution {side}: give a multiple of 8"),
        (args.output_dir.is_file(), f"--output_dir {args.output_dir}: is a file, give a folder"),
    )


def is_source(name):
    """Return whether a path exists or can be a Hub id: `name` or `owner/name`, not like a weight file's name."""
    is_id = re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name) and not re.search(r"\.(safetensors|ckpt|bin|pt)$", name)
    return Path(name).exists() or bool(is_id)


# --help and wrong flags must not wait for torch, so the command line is read before the heavy imports.
if __name__ == "__main__":
    ARGS = parse_args()

import diffusers
import torch
import transformers
from diffusers.loaders.single_file_utils import infer_diffusers_model_type, load_single_file_checkpoint
from peft import get_peft_model_state_dict
from PIL import Image, ImageDraw, ImageFont
from safetensors import SafetensorError
from tqdm import tqdm

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# What the libraries raise for a file that is missing, damaged or made for something else.
FILE_ERRORS = (OSError, ValueError, LookupError, TypeError, RuntimeError)
LOAD_ERRORS = (*FILE_ERRORS, SafetensorError, pickle.UnpicklingError)


def load_pipeline(model, revision=None, variant=None, dtype=torch.float32, device="cpu"):
    """Return the pipeline of a folder, Hub id or single file; raises InputError if it is no SD or SDXL."""
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    # Without the safety checker: 1.2 GB less to load, no blackened pictures.
    options = {"dtype": dtype, "safety_checker": None, "requires_safety_checker": False}
    kind = diffusers.DiffusionPipeline
    try:
        if Path(model).is_file():
            family = infer_diffusers_model_type(load_single_file_checkpoint(str(model)))
            is_xl = family.startswith("xl")
            kind = diffusers.StableDiffusionXLPipeline if is_xl else diffusers.StableDiffusionPipeline
            pipe = kind.from_single_file(str(model), **options)
        else:
            pipe = kind.from_pretrained(str(model), revision=revision, variant=variant, **options)
    except LOAD_ERRORS as error:
        why = textwrap.shorten(str(error), 240)
        raise InputError(f"model {model} does not load; check its name and files ({why})") from error
    if not isinstance(pipe, (diffusers.StableDiffusionPipeline, diffusers.StableDiffusionXLPipeline)):
        raise InputError(f"model {model} is a {type(pipe).__name__}; give an SD 1.x, SD 2.x or SDXL")
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def load_lora(pipe, lora):
    """Load a LoRA (file, folder or Hub id); raises InputError unless all its UNet tensors find their place."""
    logs = diffusers.utils.logging
    verbosity = logs.get_verbosity()
    logs.set_verbosity(logs.CRITICAL)  # the libraries also log what they raise, and only warn of stray keys
    try:
        with warnings.catch_warnings(action="ignore"):
            weights = pipe.lora_state_dict(str(lora), unet_config=pipe.unet.config)[0]
            pipe.load_lora_weights(str(lora), adapter_name="lcm")
    except LOAD_ERRORS as error:
        why = textwrap.shorten(str(error), 240)
        raise InputError(f"LoRA {lora} does not load; give one made for this model ({why})") from error
    finally:
        logs.set_verbosity(verbosity)
    found = sum(key.startswith("unet.") and weight.ndim > 1 for key, weight in weights.items())
    fitted = len(get_peft_model_state_dict(pipe.unet, adapter_name="lcm")) if found else 0
    if not found or fitted < found:
        raise InputError(f"LoRA {lora}: {fitted} of {found} UNet tensors fit; give one made for this model")
    # peft makes the new layers in float32 and, if the LoRA was trained with dropout, in training mode.
    pipe.to(pipe.dtype)
    pipe.unet.eval()


def set_sampler(pipe, name):
    """Give the pipeline the scheduler of a sampler (key of LABELS); its LoRA is on for lcm-lora, else off."""
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
    has_lora = bool(pipe.get_list_adapters())
    if name == "lcm-lora" and not has_lora:
        raise InputError("sampler lcm-lora: the pipeline has no LoRA; load one first")
    if has_lora:
        (pipe.enable_lora if name == "lcm-lora" else pipe.disable_lora)()
    pipe.scheduler = kind.from_config(pipe.scheduler.config, **options)


def check_steps(pipe, samplers, steps):
    """Raise InputError unless every sampler has a schedule of exactly each number of steps."""
    for sampler, count in product(samplers, steps):
        set_sampler(pipe, sampler)
        try:
            pipe.scheduler.set_timesteps(count)
            # For some counts (61, 103, ...) trailing schedules of diffusers 0.42 get one timestep too many, -1.
            is_made = len(pipe.scheduler.timesteps) == count
        except ValueError:
            is_made = False
        if not is_made:
            raise InputError(f"--steps {count}: {sampler} has no such schedule; give another number")


def draw(pipe, prompts, steps, guidance, seeds, negative_prompt=None, resolution=None, output_type="pil"):
    """Return (list of images, seconds per picture) of a batch with one seed per prompt.

    The time is that of text encoder, UNet and VAE. Guidance above 1 doubles the UNet's batch, up to 1 it is
    left out. Noise is drawn on the CPU: a seed is the same noise for every sampler and on every device.
    """
    assert len(prompts) == len(seeds), "one seed per prompt"
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    negative_prompts = None if negative_prompt is None else [negative_prompt] * len(prompts)
    texts = {"prompt": list(prompts), "negative_prompt": negative_prompts}
    images = {"height": resolution, "width": resolution, "generator": generators, "output_type": output_type}
    synchronize(pipe.device)
    started = time.perf_counter()
    result = pipe(num_inference_steps=steps, guidance_scale=guidance, **texts, **images).images
    synchronize(pipe.device)
    return list(result), (time.perf_counter() - started) / len(prompts)


def synchronize(device):
    """Wait until an accelerator has done what was asked of it, so that the clock can be read."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def draw_all(pipe, args):
    """Draw and save every picture; return (records, first pictures by (prompt index, sampler, steps))."""
    records, pictures = [], {}
    options = {"negative_prompt": args.negative_prompt, "resolution": args.resolution}
    jobs = list(product(args.steps, enumerate(args.prompts), range(args.num_images)))
    progress = tqdm(total=len(args.samplers) * len(jobs), unit="picture")
    for sampler in args.samplers:
        set_sampler(pipe, sampler)
        guidance = guidance_of(sampler, args)
        draw(pipe, args.prompts[:1], 1, guidance, [args.seed], **options)  # the warm-up, not timed
        for steps, (index, prompt), image in jobs:
            seed, path = args.seed + image, Path(f"{sampler}-{steps}steps", f"{index}-{image}.png")
            (picture,), seconds = draw(pipe, [prompt], steps, guidance, [seed], **options)
            (args.output_dir / path).parent.mkdir(parents=True, exist_ok=True)
            picture.save(args.output_dir / path)
            record = {"sampler": sampler, "steps": steps, "guidance": guidance, "prompt": prompt}
            records.append(record | {"seed": seed, "image": path.as_posix(), "seconds": round(seconds, 4)})
            pictures.setdefault((index, sampler, steps), picture)
            progress.update()
    progress.close()
    return records, pictures


def guidance_of(sampler, args):
    """Return the guidance scale of a sampler's row."""
    return args.lcm_guidance_scale if sampler.startswith("lcm") else args.guidance_scale


def make_grid(prompts, labels, steps, pictures):
    """Return one picture: per prompt a block with a row per sampler (labels: name -> text), a column per steps."""
    cell = next(iter(pictures.values()))
    factor = -(-MIN_CELL_PX // min(cell.size))
    width, height = cell.width * factor, cell.height * factor
    gap, font = max(6, width // 32), ImageFont.load_default(min(max(14, width // 16), 40))
    line = round(1.25 * sum(font.getmetrics()))
    left = 2 * gap + max(round(font.getlength(part)) for text in labels.values() for part in text.split("\n"))
    lefts = [left + column * (width + gap) for column in range(len(steps) + 1)]
    headings = [textwrap.wrap(prompt, int(lefts[-1] / font.getlength("n"))) for prompt in prompts]
    tall = (1 + sum(map(len, headings))) * line + len(prompts) * len(labels) * (height + gap) + 2 * gap
    grid = Image.new("RGB", (lefts[-1], tall), "white")
    pen = ImageDraw.Draw(grid)
    for x, count in zip(lefts, steps, strict=False):
        pen.text((x + width // 2, gap), f"{count} step{'s' * (count > 1)}", "black", font, anchor="ma")
    top = line + 2 * gap
    for index, lines in enumerate(headings):
        for text in lines:
            pen.text((gap, top), text, "black", font)
            top += line
        for sampler, text in labels.items():
            pen.multiline_text((gap, top + height // 2), text, "black", font, anchor="lm")
            for x, count in zip(lefts, steps, strict=False):
                picture = pictures[index, sampler, count]
                grid.paste(picture.resize((width, height), Image.Resampling.NEAREST), (x, top))
            top += height + gap
    return grid


def choose_device(name):
    """Return the torch device that --device names; raises InputError for one that is not usable here."""
    if name == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name}: not usable here; give cpu or auto") from error


def main(args):
    """Load the models, draw the pictures, write grid and records; return the exit code."""
    try:
        device = choose_device(args.device)
        dtype = DTYPES[args.mixed_precision or ("fp16" if device.type == "cuda" else "no")]
        source = (args.pretrained_teacher_model, args.teacher_revision, args.variant)
        pipe = load_pipeline(*source, dtype, device)
        if args.lora:
            load_lora(pipe, args.lora)
        check_steps(pipe, args.samplers, args.steps)
    except InputError as error:
        print(f"sample.py: error: {error}", file=sys.stderr)
        return 2
    records, pictures = draw_all(pipe, args)
    labels = {name: f"{LABELS[name]}\nguidance {guidance_of(name, args):g}" for name in args.samplers}
    make_grid(args.prompts, labels, args.steps, pictures).save(args.output_dir / "grid.png")
    (args.output_dir / "samples.json").write_text(json.dumps(records, indent=1, ensure_ascii=False), "utf-8")
    print(f"{len(records)} pictures, grid.png and samples.json in {args.output_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main(ARGS))
