#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Convert an LCM-LoRA between diffusers' and kohya's keys, change its dtype or rank, merge it into a model.

    python scripts/export_lora.py --input outputs/lcm-lora --format kohya --output lcm.safetensors
    python scripts/export_lora.py --input lcm.safetensors --format diffusers --rank 8 --output r8.safetensors
    python scripts/export_lora.py --input outputs/lcm-lora --output merged-model \\
        --merge_into stable-diffusion-v1-5/stable-diffusion-v1-5

Input: a .safetensors file with diffusers', PEFT's or kohya's keys, or a folder that a training script, a
checkpoint or PEFT left. Output: one file, or with --merge_into a diffusers folder that draws in 2 to 8 steps
at guidance 1, with LCMScheduler. kohya's keys are those of sd-scripts, which ComfyUI, A1111 and Forge read:
diffusers' names for SD 1.x and 2.x, the original UNet's for SDXL. What was written is read back, by diffusers
too, and compared. The header holds no path and nothing of the input's own header.
Exit codes: 0 done, 2 wrong usage or unusable input, 1 anything else.
"""

import argparse
import json
import logging
import math
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}
FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors", "unet/adapter_model.safetensors")
# Words with an underscore of their own; in kohya's names every dot is one too.
WORDS = re.compile(
    r"(down|up|transformer)\.(blocks)|(mid)\.(block)|(to)\.(q|k|v|out)|(proj|conv)\.(in|out)"
    r"|(conv)\.(shortcut)|(time|add)\.(embedding)|(linear)\.(1|2)|(time)\.(emb)\.(proj)"
)


def parse_args(argv=None):
    """Return the checked flags; wrong ones end the process with exit code 2 and one line."""
    cli = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = cli.add_argument
    add("--input", required=True, type=Path, metavar="PATH", help="LoRA file, or folder that holds one")
    add("--output", required=True, type=Path, metavar="PATH", help="file; with --merge_into a new folder")
    add("--format", choices=("diffusers", "kohya"), help="keys of the file; needed without --merge_into")
    add("--dtype", choices=tuple(DTYPES), default="fp16", help="of the weights (default: %(default)s)")
    add("--rank", type=int, metavar="R", help="smaller rank, each layer's best approximation (SVD)")
    add("--merge_into", metavar="MODEL", help="Hub id, diffusers folder or single file to add the LoRA to")
    text = "model family; auto: by the text width that the LoRA's attention reads (default: %(default)s)"
    add("--family", choices=("auto", "sd", "sdxl"), default="auto", help=text)
    text = "kohya header without what user interfaces show: the released LCM-LoRAs' layout"
    add("--bare_header", action="store_true", help=text)
    args = cli.parse_args(argv)
    single = args.output.suffix == ".safetensors" and not args.output.is_dir()
    for is_wrong, message in (
        (not args.input.exists(), f"--input {args.input}: not there; name a file or a folder"),
        (bool(args.format) == bool(args.merge_into), "give either --format or --merge_into"),
        (args.rank is not None and args.rank < 1, f"--rank {args.rank}: must be at least 1"),
        (args.merge_into and args.output.exists(), f"--output {args.output}: is there; name a new folder"),
        (args.format and not single, f"--output {args.output}: name a file that ends in .safetensors"),
        (args.bare_header and args.format != "kohya", "--bare_header: only with --format kohya"),
    ):
        if is_wrong:
            cli.exit(2, f"error: {message}\n")
    return args


if __name__ == "__main__":
    ARGS = parse_args()  # before the imports below, which take seconds

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
for package in ("xformers", "bitsandbytes"):
    logging.getLogger(package).setLevel(logging.ERROR)  # on import they warn of CUDA code not needed here

import diffusers
import torch
from diffusers.utils import convert_unet_state_dict_to_peft
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

import train_lcm_lora_sd15 as sd15
import train_lcm_lora_sdxl as sdxl

PIPELINES = {sd15: diffusers.StableDiffusionPipeline, sdxl: diffusers.StableDiffusionXLPipeline}


@dataclass(frozen=True)
class Lora:
    """The change of one layer: alpha / r * up @ down."""

    down: torch.Tensor  # [r, in] or [r, in, kh, kw]
    up: torch.Tensor  # [out, r] or [out, r, 1, 1]
    alpha: float


def read_lora(path):
    """Return ({diffusers' module name: Lora}, whether its names are those of SDXL's original UNet).

    Raises:
        UnusableInput: the path holds no LoRA of a UNet, or more than that.
    """
    if path.is_dir():
        found = [path / name for name in FILES if (path / name).is_file()]
        if not found:
            raise sd15.UnusableInput(f"--input {path}: holds none of {', '.join(FILES)}; name the file")
        path = found[0]
    try:
        state = load_file(path)
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise sd15.UnusableInput(f"{path}: no whole .safetensors file ({error}); name another") from error
    is_ldm = any(re.match(r"lora_unet_(input|middle|output)_block", name) for name in state)
    loras = take_kohya(state)
    if not loras:
        state = {re.sub(r"^(unet|base_model\.model)\.", "", name): value for name, value in state.items()}
        if any(name.endswith(".down.weight") for name in state):
            state = convert_unet_state_dict_to_peft(state)  # keys of 2023
        beside = path.with_name("adapter_config.json")  # PEFT's; diffusers has it in the header
        text = beside.read_text("utf-8") if beside.is_file() else header.get("lora_adapter_metadata", "{}")
        config = {name.removeprefix("unet."): value for name, value in json.loads(text).items()}
        loras = take_peft(state, config)
    rest = [*state, *(name for name, lora in loras.items() if lora.up is None)]
    if rest or not loras:
        raise sd15.UnusableInput(f"{path}: {rest[:1] or 'it'} is no LoRA of a UNet; name one of a UNet alone")
    if not all(x.isfinite().all() for lora in loras.values() for x in (lora.alpha * lora.down, lora.up)):
        raise sd15.UnusableInput(f"{path}: holds weights that are not finite; name another LoRA")
    return loras, is_ldm


def take_peft(state, config):
    """Return {module: Lora} of tensors with PEFT's keys, taken out of them; alpha is in the configuration."""
    loras, patterns = {}, config.get("alpha_pattern") or {}
    for name in [name for name in state if name.endswith(".lora_A.weight")]:
        module = name.removesuffix(".lora_A.weight")
        down, up = state.pop(name), state.pop(f"{module}.lora_B.weight", None)
        alpha = patterns.get(get_pattern_key(patterns.keys(), module), config.get("lora_alpha") or len(down))
        alpha *= math.sqrt(len(down)) if config.get("use_rslora") else 1
        loras[module] = Lora(down, up, float(alpha))
    return loras


def take_kohya(state):
    """Return {module: Lora} of tensors with kohya's keys, taken out of them; a missing alpha is the rank."""
    names = dict.fromkeys(name.partition(".")[0] for name in state if name.startswith("lora_unet_"))
    ops = [int(number) for number in re.findall(r"lora_unet_input_blocks_(\d+)_0_op\b", " ".join(names))]
    layers_per_block = min(ops) - 1 if ops else 2  # 2 in SDXL; small models may have another number
    loras = {}
    for name in [name for name in names if f"{name}.lora_down.weight" in state]:
        down, up = state.pop(f"{name}.lora_down.weight"), state.pop(f"{name}.lora_up.weight", None)
        alpha = float(state.pop(f"{name}.alpha", len(down)))
        loras[diffusers_name(name, layers_per_block)] = Lora(down, up, alpha)
    return loras


def diffusers_name(name, layers_per_block):
    """Return diffusers' name of the module that a kohya name means, in either of its two namings."""
    name = name.removeprefix("lora_unet_")
    for ours, theirs in (sdxl.LDM_MODULES | sdxl.LDM_LAYERS).items():
        name = re.sub(rf"(^|_){theirs.replace('.', '_')}$", rf"\g<1>{ours}", name)
    parts = re.fullmatch(r"(input|middle|output)_blocks?_(\d+)_(?:(\d+)_)??(\D.*)", name)
    if parts and parts[1] == "middle":
        number = int(parts[2])
        name = f"mid_block_{'attentions_0' if number == 1 else f'resnets_{number // 2}'}_{parts[4]}"
    elif parts:
        side, number, place, inner = parts.groups()
        block, layer = divmod(int(number) - (side == "input"), layers_per_block + 1)
        kind = f"{'attentions' if int(place) else 'resnets'}_{layer}"
        if inner in ("op", "conv"):
            kind, inner = f"{'down' if inner == 'op' else 'up'}samplers_0", "conv"
        name = f"{'down' if side == 'input' else 'up'}_blocks_{block}_{kind}_{inner}"
    return WORDS.sub(lambda match: "_".join(filter(None, match.groups())), name.replace("_", "."))


def resize(lora, rank):
    """Return (a Lora's best approximation of at most this rank, by SVD; share of squared norm kept)."""
    old = len(lora.down)
    if rank >= old:
        return lora, 1.0
    q_up, r_up = torch.linalg.qr(lora.up.flatten(1).float())
    q_down, r_down = torch.linalg.qr(lora.down.flatten(1).float().T)
    # the core between two thin QRs has the singular values of up @ down
    u, s, v = torch.linalg.svd(lora.alpha / old * (r_up @ r_down.T))
    root = s[:rank].sqrt()
    up, down = (q_up @ u[:, :rank]) * root, (root * (q_down @ v[:rank].T)).T
    kept = s[:rank].square().sum() / s.square().sum().clamp(min=1e-30)
    down = down.reshape(len(down), *lora.down.shape[1:])
    return Lora(down, up.reshape(*up.shape, *lora.up.shape[2:]), float(len(down))), kept.item()


def diffusers_file(loras):
    """Return (tensors, header fields) with diffusers' keys; what differs from layer to layer is a pattern."""
    rank, alpha = next((len(lora.down), lora.alpha) for lora in loras.values())
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        rank_pattern={name: len(lora.down) for name, lora in loras.items() if len(lora.down) != rank},
        alpha_pattern={name: lora.alpha for name, lora in loras.items() if lora.alpha != alpha},
    )
    config = {f"unet.{name}": value for name, value in config.to_dict().items()}
    config["unet.target_modules"] = sorted(loras)
    state = {}
    for name, lora in loras.items():
        state |= {f"unet.{name}.lora_A.weight": lora.down, f"unet.{name}.lora_B.weight": lora.up}
    return state, {"lora_adapter_metadata": json.dumps(config, indent=2, sort_keys=True)}


