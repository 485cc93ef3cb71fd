# SPDX-License-Identifier: Apache-2.0
"""Time 4 steps with an LCM-LoRA against 25 steps of the standard pipeline, on this machine.

    python scripts/benchmark_inference.py --random_weights sdxl --batch_sizes 1 8 --output_json times.json
    python scripts/benchmark_inference.py --pretrained_teacher_model MODEL --lora outputs/lcm-lora --compile

Random weights are those of the real architecture, with a random LoRA of rank 64: they take the same time and
draw noise. The standard rows have the model's own scheduler and guidance 7.5, so two UNet evaluations a step;
the LCM rows guidance 1, one a step. A cell is the median of --repeats runs after one not counted, in which
--compile compiles. Rows are appended to --output_json; the table goes to stdout.
Exit codes: 0 done, 2 wrong usage or unusable input, 1 anything else.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from model_args import DTYPES, InputError, add_model_flags, lora_problems, model_problems, refuse, step_problems

FAMILIES = ("sd15", "sdxl", "ssd1b")
PROMPT = "close-up photography of old man standing in the rain at night, in a street lit by lamps"
LORA_RANK = 64
LORA_TARGETS = (
    "to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2",
    "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj",
)  # fmt: skip


def build_parser():
    """Return the parser of the command line."""
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = add_model_flags(cli, required=False)
    add("--random_weights", choices=FAMILIES, help="in place of a model: its architecture, random weights")
    add("--lora", metavar="PATH", help="LCM-LoRA of --pretrained_teacher_model (default: a random one)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: %(default)s)")
    add = cli.add_argument_group("measurement").add_argument
    text = "pictures drawn together, each a column of rows (default: 1)"
    add("--batch_sizes", nargs="+", type=int, default=[1], metavar="N", help=text)
    add("--lcm_steps", type=int, default=4, metavar="N", help="steps with the LoRA (default: %(default)s)")
    add("--steps", type=int, default=25, metavar="N", help="steps without it (default: %(default)s)")
    add("--resolution", type=int, metavar="PX", help="side in px, multiple of 8 (default: the model's)")
    add("--repeats", type=int, default=3, metavar="N", help="runs a cell (default: %(default)s)")
    add("--compile", action="store_true", help="also with the UNet through torch.compile")
    text = "add the LoRA into the weights, as one does to serve it (default: beside them, as loaded)"
    add("--fuse_lora", action="store_true", help=text)
    add("--output_json", type=Path, metavar="FILE", help="list of rows to append to (default: none)")
    return cli


def parse_args(argv=None):
    """Return the checked command line; a wrong one exits with 2."""
    parser = build_parser()
    args = parser.parse_args(argv)
    model, sizes, side = args.pretrained_teacher_model, args.batch_sizes, args.resolution
    found = [
        (bool(model) == bool(args.random_weights), "give --pretrained_teacher_model or --random_weights"),
        (args.lora and not model, f"--lora {args.lora}: needs --pretrained_teacher_model"),
        (min([*sizes, args.repeats]) < 1, f"--batch_sizes {sizes}, --repeats {args.repeats}: give 1 or more"),
        (side is not None and (side < 8 or side % 8), f"--resolution {side}: give a multiple of 8"),
        *step_problems([args.lcm_steps], ["lcm-lora"]), *step_problems([args.steps], []),
        (args.output_json and args.output_json.is_dir(), f"--output_json {args.output_json}: is a folder"),
    ]  # fmt: skip
    refuse(parser, found)
    refuse(
        parser, [*(model_problems(args) if model else ()), *lora_problems([(args.lora, 1)] * bool(args.lora))]
    )
    return args


# --help and wrong flags must not wait for torch, so the command line is read before the heavy imports.
if __name__ == "__main__":
    ARGS = parse_args()

import platform

import torch
from benchmark.real_models import build_teacher
from drawing import choose_device, draw, load_lora, load_teacher, peak_gib, reset_peak, set_sampler
from peft import LoraConfig


def load(args, device, dtype):
    """Return the pipeline with its LCM-LoRA as adapter `lcm`; raises InputError."""
    if args.pretrained_teacher_model:
        pipe = load_teacher(args, device)
    else:
        pipe = build_teacher(args.random_weights, argparse.Namespace(seed=0), dtype, device)
        pipe.set_progress_bar_config(disable=True)
    if args.lora:
        load_lora(pipe, args.lora)
    else:
        config = LoraConfig(r=LORA_RANK, lora_alpha=LORA_RANK, target_modules=LORA_TARGETS)
        pipe.unet.add_adapter(config, adapter_name="lcm")
    pipe.unet.to(dtype).eval()
    return pipe


def device_name(device):
    """Return what the machine calls the device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {torch.get_num_threads()} threads"


