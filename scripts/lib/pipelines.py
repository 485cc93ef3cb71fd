# SPDX-License-Identifier: Apache-2.0
"""Load a Stable Diffusion pipeline and its LoRAs, choose a sampler, draw pictures and lay them out."""

import itertools
import logging
import textwrap
import time
from pathlib import Path
from pickle import UnpicklingError

from model_args import DTYPES, PEFT_FILES, InputError

for package in ("xformers", "bitsandbytes"):
    logging.getLogger(package).setLevel(logging.ERROR)  # on import they warn of CUDA code not needed here

import diffusers
import torch
import transformers
from diffusers.loaders import single_file_utils as sf
from peft import LoraConfig, get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
from PIL import Image, ImageDraw, ImageFont
from safetensors import SafetensorError

MIN_CELL_PX = 128
# What the libraries raise for a file that is missing, damaged or made for something else.
LOAD_ERRORS = (OSError, ValueError, LookupError, TypeError, RuntimeError, SafetensorError, UnpicklingError)


def taken_for(source):
    """Return a model's or LoRA's name for an error, with a hint where no such path is here."""
    return source if Path(source).exists() else f"{source} (no such path here, so it was taken for a Hub id)"


def quiet():
    """Let the libraries print errors alone, and no progress bars of loading."""
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def load_pipeline(model, revision=None, variant=None, dtype=torch.float32, device="cpu", config=None):
    """Return the pipeline of a folder, Hub id or single file; raises InputError if it is no SD or SDXL."""
    quiet()
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
        why = textwrap.shorten(str(error), 240)
        raise InputError(f"{taken_for(model)} does not load; {remedy} ({why})") from error
    if not isinstance(pipe, families):
        raise InputError(f"model {model} is a {type(pipe).__name__}; give an SD 1.x, SD 2.x or SDXL")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load_lora(pipe, lora, name="lcm"):
    """Load a LoRA (file, folder, PEFT folder or Hub id) as adapter `name`; raises InputError on a misfit."""
    logs = diffusers.utils.logging
    logs.set_verbosity(logs.CRITICAL)  # diffusers logs what it raises, and only warns of keys without a place
    try:
        if all((Path(lora) / file).exists() for file in PEFT_FILES):
            found = add_peft_adapter(pipe.unet, lora, name)
        else:
            weights = pipe.lora_state_dict(str(lora), unet_config=pipe.unet.config)[0]
            found = sum(key.startswith("unet.") and weight.ndim > 1 for key, weight in weights.items())
            pipe.load_lora_weights(str(lora), adapter_name=name)
    except LOAD_ERRORS as error:
        why = textwrap.shorten(str(error), 240)
        remedy = "give one made for this model"
        raise InputError(f"LoRA {taken_for(lora)} does not load; {remedy} ({why})") from error
    finally:
        logs.set_verbosity_error()
    fitted = len(get_peft_model_state_dict(pipe.unet, adapter_name=name)) if found else 0
    if not found or fitted < found:
        raise InputError(f"LoRA {lora}: {fitted} of {found} UNet tensors fit; give one made for this model")
    pipe.unet.eval()  # new layers come in training mode, where a LoRA trained with dropout still drops


def add_peft_adapter(unet, folder, name):
    """Load what PeftModel.save_pretrained or a checkpoint's `unet/` holds; return its number of tensors."""
    weights = load_peft_weights(str(folder), device="cpu")
    weights = {key.removeprefix("base_model.model."): value for key, value in weights.items()}
    unet.add_adapter(LoraConfig.from_pretrained(str(folder)), adapter_name=name)
    stray = set_peft_model_state_dict(unet, weights, adapter_name=name).unexpected_keys
    if stray:
        raise ValueError(f"no place for {stray[0]}")
    return len(weights)