def kohya_file(trainer, loras, layers_per_block):
    """Return (tensors, header fields) with kohya's keys."""
    state = {}
    for name, lora in loras.items():
        key = trainer.kohya_name(name, layers_per_block)
        state |= {f"{key}.lora_down.weight": lora.down, f"{key}.lora_up.weight": lora.up}
        state[f"{key}.alpha"] = torch.tensor(lora.alpha)
    rank, alpha = max((len(lora.down), lora.alpha) for lora in loras.values())
    flags = SimpleNamespace(lora_rank=rank, lora_alpha=alpha, resolution=None)
    header = trainer.kohya_metadata(flags, text_width(loras))
    del header["ss_resolution"]  # a LoRA does not tell
    return state, header


def text_width(loras):
    """Return the width of the text embeddings that the LoRA's cross-attention reads, or None."""
    widths = (lora.down.shape[1] for name, lora in loras.items() if name.endswith("attn2.to_k"))
    return next(widths, None)


def write(args, loras, trainer):
    """Write the file whole or not at all, after reading it back with this tool and with diffusers."""
    layers = [re.match(r"(down|up)_blocks\.\d+\.(?:resnets|attentions)\.(\d+)", name) for name in loras]
    layers_per_block = max((int(m[2]) + (m[1] == "down") for m in layers if m), default=2)
    kohya = args.format == "kohya"
    state, header = kohya_file(trainer, loras, layers_per_block) if kohya else diffusers_file(loras)
    dtype, scratch = getattr(torch, DTYPES[args.dtype]), args.output.with_name(f".writing-{args.output.name}")
    state = {name: value.to(dtype).contiguous() for name, value in state.items()}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, scratch, metadata={"format": "pt"} | ({} if args.bare_header else header))
    back, _ = read_lora(scratch)
    same = back.keys() == loras.keys() and all(
        torch.equal(back[name].down, lora.down.to(dtype)) and torch.equal(back[name].up, lora.up.to(dtype))
        and math.isclose(back[name].alpha, lora.alpha, rel_tol=1e-2)
        for name, lora in loras.items()
    )  # fmt: skip
    config = SimpleNamespace(layers_per_block=layers_per_block)
    theirs, _ = PIPELINES[trainer].lora_state_dict(str(scratch), unet_config=config)
    theirs = convert_unet_state_dict_to_peft(theirs) if kohya else theirs
    if not same or {name.rpartition(".lora_")[0] for name in theirs} != {f"unet.{name}" for name in loras}:
        raise RuntimeError(f"{scratch} reads back otherwise than it was written; it is left to be looked at")
    os.replace(scratch, args.output)


