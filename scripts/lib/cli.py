# SPDX-License-Identifier: Apache-2.0
"""The flags of models, LoRAs and prompts, and the checks of their values; nothing slow is imported, for --help."""

import argparse
import difflib
import math
import os
import re
import signal
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError, safe_open

LORA_SAMPLERS = ("lcm-lora", "lcm-lora-ddim", "lcm-lora-euler")
SAMPLERS = ("ddim", "dpmsolver", "dpmsolver++", *LORA_SAMPLERS, "lcm-without-lora")
NAMES = ("DDIM", "DPM-Solver", "DPM-Solver++", "LCM-LoRA", "LCM-LoRA, DDIM", "LCM-LoRA, Euler", "LCM without LoRA")
TITLES = dict(zip(SAMPLERS, NAMES, strict=True))
LORA_FILE = "pytorch_lora_weights.safetensors"
PEFT_FILES = ("adapter_config.json", "adapter_model.safetensors")
MAX_LCM_STEPS = 50  # LCMScheduler's original_inference_steps
MAY_BE_EMPTY = ("--prompts", "--negative_prompt", "--validation_prompts", "--default_caption")


class ToolParser(argparse.ArgumentParser):
    """A parser whose errors are one line; an unknown flag gets the nearest known one."""

    def __init__(self, description, **options):
        raw = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=raw, allow_abbrev=False, **options)

    def parse_args(self, args=None, namespace=None):
        """Look for a mistyped flag first: argparse would only report the required one that it stands for."""
        words = sys.argv[1:] if args is None else args
        known = [flag for action in self._actions for flag in action.option_strings]
        flags = {str(word).partition("=")[0] for word in words if re.match(r"--\w", str(word))}  # not values: secrets
        if unknown := flags.difference(known):
            near = difflib.get_close_matches(min(unknown), known, 1, 0.73)
            self.error(f"unknown flag {min(unknown)}" + (f"; did you mean {near[0]}?" if near else ""))
        return super().parse_args(args, namespace)

    def parse_known_args(self, args=None, namespace=None):
        """Refuse an empty value, as that of an unset variable is, for every tool: a path would be this folder."""
        flag = ""
        for word in map(str, sys.argv[1:] if args is None else args):
            flag, sign, value = word.partition("=") if word.startswith("--") else (flag, "=", word)
            if sign and not value.strip() and flag not in MAY_BE_EMPTY:
                self.error(f"{flag}: its value is empty; give one, or leave the flag out")
        return super().parse_known_args(args, namespace)

    def error(self, message):
        message = re.sub(r"(?s)^(unrecognized .*?\s--?[\w-]+).*", r"\1", message)  # values may be secrets
        if "://" in message:
            from lib.trainers import sd15  # slow to import: only where an address may hold a secret

            message = sd15.masked(message)
        self.exit(2, f"{self.prog}: error: {message}\n")


def started(args):
    """Return checked flags, after saying that libraries load: that takes ten seconds, and Ctrl-C meanwhile ends it."""
    if os.environ.get("RANK", "0") == "0":
        print("loading libraries", file=sys.stderr, flush=True)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # an import may swallow KeyboardInterrupt
    return args


def within(kind, low, high=math.inf, multiple=1):
    def read(text):
        value = kind(text)
        if not low <= value <= high or (multiple > 1 and value % multiple):
            bounds = f"{low:g} or more" if high == math.inf else f"{low:g} to {high:g}"
            raise argparse.ArgumentTypeError(f"{text}: give {bounds}{f', a multiple of {multiple}' * (multiple > 1)}")
        return value

    read.__name__ = kind.__name__  # what argparse calls a word that is no number
    return read


COUNT, GUIDANCE, SIDE_PX = within(int, 1), within(float, 0, 100), within(int, 8, multiple=8)


def a_file(text):
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"{text}: not there; give a file")
    return Path(text)


def utf8(text):
    if re.search("[\ud800-\udfff]", text):
        raise argparse.ArgumentTypeError(f"{text!r}: is not UTF-8")
    return text


def prompts_in(text):
    try:
        lines = Path(text).read_text("utf-8-sig").split("\n") if Path(text).is_file() else []
    except UnicodeDecodeError as error:
        raise argparse.ArgumentTypeError(f"{text}: is not UTF-8 ({error.reason}); save it as UTF-8") from error
    if not (prompts := [line.strip() for line in lines if line.strip()]):
        raise argparse.ArgumentTypeError(f"{text}: not there or empty; write a prompt a line")
    return prompts


def add_model_flags(cli, required=True):
    add = cli.add_argument_group("model").add_argument
    text = "diffusers folder, Hub id, or one .safetensors or .ckpt file (SD 1.x, SD 2.x, SDXL)"
    add("--pretrained_teacher_model", required=required, metavar="MODEL", help=text)
    add("--teacher_config", metavar="MODEL", help="folder or Hub id that describes a single file (or the Hub)")
    add("--teacher_revision", metavar="REV", help="branch, tag or commit of a Hub id (default: main)")
    add("--variant", help="variant of the weight files, such as fp16 (default: files without a variant)")
    text = "what the UNet predicts (default: the model's config, or the markers of a single file)"
    add("--prediction_type", choices=("epsilon", "v_prediction", "sample"), help=text)
    text = "VAE that replaces the model's own (default: none; SDXL's own from the Hub in fp16: fp16-fix)"
    add("--pretrained_vae_model_name_or_path", metavar="MODEL", help=text)
    add("--cache_dir", metavar="DIR", help="folder for the model's files from the Hub (default: the Hub's own cache)")
    add("--mixed_precision", choices=("no", "fp16", "bf16"), help="no: float32 (default: fp16 on CUDA, else no)")
    text = "keep the model in the CPU's memory and move each part to the GPU while it computes (SDXL in 8 GB)"
    add("--offload", action="store_true", help=text)
    return add


