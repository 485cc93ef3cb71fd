#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Change an LCM-LoRA's keys, dtype or rank, or merge it into a model.

    python scripts/export_lora.py --input outputs/lcm-lora --format diffusers --output lcm.safetensors
    python scripts/export_lora.py --input outputs/lcm-lora --format kohya --rank 8 --output r8.safetensors
    python scripts/export_lora.py --input outputs/lcm-lora --output merged.safetensors \\
        --merge_into stable-diffusion-v1-5/stable-diffusion-v1-5

Input: a .safetensors file with kohya's, diffusers' or PEFT's keys, or the folder of a run or a checkpoint.
--format kohya: the released LCM-LoRAs' layout, which diffusers, ComfyUI, A1111 and Forge load.
--format diffusers: diffusers' keys, alpha multiplied into B, so that a reader that ignores alpha is right.
--merge_into: one checkpoint in the original layout where --output ends in .safetensors, else a diffusers
folder with the scheduler that the LoRA's header names, LCM's if none; an eta belongs into the call (docs/using.md).
"""

import glob
import json
import os
import re
import shutil
import signal
import sys
import tempfile
from collections import Counter
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
from lib.cli import COUNT, ToolParser, hint_of, refuse, samplers_for, started

# What names a family in a header, in a run's args.json or in a model's unet/config.json.
FAMILY_MARKS = {
    "sdxl": r'sdxl|stable-diffusion-xl|ssd-1b|"text_time"',
    "sd": r'_sd15|sd_v\d|stable.diffusion.v?[12]|"addition_embed_type": null',
}


def parse_args(argv=None):
    cli = ToolParser(__doc__)
    add = cli.add_argument
    add("--input", required=True, type=Path, metavar="PATH", help="LoRA file, or folder that holds one")
    add("--output", required=True, type=Path, metavar="PATH", help="file, or new folder of a merged model")
    add("--format", choices=("kohya", "diffusers"), help="keys of the file; required without --merge_into")
    add("--dtype", choices=("fp16", "bf16", "fp32"), default="fp16", help="of the weights (default: fp16)")
    add("--rank", type=COUNT, metavar="R", help="smaller rank, each layer's best approximation (SVD)")
    text = "model family; auto: by the LoRA's text width, names and header, and a run's args.json (default: auto)"
    add("--family", choices=("auto", "sd", "sdxl"), default="auto", help=text)
    add("--merge_into", metavar="MODEL", help="Hub id, diffusers folder or single file to add the LoRA to")
    add("--teacher_config", metavar="MODEL", help="folder or Hub id that describes a single file (or the Hub)")
    add("--variant", help="variant of the model's weight files, such as fp16 (default: none)")
    text = "what the model's UNet predicts (default: by its config, or the markers in a single file)"
    add("--prediction_type", choices=("epsilon", "v_prediction", "sample"), help=text)
    args = cli.parse_args(argv)
    of_model = args.teacher_config or args.variant or args.prediction_type
    is_there = args.input.is_file() or args.input.is_dir()
    problems = [
        (not is_there, f"--input {args.input}: not there; name a file or a folder"),
        (bool(args.format) == bool(args.merge_into), "give either --format or --merge_into"),
        (args.output.exists(), f"--output {args.output}: exists; name a new one"),
        (args.format and args.output.suffix != ".safetensors", f"--output {args.output}: must end in .safetensors"),
        (of_model and not args.merge_into, "--teacher_config, --variant, --prediction_type: only with --merge_into"),
    ]
    refuse(cli, problems)
    return args


if __name__ == "__main__":
    ARGS = started(parse_args())

import torch
from lib.original_layout import original_state
from lib.pipelines import TEACHER_FLAGS, family_of, set_sampler
from lib.trainers import DTYPES, INPUT_ERRORS, UnusableInput, exit_code, sd15, sdxl
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file


def layers_of_a_block(loras):
    """Return the UNet's layers_per_block, as far as the LoRA's names tell; 2 in the released models."""
    found = [re.match(r"(down|up)_blocks\.(\d+)\.(?:resnets|attentions)\.(\d+)", name) for name in loras]
    is_part = len({one.groups()[:2] for one in found if one}) < 4  # blocks: one of some layers alone tells too little
    if is_part and {320, 640, 1280} & {len(lora.up) for lora in loras.values()}:
        return 2
    return max((int(one[3]) + (one[1] == "down") for one in found if one), default=2)


def largest_rank(loras):
    return max(len(lora.down) for lora in loras.values())


def text_width(loras):
    return next((lora.down.shape[1] for name, lora in loras.items() if name.endswith("attn2.to_k")), None)


def find_trainer(args, loras):
    """Return the family's script: by --family, the LoRA's text width, names and header, or args.json."""
    width = text_width(loras)
    family = {768: "sd", 1024: "sd", 2048: "sdxl"}.get(width)
    if args.family != "auto" and family not in (None, args.family):
        fault = f"the LoRA's attention reads text of width {width}, which {family} models have"
        raise UnusableInput(f"--family {args.family}: {fault}; leave the flag out")
    with safe_open(sd15.lora_file(args.input), framework="pt") as file:
        header, names = file.metadata() or {}, list(file.keys())  # a checkpoint's has no fields
    is_original = any(re.match(r"lora_unet_(input|middle|output)_block", name) for name in names)
    facts = [str(header.get(name)) for name in ("ss_base_model_version", "modelspec.architecture")]
    for record in (folder / "args.json" for folder in sd15.lora_file(args.input).resolve().parents[:3]):
        if record.is_file():
            text = record.read_text("utf-8", "replace")
            teacher = (re.findall(r'"pretrained_teacher_model": "([^"]+)"', text) or ["none"])[0]
            config = Path(teacher, "unet", "config.json")
            facts += [path.name for path in record.parent.glob("train_lcm_lora_*.py")]  # the run's own copy
            facts += [config.read_text("utf-8", "replace") if config.is_file() else teacher]
    found = [name for fact in facts for name, mark in FAMILY_MARKS.items() if re.search(mark, fact, re.I)]
    found = ["sdxl"] if is_original else found
    if args.family != "auto" and found and args.family not in found:
        raise UnusableInput(f"--family {args.family}: the LoRA is one of {found[0]} models; leave the flag out")
    family = family or next(iter(found), None)
    family = args.family if args.family != "auto" else family
    if not family:
        raise UnusableInput(f"--family auto: text width {width} belongs to no known model; give sd or sdxl")
    return {"sd": sd15, "sdxl": sdxl}[family]


@contextmanager
def whole_output(output):
    """Give a path beside the output that takes its place at the end, whole or not at all, readable by umask."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        for leftover in output.parent.glob(f".{glob.escape(output.name)}-*"):  # of a killed process
            with suppress(OSError):  # of another user, or no folder
                rest = leftover.name[len(output.name) + 2 :]  # of TemporaryDirectory's: eight letters
                if "-" not in rest and os.listdir(leftover) in ([], [output.name] * (len(rest) == 8)):
                    shutil.rmtree(leftover)
        with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as folder:
            path = Path(folder, output.name)
            yield path
            mask = os.umask(0o077)
            os.umask(mask)
            for one in (path, *path.rglob("*")):  # safetensors makes files that only their owner reads
                one.chmod((0o777 if one.is_dir() else 0o666) & ~mask)
            os.replace(path, output)
    except (OSError, SafetensorError) as error:
        reason = sd15.one_line(error)
        raise UnusableInput(f"--output {output}: cannot be written ({reason}); name another place") from error