def merge(args, loras, trainer):
    """Write the model of --merge_into with the LoRA added to its UNet and with LCM's scheduler."""
    pipeline, is_file = PIPELINES[trainer], Path(args.merge_into).is_file()
    try:
        load = pipeline.from_single_file if is_file else pipeline.from_pretrained
        pipe = load(args.merge_into, dtype=torch.float32)
        for name, lora in loras.items():
            weight = pipe.unet.get_submodule(name).weight
            delta = lora.alpha / len(lora.down) * (lora.up.flatten(1).float() @ lora.down.flatten(1).float())
            weight.data += delta.view_as(weight)
    except (OSError, ValueError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        message = f"--merge_into {args.merge_into}: {reason}; name the LoRA's own base model"
        raise sd15.UnusableInput(message) from error
    pipe.scheduler = diffusers.LCMScheduler.from_config(pipe.scheduler.config)
    scratch = args.output.with_name(f".writing-{args.output.name}")
    pipe.to(getattr(torch, DTYPES[args.dtype])).save_pretrained(scratch)
    os.replace(scratch, args.output)


def main(args):
    """Convert or merge what the flags name."""
    loras, is_ldm = read_lora(args.input)
    family = {768: "sd", 1024: "sd", 2048: "sdxl"}.get(text_width(loras), "sdxl" if is_ldm else None)
    family = args.family if args.family != "auto" else family
    if not family:
        raise sd15.UnusableInput(
            f"--family auto: text width {text_width(loras)} tells nothing; give sd or sdxl"
        )
    trainer = {"sd": sd15, "sdxl": sdxl}[family]
    if args.rank:
        largest = max(len(lora.down) for lora in loras.values())
        if args.rank > largest:
            raise sd15.UnusableInput(f"--rank {args.rank}: must be at most the LoRA's own, {largest}")
        resized = {name: resize(lora, args.rank) for name, lora in loras.items()}
        loras = {name: lora for name, (lora, _) in resized.items()}
        kept = [share for _, share in resized.values()]
        print(f"rank {args.rank} keeps {min(kept):.3f} to {max(kept):.3f} of a layer's squared norm")
    (merge if args.merge_into else write)(args, loras, trainer)
    print(f"{args.output}: {len(loras)} layers of rank {max(len(lora.down) for lora in loras.values())}")


if __name__ == "__main__":
    try:
        main(ARGS)
    except sd15.UnusableInput as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
