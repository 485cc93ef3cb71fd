# SPDX-License-Identifier: Apache-2.0
"""Load a pipeline and its LoRAs, choose a sampler, draw pictures and lay them out."""

import argparse
import contextlib
import errno
import itertools
import json
import math
import os
import pickle
import textwrap
import time
import warnings
from pathlib import Path

import diffusers
import filelock
import torch
import transformers
from huggingface_hub.errors import HTTPError
from huggingface_hub.utils import enable_progress_bars
from peft import LoraConfig, get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
from PIL import Image, ImageDraw, ImageFont
from safetensors import SafetensorError

from lib.cli import LORA_SAMPLERS, PEFT_FILES, local_lora
from lib.trainers import DTYPES, UnusableInput, sd15, sdxl

MIN_CELL_PX = 128
GRID_PROMPTS = 16  # that sample.py shows in grid.png
MAX_PICTURE_PX = 178_956_970  # of a picture that a tool reads: Pillow's own limit
# What the libraries raise for a file that is missing, damaged or made for something else.
LOAD_ERRORS = (OSError, EOFError, ValueError, LookupError, TypeError, RuntimeError, ImportError, AttributeError)
LOAD_ERRORS += (SafetensorError, pickle.UnpicklingError, HTTPError)  # HTTPError: the Hub cannot be reached
WRITE_ERRORS = [getattr(errno, name) for name in "ENOSPC EDQUOT EFBIG EROFS EACCES EPERM EIO EISDIR ENOTDIR".split()]
TEACHER_FLAGS = ("teacher_revision", "variant", "teacher_config", "cache_dir", "prediction_type")
TEACHER_FLAGS += ("pretrained_vae_model_name_or_path", "mixed_precision", "offload", "mask")
for library in (diffusers, transformers):
    library.utils.logging.set_verbosity_error()
    library.utils.logging.disable_progress_bar()
enable_progress_bars()  # of downloads, which transformers hides too


@contextlib.contextmanager
def writing_to(folder):
    """Turn the errors of a disk that is full or read-only into UnusableInput."""
    try:
        yield
    except OSError as error:
        if error.errno not in WRITE_ERRORS:
            raise
        raise UnusableInput(f"{folder}: cannot be written to ({os.strerror(error.errno)})") from error


@contextlib.contextmanager
def writing_alone(target):
    """Hold a lock while a file is made under another name; raises UnusableInput where another process makes it."""
    lock = filelock.FileLock(target.with_name(f".writing-{target.name}.lock"), fallback_to_soft=False)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout as error:
        raise UnusableInput(f"{target}: another process is making it; wait, or remove {lock.lock_file}") from error
    except OSError:
        pass  # a file system without locks
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows removes an open file on release
            os.unlink(lock.lock_file)
        lock.release()


def refuse_folder(error):
    raise UnusableInput(f"{error.filename}: cannot be read ({error.strerror}); check its permissions")


def read_json(path):
    """Return the dict that a file holds; {} where it is missing or damaged."""
    with contextlib.suppress(OSError, ValueError):
        record = json.loads(path.read_text(encoding="utf-8") if path.is_file() else "{}")
        return record if isinstance(record, dict) else {}
    return {}


def choose_device(name):
    """Return the torch device of --device; auto is the GPU of this process, by LOCAL_RANK, or the CPU."""
    try:
        best = torch.accelerator.current_accelerator(check_available=True)
        if name == "auto" and best:
            # With the index: a bare "cuda" opens a context (0.5 GiB) on GPU 0 in every process.
            index = int(os.environ.get("LOCAL_RANK", 0)) % torch.accelerator.device_count()
            torch.accelerator.set_device_index(index)
            name = f"{best.type}:{index}"
        return torch.empty(0, device="cpu" if name == "auto" else name).device
    except (RuntimeError, AssertionError) as error:
        raise UnusableInput(f"--device {name}: not usable here; give cpu or auto") from error


def device_name(device):
    is_cuda = torch.device(device).type == "cuda"
    return torch.cuda.get_device_name(device) if is_cuda else f"{device}, {torch.get_num_threads()} threads"


