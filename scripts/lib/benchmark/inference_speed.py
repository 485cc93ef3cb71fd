# SPDX-License-Identifier: Apache-2.0
"""Seconds of drawing with an LCM-LoRA and with the standard pipeline."""

import argparse
import json
import platform
import statistics
import sys
from pathlib import Path

import torch
from peft import LoraConfig

from lib.benchmark.real_models import build_teacher
from lib.pipelines import choose_device, draw, load_lora, load_teacher, peak_gib, reset_peak, set_sampler
from lib.trainers import DTYPES, sd15

PROMPT = "close-up photography of old man standing in the rain at night, in a street lit by lamps"
LORA_RANK = 64
WARMUP_RUNS = 2  # cuDNN's attention plans on Hopper are ready after the second


def load_model(args, device, dtype):
    """Return the pipeline without a LoRA; raises UnusableInput."""
    if args.pretrained_teacher_model:
        pipe = load_teacher(argparse.Namespace(**vars(args), offload=False, mask=None), device)
    else:
        pipe = build_teacher(args.random_weights, argparse.Namespace(seed=0), dtype, device)
        pipe.set_progress_bar_config(disable=True)
    pipe.unet.to(dtype).eval()
    return pipe


def add_lcm_lora(pipe, args):
    """Put --lora, or a random LoRA, on the pipeline as adapter `lcm`; raises UnusableInput."""
    if args.lora:
        load_lora(pipe, args.lora)
    else:
        targets = sd15.LORA_TARGETS.split(",")
        config = LoraConfig(r=LORA_RANK, lora_alpha=LORA_RANK, target_modules=targets)
        pipe.unet.add_adapter(config, adapter_name="lcm")
    pipe.unet.to(pipe.dtype).eval()
    set_sampler(pipe, "lcm-lora", {"lcm": 1.0})
    if args.fuse_lora:
        pipe.fuse_lora(adapter_names=["lcm"])


def device_name(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {torch.get_num_threads()} threads"


def time_cell(pipe, batch, steps, guidance, args):
    """Return (median seconds a batch, seconds of the first run, peak GiB) after runs that do not count."""
    prompts, seeds, runs = [PROMPT] * batch, list(range(batch)), []
    for number in range(WARMUP_RUNS + args.repeats):
        if number == WARMUP_RUNS:
            reset_peak(pipe.device)
        _, each = draw(pipe, prompts, steps, guidance, seeds, resolution=args.resolution)
        runs.append(each * batch)
    return statistics.median(runs[WARMUP_RUNS:]), runs[0], peak_gib(pipe.device)


def timed_rows(pipe, args, dtype):
    """Yield a row for standard and LCM-LoRA, each batch size, eager and then compiled."""
    model = args.random_weights or Path(args.pretrained_teacher_model).name
    own_scheduler = pipe.scheduler
    common = {
        "model": model, "random_weights": bool(args.random_weights), "device": device_name(pipe.device),
        "precision": str(dtype).removeprefix("torch."), "torch": torch.__version__,
        "resolution": args.resolution or pipe.unet.config.sample_size * pipe.vae_scale_factor,
    }  # fmt: skip
    lcm = "LCM-LoRA, fused" if args.fuse_lora else "lcm-lora"
    for mode in ("eager", "compiled")[: 1 + args.compile]:
        if mode == "compiled":
            pipe.unet.compile()
        for name, steps, guidance in (("standard", args.steps, 7.5), (lcm, args.lcm_steps, 1.0)):
            torch.compiler.reset()  # the graphs of a UNet with other layers
            if name == "standard":
                pipe.scheduler = own_scheduler
            else:
                add_lcm_lora(pipe, args)
            for batch in args.batch_sizes:
                seconds, first, peak = time_cell(pipe, batch, steps, guidance, args)
                row = {"sampler": name, "steps": steps, "batch": batch, "mode": mode, "seconds": seconds}
                yield common | row | {"first_seconds": first, "peak_gib": peak}
        if args.fuse_lora:
            pipe.unfuse_lora()
        pipe.unload_lora_weights()


def inference_table(rows):
    """Return rows as Markdown: LCM-LoRA against standard, a line for each model, device, batch and mode."""
    cells = {}
    for row in rows:
        keys = ("model", "device", "precision", "resolution", "batch", "mode")
        cells.setdefault(tuple(str(row[key]) for key in keys), {})[row["sampler"] == "standard"] = row
    lines = ["| model | device | precision | px | batch | mode | LCM-LoRA | standard | ratio | peak GiB |"]
    lines.append("|---" * 10 + "|")
    for place, pair in cells.items():
        texts = [f"{pair[k]['seconds']:.3g} s, {pair[k]['steps']} steps" if k in pair else "" for k in (0, 1)]
        ratio = f"{pair[1]['seconds'] / pair[0]['seconds']:.1f}" if len(pair) == 2 else ""
        peak = max((row["peak_gib"] for row in pair.values() if row["peak_gib"]), default=None)
        lines.append("| " + " | ".join([*place, *texts, ratio, f"{peak:.2f}" if peak else "–"]) + " |")
    return "\n".join(lines)


def measure_inference(args):
    """Measure, append each row to the file, print the table; raises UnusableInput."""
    device = choose_device(args.device)
    dtype = DTYPES[args.mixed_precision or ("fp16" if device.type == "cuda" else "no")]
    rows = []
    for row in timed_rows(load_model(args, device, dtype), args, dtype):
        rows.append(row)
        print(f"{row['sampler']}, {row['mode']}, batch {row['batch']}: {row['seconds']:.3g} s", file=sys.stderr)
        if args.json:
            kept = json.loads(args.json.read_text()) if args.json.exists() else []
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps([*kept, row], indent=1))
    print(inference_table(rows))