def add_prompt_flags(group, required=True):
    prompts = group.add_mutually_exclusive_group(required=required)
    prompts.add_argument("--prompts", nargs="+", type=utf8, metavar="TEXT", help="prompts in quotes; 77 tokens count")
    prompts.add_argument("--prompts_file", type=prompts_in, dest="prompts", metavar="FILE", help="a prompt a line")


def is_source(name):
    """Return whether a path exists or can be a Hub id: `name` or `owner/name`, not like a weight file."""
    is_id = re.fullmatch(r"(?!.*\.(safetensors|ckpt|bin|pt)$)\w[\w.-]*(/\w[\w.-]*)?", name)
    return Path(name).is_file() or Path(name).is_dir() if Path(name).exists() else bool(is_id)  # and no FIFO


def split_weight(text):
    """Return (source, weight) of `PATH` or `PATH=WEIGHT`; a weight that is no number is nan."""
    source, sign, weight = text.rpartition("=")
    if not sign or Path(text).exists():
        return text, 1.0
    try:
        return source, float(weight)
    except ValueError:
        return source, math.nan


def local_lora(source):
    """Return the path of a LoRA, PEFT's as its folder; of the download where it is a Hub id that can be reached."""
    if not Path(source).exists():
        from huggingface_hub import errors, hf_hub_download, list_repo_files  # slow to import

        with suppress(OSError, ValueError, errors.HTTPError):  # loading it tells the user
            return Path(hf_hub_download(str(source), LORA_FILE))
        with suppress(OSError, ValueError, errors.HTTPError):  # a style's file has a name of its own
            (name,) = {each for each in list_repo_files(str(source)) if each.endswith(".safetensors")} - {*PEFT_FILES}
            return Path(hf_hub_download(str(source), name))
    for path in (Path(source), Path(source).resolve()):
        if path.name == PEFT_FILES[1] and (path.parent / PEFT_FILES[0]).exists():
            return path.parent
    return Path(source)


def hint_of(lora):
    """Return the sampler's hint in the header of a LoRA file, or of that of a folder or its run; "" without one."""
    lora, hint = local_lora(lora).resolve(), ""
    places = [folder / LORA_FILE for folder in (lora, *lora.parents[:2])] if lora.is_dir() else [lora]
    for path in filter(Path.is_file, places):
        with suppress(OSError, SafetensorError), safe_open(path, "np") as file:
            hint = hint or (file.metadata() or {}).get("modelspec.usage_hint", "")
    return hint


def samplers_for(loras):
    """Return the samplers that the headers of LoRAs name; lcm-lora without a name."""
    kinds = (LORA_SAMPLERS[0 if "DDIM" not in hint else 2 if "eta 0 " in hint else 1] for hint in map(hint_of, loras))
    return list(dict.fromkeys(kinds))


# Each of these functions returns pairs (whether a value is wrong, message), for `refuse`.


def model_problems(args):
    teacher, config = Path(args.pretrained_teacher_model), args.teacher_config
    model = f"--pretrained_teacher_model {args.pretrained_teacher_model}"
    no_index = teacher.is_dir() and not (teacher / "model_index.json").exists()
    is_lora = no_index and any((teacher / name).exists() for name in (LORA_FILE, PEFT_FILES[0]))
    return (
        (not is_source(args.pretrained_teacher_model), f"{model}: not there; give a folder, file or Hub id"),
        (is_lora, f"{model}: this is a LoRA; give the model that it was made for"),
        (no_index, f"{model}: holds no model_index.json; give the folder that save_pretrained wrote"),
        (config and not is_source(config), f"--teacher_config {config}: not there; give a folder or Hub id"),
        (config and not teacher.is_file(), f"--teacher_config: {teacher} is no single file, leave it out"),
        (args.teacher_revision and teacher.exists(), f"--teacher_revision: {teacher} is local, leave it out"),
        (args.variant and teacher.is_file(), f"--variant: {teacher} is one file, leave it out"),
    )


def lora_problems(loras):
    found = []
    for source, weight in loras:
        no_file = Path(source).is_dir() and not any(Path(source, name).exists() for name in (LORA_FILE, PEFT_FILES[0]))
        found += [
            (not is_source(source), f"--lora {source}: not there; give a file, folder or Hub id"),
            (no_file, f"--lora {source}: holds no {LORA_FILE} nor {PEFT_FILES[0]}; name the file itself"),
            (not math.isfinite(weight), f"--lora {source}: the weight after = is no number; give PATH=0.8"),
        ]
    return found


def step_problems(steps, samplers, flag="--steps"):
    limit = MAX_LCM_STEPS if any(name.startswith("lcm") for name in samplers) else 1000
    # diffusers 0.42 adds a timestep -1 to trailing schedules of these (61, 103, ...): a division rounds up.
    unmade = [n for n in steps if 1 <= n <= 1000 and math.ceil(1000 / (1000 / n)) != n]
    return (
        (min(steps) < 1 or max(steps) > limit, f"{flag} {steps}: give 1 to {limit}"),
        (unmade, f"{flag} {unmade}: diffusers makes no such schedule; give one less"),
    )


def folder_problems(folder, flag="--output_dir"):
    """Make the output folder and write to it, so that a full or read-only disk is found before a model loads."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\0" * 4096)
            file.flush()
    except OSError as error:
        return ((True, f"{flag} {folder}: cannot be written to ({error.strerror}); give another folder"),)
    return ()


def refuse(parser, found):
    """End with exit code 2 and the first message whose condition holds."""
    for is_wrong, message in found:
        if is_wrong:
            parser.error(message)