def kohya_file(args, loras, layers_per_block):
    """Return (tensors, header) with kohya's keys and one alpha: diffusers misreads alphas that differ."""
    trainer, state = find_trainer(args, loras), {}
    alpha = Counter(lora.alpha for lora in loras.values()).most_common(1)[0][0] or 1.0
    for name, lora in loras.items():
        key = trainer.kohya_name(name, layers_per_block)
        up = lora.up if lora.alpha == alpha else lora.up.float() * (lora.alpha / alpha)
        state |= {f"{key}.lora_down.weight": lora.down, f"{key}.lora_up.weight": up}
        state[f"{key}.alpha"] = torch.tensor(alpha)
    flags = SimpleNamespace(lora_rank=largest_rank(loras), lora_alpha=alpha, resolution=None)
    header = trainer.kohya_metadata(flags, text_width(loras))
    del header["ss_resolution"]  # a LoRA does not tell
    return state, header


def diffusers_file(loras):
    """Return (tensors, header) with diffusers' keys; alpha is in B, so the header's alpha is the rank."""
    ranks = {name: len(lora.down) for name, lora in loras.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    others = {name: value for name, value in ranks.items() if value != rank}
    config = {"r": rank, "lora_alpha": rank, "rank_pattern": others, "alpha_pattern": others}
    config["target_modules"] = sorted(loras)  # and no other field: a PEFT that does not know one refuses the file
    state = {}
    for name, lora in loras.items():
        up = lora.up if lora.alpha == ranks[name] else lora.up.float() * (lora.alpha / ranks[name])
        state |= {f"unet.{name}.lora_A.weight": lora.down, f"unet.{name}.lora_B.weight": up}
    text = json.dumps({f"unet.{name}": value for name, value in config.items()}, indent=2, sort_keys=True)
    return state, {"lora_adapter_metadata": text}


def write_lora(args, loras, path, dtype):
    """Write the file and read it back: each layer must change as before; raises UnusableInput for too small dtypes."""
    layers_per_block = layers_of_a_block(loras)
    kohya = args.format == "kohya"
    state, header = kohya_file(args, loras, layers_per_block) if kohya else diffusers_file(loras)
    state = {name: value.to(dtype).contiguous() for name, value in state.items()}
    if not all(value.isfinite().all() for value in state.values()):
        raise UnusableInput(f"--dtype {args.dtype}: the weights are too large for it; give bf16 or fp32")
    hint = hint_of(args.input)
    save_file(state, path, metadata={"format": "pt"} | ({"modelspec.usage_hint": hint} if hint else {}) | header)
    back = sd15.read_lora(path, layers_per_block)
    if back.keys() != loras.keys() or not all(
        torch.equal(back[name].down, lora.down.to(dtype)) and back[name].up.shape == lora.up.shape
        for name, lora in loras.items()
    ):
        raise RuntimeError(f"{path.name} reads back otherwise than it was written: a fault of this program")


@torch.no_grad()
def merge(args, loras, path, dtype):
    """Write the model of --merge_into with the LoRA added to its UNet; raises UnusableInput where it does not fit."""
    flags = dict.fromkeys(TEACHER_FLAGS) | vars(args)
    model = SimpleNamespace(**flags | {"pretrained_teacher_model": args.merge_into})
    try:
        pipe = family_of(model).load_teacher(model, torch.float32, torch.device("cpu"), check=False)
    except INPUT_ERRORS as error:
        raise UnusableInput(str(error).replace("--pretrained_teacher_model", "--merge_into")) from error
    modules = dict(pipe.unet.named_modules())
    for name, lora in loras.items():
        delta = lora.alpha / len(lora.down) * (lora.up.flatten(1).float() @ lora.down.flatten(1).float())
        weight = getattr(modules.get(name), "weight", torch.zeros(0))
        if weight.flatten(1 if weight.ndim > 1 else 0).shape != delta.shape:
            fault = f"the LoRA's layer {name} {[*delta.shape]} does not fit"
            raise UnusableInput(f"--merge_into {args.merge_into}: {fault}; name a model of its architecture")
        weight += delta.view_as(weight)
    set_sampler(pipe, "lcm-without-lora" if samplers_for([args.input]) == ["lcm-lora"] else "ddim")
    pipe.to(dtype)
    if not all(weight.isfinite().all() for weight in pipe.unet.parameters()):
        raise UnusableInput(f"--dtype {args.dtype}: the weights are too large for it; give bf16 or fp32")
    if path.suffix == ".safetensors":
        save_file(original_state(pipe), path, metadata={"format": "pt"})
    else:
        pipe.save_pretrained(path)


def main(args):
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that nothing half done is left
    loras = sd15.read_lora(args.input)
    dtype = DTYPES["no" if args.dtype == "fp32" else args.dtype]
    with whole_output(args.output) as path:
        if args.rank and args.rank > largest_rank(loras):
            raise UnusableInput(f"--rank {args.rank}: must be at most the LoRA's own, {largest_rank(loras)}")
        if args.rank:
            loras = {name: sd15.reduce_rank(lora, args.rank) for name, lora in loras.items()}
        (merge if args.merge_into else write_lora)(args, loras, path, dtype)
    print(f"{args.output}: {len(loras)} layers of rank {largest_rank(loras)}")


if __name__ == "__main__":
    sys.exit(exit_code(main, ARGS))