def family_of(args):
    """Return the training script whose load_teacher loads the model, from the model's keys or its config."""
    model = str(args.pretrained_teacher_model)
    if Path(model).is_file():
        # The text encoders of SDXL's files are its conditioner; label_emb takes size and crop.
        is_xl = any(key.startswith("conditioner.") or ".label_emb." in key for key in sd15.weight_names(Path(model)))
        return sdxl if is_xl else sd15
    try:
        options = {"revision": args.teacher_revision, "cache_dir": args.cache_dir}
        kind = str(diffusers.DiffusionPipeline.load_config(model, **options)["_class_name"])
    except LOAD_ERRORS as error:
        flags = argparse.Namespace(**{"variant": None} | vars(args))
        raise UnusableInput(sd15.loading_error(flags, error)) from error
    if not kind.startswith("StableDiffusion") or kind.startswith("StableDiffusion3"):
        raise UnusableInput(f"model {model} is a {kind}; give an SD 1.x, SD 2.x or SDXL")
    return sdxl if kind.startswith("StableDiffusionXL") else sd15


def load_teacher(args, device):
    """Return the pipeline of `add_model_flags`, on the device; with --offload on the CPU until `start_offload`."""
    args = argparse.Namespace(**dict.fromkeys(TEACHER_FLAGS) | vars(args))
    device = torch.device(device)
    if args.offload and device.type == "cpu":
        raise UnusableInput("--offload: moves the model to a GPU part by part, and there is none; leave it out")
    dtype = DTYPES[args.mixed_precision or ("fp16" if device.type == "cuda" else "no")]
    pipe = family_of(args).load_teacher(args, dtype, "cpu" if args.offload else device, check=False)
    parts = {name: part for name, part in pipe.components.items() if name.startswith(("text", "tok", "unet", "vae"))}
    if missing := sorted(name for name, part in parts.items() if part is None):
        raise UnusableInput(f"{args.pretrained_teacher_model}: has no {', '.join(missing)}; give a whole base model")
    channels = pipe.unet.config.in_channels
    if channels != pipe.unet.config.out_channels and not (args.mask and channels == 9):
        remedy = "give --image and --mask to sample.py" if channels == 9 else "give a text-to-image model"
        kind = "an inpainting model, " if channels == 9 else ""
        raise UnusableInput(f"{args.pretrained_teacher_model}: {kind}its UNet takes {channels} channels; {remedy}")
    pipe.vae.enable_slicing()  # SDXL decodes in 3 GiB a picture, whatever the batch
    pipe.set_progress_bar_config(disable=True)
    return pipe


def start_offload(pipe, args, device):
    if args.offload:
        pipe.enable_model_cpu_offload(device=device)


def lora_files(lora):
    """Return the files of a LoRA that `load_lora` reads: one, or PEFT's two."""
    source = local_lora(lora)
    path, pair = sd15.lora_file(source), [source / name for name in PEFT_FILES]
    return pair if all(map(Path.exists, pair)) and (path.name == PEFT_FILES[1] or Path(lora).is_file()) else [path]


def load_lora(pipe, lora, name="lcm"):
    """Load a LoRA (file, folder, PEFT folder or Hub id) as adapter `name`; refuse one that does not fit."""
    logs, source = diffusers.utils.logging, local_lora(lora)
    # diffusers logs what it raises, and only warns of keys without a place; of the Hub, that it takes one of several.
    logs.set_verbosity(logs.CRITICAL if source.exists() else logs.WARNING)
    try:
        path, *adapter = lora_files(lora)
        if adapter:
            found = add_peft_adapter(pipe.unet, source, name)
        else:
            if any(key.endswith("dora_scale") for key in sd15.weight_names(path)):
                raise ValueError("it is a DoRA, whose scales diffusers leaves out")
            weights, alphas = pipe.lora_state_dict(str(source), unet_config=pipe.unet.config)
            found = sum(key.startswith("unet.") and weight.ndim > 1 for key, weight in weights.items())
            layers = sum(key.endswith(("down.weight", "lora_A.weight")) for key in weights)
            is_uneven = len(set((alphas or {}).values())) > 1 or 0 < len(alphas or {}) < layers
            pipe.load_lora_weights(fold_alphas(weights, alphas) if is_uneven else str(source), adapter_name=name)
    except LOAD_ERRORS as error:
        why = textwrap.shorten(str(error), 240)
        taken = "" if Path(lora).exists() else " (no such path here, so it was taken for a Hub id)"
        raise UnusableInput(f"LoRA {lora}{taken} does not load; give one made for this model ({why})") from error
    finally:
        logs.set_verbosity_error()
    fitted = get_peft_model_state_dict(pipe.unet, adapter_name=name) if found else {}
    loaded, expected = sum(not tensor.is_meta for tensor in fitted.values()), max(found, len(fitted))
    if not found or loaded < expected:  # on "meta" is the half that a layer lacks
        raise UnusableInput(f"LoRA {lora}: {loaded} of {expected} UNet tensors fit; give one made for this model")
    if not all(tensor.isfinite().all() for tensor in fitted.values()):
        raise UnusableInput(f"LoRA {lora}: holds weights that are not finite; take an earlier checkpoint")
    # New layers come in training mode, where a LoRA trained with dropout would still drop.
    pipe.unet.eval()


