# SPDX-License-Identifier: Apache-2.0
"""The flags that name a model, its LoRAs and its prompts, and what can be wrong with them.

For sample.py, evaluate.py and benchmark_inference.py. Imports the standard library alone, so that
--help and wrong flags answer before any model library loads.
"""

import math
import re
from pathlib import Path

DTYPES = {"no": "float32", "fp16": "float16", "bf16": "bfloat16"}
SAMPLERS = ("ddim", "dpmsolver", "dpmsolver++", "lcm-lora", "lcm-without-lora")
NAMES = ("DDIM", "DPM-Solver", "DPM-Solver++", "LCM-LoRA", "LCM without LoRA")
TITLES = dict(zip(SAMPLERS, NAMES, strict=True))
LORA_FILE = "pytorch_lora_weights.safetensors"
PEFT_FILES = ("adapter_config.json", "adapter_model.safetensors")
MAX_LCM_STEPS = 50  # LCMScheduler's original_inference_steps


class InputError(ValueError):
    """An input these tools cannot use; the message is one line that names it and the remedy."""


def add_model_flags(cli, required=True):
    """Add the flags of the teacher, precision and device to a parser; return the group's add_argument."""
    add = cli.add_argument_group("model").add_argument
    text = "diffusers folder, Hub id, or one .safetensors or .ckpt file (SD 1.x, SD 2.x, SDXL)"
    add("--pretrained_teacher_model", required=required, metavar="MODEL", help=text)
    add("--teacher_config", metavar="MODEL", help="folder or Hub id of one file's configs (default: by Hub)")
    add("--teacher_revision", metavar="REV", help="branch, tag or commit of a Hub id (default: main)")
    add("--variant", help="weight files of a folder or Hub id, such as fp16 (default: the plain ones)")
    add("--mixed_precision", choices=tuple(DTYPES), help="no is float32 (default: fp16 on cuda, else no)")
    return add


def add_prompt_flags(group):
    """Add --prompts and --prompts_file, one of which is required, to a group of flags."""
    prompts = group.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompts", nargs="+", metavar="TEXT", help="prompts, each in quotes")
    prompts.add_argument("--prompts_file", type=Path, metavar="FILE", help="UTF-8 text, one prompt a line")


def read_prompts(path):
    """Return the prompts of a text file, one a line without blank lines; [] if it is not there."""
    text = path.read_text("utf-8-sig", "replace") if path.is_file() else ""
    return [line.strip() for line in text.splitlines() if line.strip()]


def is_source(name):
    """Return whether a path exists or can be a Hub id: `name` or `owner/name`, not like a weight file."""
    is_id = re.fullmatch(r"(?!.*\.(safetensors|ckpt|bin|pt)$)\w[\w.-]*(/\w[\w.-]*)?", name)
    return Path(name).exists() or bool(is_id)


def split_weight(text):
    """Return (source, weight) of `PATH` or `PATH=WEIGHT`; a weight that is no number is nan."""
    source, sign, weight = text.rpartition("=")
    if not sign or Path(text).exists():
        return text, 1.0
    try:
        return source, float(weight)
    except ValueError:
        return source, math.nan


def model_problems(args):
    """Return pairs (whether it is so, message) of what can be wrong with the flags of the teacher."""
    teacher, config = Path(args.pretrained_teacher_model), args.teacher_config
    model = f"--pretrained_teacher_model {args.pretrained_teacher_model}"
    no_index = teacher.is_dir() and not (teacher / "model_index.json").exists()
    return (
        (not is_source(args.pretrained_teacher_model), f"{model}: not there; give a folder, file or Hub id"),
        (no_index, f"{model}: holds no model_index.json; give the folder that save_pretrained wrote"),
        (config and not is_source(config), f"--teacher_config {config}: not there; give a folder or Hub id"),
        (config and not teacher.is_file(), f"--teacher_config: {teacher} is no single file, leave it out"),
        (args.teacher_revision and teacher.exists(), f"--teacher_revision: {teacher} is local, leave it out"),
        (args.variant and teacher.is_file(), f"--variant: {teacher} is one file, leave it out"),
    )


def lora_problems(loras):
    """Return pairs (whether it is so, message) of what can be wrong with (source, weight) pairs."""
    found = []
    for source, weight in loras:
        files = [LORA_FILE, PEFT_FILES[0]]
        no_file = Path(source).is_dir() and not any((Path(source) / name).exists() for name in files)
        found += [
            (not is_source(source), f"--lora {source}: not there; give a file, folder or Hub id"),
            (no_file, f"--lora {source}: holds no {' nor '.join(files)}; name the file itself"),
            (not math.isfinite(weight), f"--lora {source}: the weight after = is no number; give PATH=0.8"),
        ]
    return found


def step_problems(steps, samplers):
    """Return pairs (whether it is so, message) of what can be wrong with a list of solver steps."""
    limit = MAX_LCM_STEPS if any(name.startswith("lcm") for name in samplers) else 1000
    # diffusers 0.42 adds a timestep -1 to trailing schedules of these (61, 103, ...): a division rounds up.
    unmade = [n for n in steps if 1 <= n <= 1000 and math.ceil(1000 / (1000 / n)) != n]
    return (
        (min(steps) < 1 or max(steps) > limit, f"--steps {steps}: give 1 to {limit}"),
        (unmade, f"--steps {unmade}: diffusers makes no such schedule; give one less"),
    )


def refuse(parser, found):
    """Exit with 2 and the first message of pairs (whether it is so, message) that is so."""
    for is_wrong, message in found:
        if is_wrong:
            parser.exit(2, f"{parser.prog}: error: {message}\n")