def set_sampler(pipe, name, weights=None):
    """Give the pipeline the scheduler of a sampler (one of SAMPLERS) and the LoRAs that go with it.

    `weights` maps adapter names to strengths (default: all that are loaded, at 1). An adapter whose name
    begins with "lcm" is on for the sampler lcm-lora only, any other one, a style, for every sampler.
    """
    # Clipping to [-1, 1] is for pixels, not latents; DDIMScheduler does it when a config does not mention it.
    options = {"timestep_spacing": "trailing", "clip_sample": False, "thresholding": False}
    kind = diffusers.LCMScheduler
    if name == "ddim":
        kind = diffusers.DDIMScheduler
        options["set_alpha_to_one"] = True
    elif name.startswith("dpmsolver"):
        kind = diffusers.DPMSolverMultistepScheduler
        options |= {"algorithm_type": name, "solver_order": 2, "lower_order_final": True}
        # The variant without ++ divides by the last sigma: diffusers ends it at the least one, not at 0.
        options |= {"final_sigmas_type": "zero" if name.endswith("++") else "sigma_min"}
        options |= {"use_karras_sigmas": False}
    if weights is None:
        weights = dict.fromkeys(itertools.chain(*pipe.get_list_adapters().values()), 1.0)
    if name == "lcm-lora" and not any(adapter.startswith("lcm") for adapter in weights):
        raise InputError("sampler lcm-lora: the pipeline has no LoRA; load one first")
    active = {key: w for key, w in weights.items() if name == "lcm-lora" or not key.startswith("lcm")}
    if active:
        pipe.enable_lora()
        pipe.set_adapters(list(active), list(active.values()))
    elif pipe.get_list_adapters():
        pipe.disable_lora()
    pipe.scheduler = kind.from_config(pipe.scheduler.config, **options)


def synchronize(device):
    """Wait until the device has done what was asked of it, so that a clock reads the truth."""
    if torch.device(device).type != "cpu":
        torch.accelerator.synchronize(device)


def draw(
    pipe, prompts, steps, guidance, seeds, negative_prompt=None, resolution=None, output_type="pil", **extra
):
    """Return (list of images, seconds per picture in text encoder, UNet and VAE); seeds: one per prompt.

    `extra` goes to the pipeline: image, mask_image, strength, control_image and so on.
    """
    # Noise is drawn on the CPU: so a seed is the same noise on every device.
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    negative_prompts = None if negative_prompt is None else [negative_prompt] * len(prompts)
    texts = {"prompt": list(prompts), "negative_prompt": negative_prompts}
    images = {"generator": generators, "output_type": output_type, **extra}
    if resolution:
        images |= {"height": resolution, "width": resolution}
    synchronize(pipe.device)
    started = time.perf_counter()
    result = pipe(num_inference_steps=steps, guidance_scale=guidance, **texts, **images).images
    synchronize(pipe.device)
    return list(result), (time.perf_counter() - started) / len(prompts)


def make_grid(prompts, labels, steps, pictures):
    """Return one picture: a block per prompt, in it a row per sampler (labels: name -> text).

    `pictures` maps (prompt index, name, steps) to a picture; a cell without one stays white.
    """
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
        for name, text in labels.items():
            pen.multiline_text((gap, top + height // 2), text, "black", font, anchor="lm")
            for left, count in zip(lefts, steps, strict=False):
                if picture := pictures.get((index, name, count)):
                    resized = picture.resize((width, height), Image.Resampling.NEAREST)
                    grid.paste(resized, (left, top))
            top += height + gap
    return grid


def choose_device(name):
    """Return the torch device that --device names; raises InputError for one that is not usable here."""
    try:
        best = torch.accelerator.current_accelerator(check_available=True) or "cpu"
        return torch.empty(0, device=best if name == "auto" else name).device
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name}: not usable here; give cpu or auto") from error


def load_teacher(args, device):
    """Return the pipeline that the flags of `add_model_flags` name; raises InputError."""
    dtype = getattr(torch, DTYPES[args.mixed_precision or ("fp16" if device.type == "cuda" else "no")])
    source = (args.pretrained_teacher_model, args.teacher_revision, args.variant)
    return load_pipeline(*source, dtype, device, args.teacher_config)


def reset_peak(device):
    """Begin to measure the peak memory of `device`, the process's resident memory where it is the CPU."""
    if torch.device(device).type != "cpu":
        torch.accelerator.reset_peak_memory_stats(device)
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets VmHWM


def peak_gib(device):
    """Return the peak memory since `reset_peak` in GiB; None on a CPU whose system does not tell it."""
    if torch.device(device).type != "cpu":
        return torch.accelerator.max_memory_allocated(device) / 2**30
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) / 2**20 for line in lines if line.startswith("VmHWM:")), None)