def fold_alphas(weights, alphas):
    """Return a LoRA's weights with its alphas in them, because diffusers misreads alphas that differ by layer."""
    for key, alpha in alphas.items():
        stem = key.removesuffix(".alpha")
        down = stem if stem in weights else f"{stem}.lora.down.weight"
        weights[down] = weights[down] * (alpha / len(weights[down]))
    return weights


def add_peft_adapter(unet, folder, name):
    """Load what PeftModel.save_pretrained or a checkpoint's `unet/` holds; return its number of tensors."""
    weights = load_peft_weights(str(folder), device="cpu")
    weights = {key.removeprefix("base_model.model."): value for key, value in weights.items()}
    unet.add_adapter(LoraConfig.from_pretrained(str(folder)), adapter_name=name)
    stray = set_peft_model_state_dict(unet, weights, adapter_name=name).unexpected_keys
    if stray:
        raise ValueError(f"no place for {stray[0]}")
    return len(weights)


def read_picture(path, background="white"):
    try:
        return sd15.open_picture(Path(path).read_bytes(), MAX_PICTURE_PX, background=background)[0]
    except (OSError, sd15.SkippedSample) as error:
        remedy = f"give a PNG or JPEG of at most {MAX_PICTURE_PX // 10**6} megapixels"
        raise UnusableInput(f"picture {path} cannot be read ({error}); {remedy}") from error


def set_sampler(pipe, name, weights=None):
    """Give the pipeline a sampler's (one of SAMPLERS) scheduler and LoRAs; return what else `draw` needs for it.

    `weights` maps adapter names to strengths (default: all that are loaded, at 1). An adapter whose name
    begins with "lcm" is on for the samplers lcm-lora... only; any other one, a style, is on for every sampler.
    """
    # Clipping to [-1, 1] is for pixels, not latents; DDIMScheduler does it when a config does not mention it.
    options = {"timestep_spacing": "trailing", "clip_sample": False, "thresholding": False}
    kind = diffusers.LCMScheduler
    if name.endswith(("ddim", "euler")):  # Euler is DDIM with eta 0
        kind = diffusers.DDIMScheduler
        options["set_alpha_to_one"] = True
    elif name.startswith("dpmsolver"):
        kind = diffusers.DPMSolverMultistepScheduler
        options |= {"algorithm_type": name, "solver_order": 2, "lower_order_final": True}
        # The variant without ++ divides by the last sigma: diffusers ends it at the least one, not at 0.
        end = "zero" if name.endswith("++") else "sigma_min"
        options |= {"final_sigmas_type": end, "use_karras_sigmas": False}
    if weights is None:
        weights = dict.fromkeys(itertools.chain(*pipe.get_list_adapters().values()), 1.0)
    if name in LORA_SAMPLERS and not any(adapter.startswith("lcm") for adapter in weights):
        raise UnusableInput(f"sampler {name}: the pipeline has no LoRA; load one first")
    active = {key: w for key, w in weights.items() if name in LORA_SAMPLERS or not key.startswith("lcm")}
    if active:
        pipe.enable_lora()
        pipe.set_adapters(list(active), list(active.values()))
    elif pipe.get_list_adapters():
        pipe.disable_lora()
    pipe.scheduler = kind.from_config(pipe.scheduler.config, **options)
    return {"eta": 0.3} if name == "lcm-lora-ddim" else {}  # the default of --student_eta


def synchronize(device):
    """Wait until the device is idle, because a clock would otherwise stop before the work does."""
    if torch.device(device).type != "cpu":
        torch.accelerator.synchronize(device)


