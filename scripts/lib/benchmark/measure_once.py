# SPDX-License-Identifier: Apache-2.0
"""Measure one recipe once: what `benchmark.py train` runs as a process of its own.

The flags are its arguments, or one line of JSON on the standard input, so that a process can import its packages
before its turn. The last line of the output is the figures as JSON.
"""

import argparse
import ctypes
import json
import sys
import time
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, 9)  # PR_SET_PDEATHSIG, SIGKILL: before the imports, in which the parent may end
sys.path[:0] = [str(Path(__file__).resolve().parents[2])]
# `lib` comes first, because it silences what the imports below warn of.
from lib.benchmark.sweep import REAL_MODELS

NUM_SAMPLES = 64  # made-up pictures, read again and again
CAPTION = "mountains at sunset with clouds and a balloon"

import numpy as np
import torch
import webdataset as wds
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm

from lib.benchmark import reference_recipe
from lib.benchmark.real_models import DEMO_FOLDERS, build_teacher, trainer_of
from lib.pipelines import device_name, peak_gib, reset_peak, resident_gib, synchronize
from lib.trainers import DTYPES, UnusableInput, exit_code, sd15


def parse_args(argv=None):
    cli = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    for name, kind in {"model": str, "recipe": str, "steps": int, "warmup_steps": int}.items():
        cli.add_argument(f"--{name}", type=kind, required=True)
    cli.add_argument("--cached", action="store_true")
    return cli.parse_known_args(argv)


def write_pictures(folder, side):
    rng = np.random.default_rng(0)
    folder.mkdir()
    with (folder / "00000.tar").open("wb") as file, wds.TarWriter(file) as writer:
        for number in range(NUM_SAMPLES):
            noise = Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8))
            picture = noise.resize((side, side), Image.Resampling.BICUBIC)
            writer.write({"__key__": f"{number:05d}", "jpg": picture, "txt": CAPTION})


def write_cache(trainer, args, accelerator, source, target):
    """Write the shard of cached tensors of a shard of pictures, as scripts/cache_latents.py does."""
    import cache_latents

    args = argparse.Namespace(**vars(args) | {"objective": "consistency"})
    target.mkdir()
    own = argparse.Namespace(batch_size=8, num_views=1, decode_threads=1)
    pipe = trainer.load_teacher(args, DTYPES[accelerator.mixed_precision], accelerator.device, unet=None)
    with torch.no_grad(), tqdm(disable=True) as bar:
        head = cache_latents.make_head(trainer, pipe, args, 1)
        shards = trainer.list_shards([str(source)])
        path, skipped = target / "00000.tar", trainer.Skipped()
        cache_latents.cache_shard(trainer, pipe, head, shards[0], path, args, own, skipped, bar)


def timed(device, function):
    """Return (seconds, CPU seconds of all threads) of a function."""
    synchronize(device)
    start, cpu_start = time.perf_counter(), time.process_time()
    function()
    synchronize(device)
    return time.perf_counter() - start, time.process_time() - cpu_start


def peak_memory(device, before):
    """Return the peak of allocated and of reserved memory in GiB; on a CPU both are what is resident."""
    if device.type == "cuda":
        peaks = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        return {name: peak / 2**30 for name, peak in zip(("allocated_gib", "reserved_gib"), peaks, strict=True)}
    return dict.fromkeys(("allocated_gib", "reserved_gib"), peak_gib(device) - before)


def matmul_rate(dtype, device):
    """Return the FLOP/s of a large square matrix product: the best of several."""
    side = 8192 if device.type == "cuda" else 1024
    left, right = torch.randn(2, side, side, device=device).to(dtype)
    return 2 * side**3 / min(timed(device, lambda: left @ right)[0] for _ in range(8))


def make_recipe_job(own, trainer, args, folder):
    accelerator = trainer.start(args)
    write_pictures(folder / "pictures", args.resolution)
    if own.model in REAL_MODELS:
        trainer.load_teacher = partial(build_teacher, own.model)
    if own.recipe == "reference":
        if args.phases > 1:
            raise UnusableInput("the reference recipe does not know --phases 2; give --recipe ours")
        args.use_4bit_base = args.compile = False  # which the recipe does not know
        reference_recipe.replace_step(trainer)
    elif own.cached:
        write_cache(trainer, args, accelerator, folder / "pictures", folder / "cache")
        args.train_shards_path_or_url = [str(folder / "cache")]
    shards = trainer.list_shards(args.train_shards_path_or_url)
    samples, _, cache = trainer.audit(shards, args)
    job = trainer.make_job(args, accelerator, samples, cache, trainer.RunState())
    workers = trainer.count_workers(args, accelerator, None)
    stream = trainer.make_stream(job, shards, workers, cache)
    return job, trainer.make_loader(stream, workers, accelerator.device)


def measure(own, words, folder):
    trainer = trainer_of(own.model)
    model = DEMO_FOLDERS.get(own.model, f"random/{own.model}" if own.model in REAL_MODELS else own.model)
    side = ["--resolution", "64"] if own.model in DEMO_FOLDERS else []
    args = trainer.parse_args([
        *side, *words, "--pretrained_teacher_model", str(model), "--train_shards_path_or_url", str(folder),
        "--max_train_steps", "1000000000", "--report_to", "none", "--output_dir", str(folder / "out"),
    ])  # fmt: skip
    args.train_shards_path_or_url, args.fake_warmup_steps = [str(folder / "pictures")], 0
    before = resident_gib("VmRSS:")
    job, loader = make_recipe_job(own, trainer, args, folder)
    device, losses, batches = job.accelerator.device, [], iter(loader)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    reset_peak(device)

    def run(count):
        for _ in range(count):
            loss, _ = trainer.update(job, batches)
            losses.append(loss.item() if own.recipe == "reference" else loss)

    run(own.warmup_steps)
    wall, cpu = timed(device, lambda: run(own.steps))
    peaks = peak_memory(device, before)
    num_samples = trainer.samples_per_update(args, job.accelerator) * own.steps
    rate = matmul_rate(job.dtype, device)
    with FlopCounterMode(display=False) as counter:  # which cannot see into compiled code
        if not args.compile:
            trainer.update(job, batches)
    model_rate = counter.get_total_flops() * own.steps / wall
    return {"device": device_name(device), "torch": torch.__version__, "cuda": torch.version.cuda} | peaks | {
        "samples_per_second": num_samples / wall, "seconds_per_step": wall / own.steps,
        "cpu_seconds_per_step": cpu / own.steps,
        "model_tflop_per_second": model_rate / 1e12, "matmul_tflop_per_second": rate / 1e12,
        "share_of_matmul_rate": model_rate / rate, "losses": [float(loss) for loss in losses],
        "dtype": str(job.dtype).removeprefix("torch."),
    }  # fmt: skip


def main(words):
    try:
        with TemporaryDirectory() as folder:
            print(json.dumps(measure(*parse_args(words), Path(folder))))
    finally:
        sd15.kill_children()  # loader processes ignore SIGTERM, by which Python would end them before it waits


if __name__ == "__main__":
    sys.exit(exit_code(main, sys.argv[1:] or json.loads(sys.stdin.readline())))