def time_cell(pipe, batch, steps, guidance, args):
    """Return (median seconds a batch, seconds of the uncounted first one, peak GiB)."""
    prompts, seeds = [PROMPT] * batch, list(range(batch))
    runs = []
    for number in range(args.repeats + 1):
        if number == 1:
            reset_peak(pipe.device)
        _, each = draw(pipe, prompts, steps, guidance, seeds, resolution=args.resolution)
        runs.append(each * batch)
    return statistics.median(runs[1:]), runs[0], peak_gib(pipe.device)


def measure(pipe, args, device, dtype):
    """Yield a row for each of LCM-LoRA and standard, each batch size, eager and then compiled."""
    model = args.random_weights or Path(args.pretrained_teacher_model).name
    own_scheduler = pipe.scheduler
    common = {
        "model": model, "random_weights": bool(args.random_weights), "device": device_name(device),
        "precision": str(dtype).removeprefix("torch."), "torch": torch.__version__,
        "resolution": args.resolution or pipe.unet.config.sample_size * pipe.vae_scale_factor,
    }  # fmt: skip
    for mode in ("eager", "compiled")[: 1 + args.compile]:
        if mode == "compiled":
            torch.compiler.reset()
            pipe.unet.compile()
        # The standard rows come first: a fused LoRA cannot be switched off.
        for sampler, steps, guidance in (("standard", args.steps, 7.5), ("lcm-lora", args.lcm_steps, 1.0)):
            if sampler == "standard":
                pipe.disable_lora()
                pipe.scheduler = own_scheduler
            else:
                set_sampler(pipe, sampler, {"lcm": 1.0})
                if args.fuse_lora:
                    pipe.fuse_lora(adapter_names=["lcm"])
            for batch in args.batch_sizes:
                seconds, first, peak = time_cell(pipe, batch, steps, guidance, args)
                name = "LCM-LoRA, fused" if args.fuse_lora and sampler == "lcm-lora" else sampler
                row = {"sampler": name, "steps": steps, "batch": batch, "mode": mode, "seconds": seconds}
                yield common | row | {"first_seconds": first, "peak_gib": peak}
        if args.fuse_lora:
            pipe.unfuse_lora()


def table(rows):
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


def main(args):
    """Measure, append the rows to the file, print the table; return the exit code."""
    try:
        device = choose_device(args.device)
        dtype = getattr(torch, DTYPES[args.mixed_precision or ("fp16" if device.type == "cuda" else "no")])
        pipe = load(args, device, dtype)
    except InputError as error:
        print(f"benchmark_inference.py: error: {error}", file=sys.stderr)
        return 2
    rows = []
    for row in measure(pipe, args, device, dtype):
        rows.append(row)
        print(
            f"{row['sampler']}, {row['mode']}, batch {row['batch']}: {row['seconds']:.3g} s", file=sys.stderr
        )
        if args.output_json:
            kept = json.loads(args.output_json.read_text()) if args.output_json.exists() else []
            args.output_json.parent.mkdir(parents=True, exist_ok=True)
            args.output_json.write_text(json.dumps([*kept, row], indent=1))
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main(ARGS))