def draw(pipe, prompts, steps, guidance, seeds, negative_prompt=None, resolution=None, is_strict=False, **extra):
    """Return (list of images, seconds per picture in text encoder, UNet and VAE); seeds: one per prompt.

    `extra` goes to the pipeline: image, mask_image, strength, control_image and so on. A batch that does not fit into
    the GPU's memory is drawn in halves, and the batches after it too. NaN is black, or refused where `is_strict`.
    """
    # Noise is drawn on the CPU, so that a seed gives the same noise on every device.
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    negative_prompts = None if negative_prompt is None else [negative_prompt] * len(prompts)
    texts = {"prompt": list(prompts), "negative_prompt": negative_prompts}
    images = {"generator": generators, **extra}
    if resolution:
        images |= {"height": resolution, "width": resolution}
    # SDXL's own VAE overflows in float16: diffusers itself decodes with it in float32, if it is in float16 before.
    if pipe.vae is not None and pipe.vae.dtype != pipe.unet.dtype:
        pipe.vae.to(pipe.unet.dtype)
    size = getattr(pipe, "batch_that_fits", len(prompts))
    if len(prompts) <= size:
        synchronize(pipe.device)
        started = time.perf_counter()
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("error" if is_strict else "ignore", "invalid value encountered in cast")
                result = pipe(num_inference_steps=steps, guidance_scale=guidance, **texts, **images).images
        except RuntimeWarning as error:
            cause = f"pictures of {steps} steps, guidance {guidance:g}: not finite"
            raise UnusableInput(f"{cause}; give --mixed_precision no, or another LoRA") from error
        except RuntimeError as error:
            if not sd15.OUT_OF_MEMORY.search(str(error)):
                raise
            if len(prompts) == 1:
                remedy = "give --mixed_precision fp16, a smaller --resolution or --offload"
                cause = f"one picture does not fit into the GPU's memory ({sd15.one_line(error)[:160]})"
                raise UnusableInput(f"{cause}; {remedy}") from error
        else:
            synchronize(pipe.device)
            return list(result), (time.perf_counter() - started) / len(prompts)
        # Outside the handler: the exception holds the tensors of the failed attempt.
        pipe.maybe_free_model_hooks()  # the failed attempt has left the UNet on the GPU
        size = pipe.batch_that_fits = len(prompts) // 2
    options = (negative_prompt, resolution, is_strict)
    first, seconds = draw(pipe, prompts[:size], steps, guidance, seeds[:size], *options, **extra)
    rest, more = draw(pipe, prompts[size:], steps, guidance, seeds[size:], *options, **extra)
    return first + rest, (len(first) * seconds + len(rest) * more) / len(prompts)


def make_grid(prompts, labels, steps, pictures):
    """Return one picture: a block per prompt, in it a row per sampler (labels: name -> text).

    `pictures` maps (prompt index, name, steps) to a picture; other cells are white. `steps`: list or {key: heading}.
    """
    columns = steps if isinstance(steps, dict) else {n: f"{n} step{'s' * (n > 1)}" for n in steps}
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
    for left, heading in zip(lefts, columns.values(), strict=False):
        pen.text((left + width // 2, gap), heading, "black", font, anchor="ma")
    top = line + 2 * gap
    for index, lines in enumerate(headings):
        for text in lines:
            pen.text((gap, top), text, "black", font)
            top += line
        for name, text in labels.items():
            pen.multiline_text((gap, top + height // 2), text, "black", font, anchor="lm")
            for left, column in zip(lefts, columns, strict=False):
                if picture := pictures.get((index, name, column)):
                    grid.paste(picture.resize((width, height), Image.Resampling.NEAREST), (left, top))
            top += height + gap
    return grid


def make_strip(labels, pictures):
    """Return one wide picture: a column per prompt, a row per sampler and step count; `pictures` as in make_grid."""
    rows = {key[1:]: f"{labels[key[1]]}\n{key[2]} step{'s' * (key[2] > 1)}" for key in pictures}
    columns = dict.fromkeys((index for index, *_ in pictures), "")
    return make_grid([""], rows, columns, {(0, tuple(row), index): p for (index, *row), p in pictures.items()})


def reset_peak(device):
    """Begin to measure the peak memory of `device`, or the process's resident memory on a CPU."""
    if torch.device(device).type != "cpu":
        torch.accelerator.reset_peak_memory_stats(device)
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets VmHWM


def peak_gib(device):
    """Return the peak memory since `reset_peak` in GiB; nan on a CPU whose system does not report it."""
    if torch.device(device).type != "cpu":
        return torch.accelerator.max_memory_allocated(device) / 2**30
    return resident_gib("VmHWM:")


def resident_gib(name):
    """Return `VmRSS:` or the peak, `VmHWM:`, of this process in GiB; nan where the system does not report it."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) / 2**20 for line in lines if line.startswith(name)), math.nan)
