#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Measure the loader on one core: pictures a second from shards to batches, beside plain JPEG decoding.

    python scripts/benchmark_loader.py --output_dir outputs/benchmark-loader

Shards of JPEGs are made on the spot (noise at every scale, as a photograph has detail at every scale; quality
90). Measured are `ShardStream` with its shuffle, filters, crop and batches, in one process without loader
workers, and, over the same bytes, `Image.open(...).convert("RGB")` and nothing else: the limit of a loader
that decodes with Pillow at full size. (JPEGs of twice the training size or more are decoded at half their
size, so there the loader can be faster.) The two take turns; the table has medians and the range. Time is the
CPU time of the process, so that other work on the machine counts for little.
Output: loader.json, loader.md. Exit codes: 0 done, 2 wrong usage, 1 anything else.
"""

import argparse
import io
import json
import statistics
import sys
import tempfile
import time
from collections import deque
from itertools import chain, cycle, islice
from pathlib import Path


def parse_args():
    """Return the command line; a wrong one exits with 2."""
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = cli.add_argument
    add("--output_dir", required=True, type=Path, metavar="DIR", help="folder for loader.json and loader.md")
    cases = ["512:512", "768:512", "1024:512", "1024:1024"]
    text = "side of the pictures and training resolution, px (default: %(default)s)"
    add("--cases", nargs="+", default=cases, metavar="SIDE:RESOLUTION", help=text)
    add("--pictures", type=int, default=64, metavar="N", help="of one measurement (default: %(default)s)")
    add("--repeats", type=int, default=7, metavar="N", help="of each measurement (default: %(default)s)")
    args = cli.parse_args()
    try:
        args.cases = [tuple(int(part) for part in case.split(":")) for case in args.cases]
        if min(args.pictures, args.repeats, *chain(*args.cases)) < 1 or {len(c) for c in args.cases} != {2}:
            raise ValueError
    except ValueError:
        cli.error("--cases, --pictures, --repeats: give SIDE:RESOLUTION, and numbers of 1 or more")
    return args


if __name__ == "__main__":
    ARGS = parse_args()  # before the imports below, which take seconds

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch
import webdataset as wds
from PIL import Image

import train_lcm_lora_sd15 as trainer


def make_jpeg(side, seed):
    """Return a JPEG of side x side px: noise summed over octaves, little weaker towards the fine ones."""
    rng, total = np.random.default_rng(seed), np.zeros((side, side, 3), np.float32)
    cells = 2
    while cells <= side:
        noise = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        total += np.asarray(noise.resize((side, side), Image.Resampling.BICUBIC), np.float32) * cells**-0.3
        cells *= 2
    total -= total.min()
    data = io.BytesIO()
    Image.fromarray((255 * total / total.max()).astype(np.uint8)).save(data, "JPEG", quality=90)
    return data.getvalue()


def decode_all(pictures):
    """Decode JPEGs to RGB at full size, and nothing else."""
    for data in pictures:
        Image.open(io.BytesIO(data)).convert("RGB")


def measure(side, resolution, args):
    """Return one case's record: pictures a second of both ways, in turns, over the same JPEGs."""
    pictures = [make_jpeg(side, seed) for seed in range(min(args.pictures, 32))]
    pictures = list(islice(cycle(pictures), args.pictures))
    rates = {"loader": [], "decode": []}
    with tempfile.TemporaryDirectory() as folder:
        shard = f"{folder}/00000.tar"
        with wds.TarWriter(shard) as writer:
            for number, data in enumerate(pictures):
                record = {"__key__": f"{number:05d}", "jpg": data, "txt": "a picture"}
                writer.write(record | {"json": {"original_width": side, "original_height": side}})
        flags = f"--train_shards_path_or_url {shard} --resolution {resolution} --max_train_steps 1 "
        flags += "--pretrained_teacher_model a/b --train_batch_size 1 --shuffle_buffer_samples 16"
        stream = trainer.ShardStream([shard], trainer.parse_args(flags.split()), 1, 0)
        for _ in range(args.repeats + 1):
            for name, work in (
                ("decode", lambda: decode_all(pictures)),
                ("loader", lambda: deque(islice(stream, len(pictures)), maxlen=0)),
            ):
                started = time.process_time()
                work()
                rates[name].append(len(pictures) / (time.process_time() - started))
    warm = {name: values[1:] for name, values in rates.items()}  # the first of each is the warm-up
    shares = [ours / limit for ours, limit in zip(warm["loader"], warm["decode"], strict=True)]
    kb = statistics.mean(map(len, pictures)) / 1000
    return {"side_px": side, "resolution_px": resolution, "jpeg_kb": round(kb, 1), "share": shares} | warm


def as_markdown(records):
    """Return the records as a table: medians, in brackets the range."""
    lines = ["| JPEGs | training | plain decode | loader | loader / decode |", "|---|---|---|---|---|"]
    for record in records:
        cells = []
        for name, digits in (("decode", 1), ("loader", 1), ("share", 2)):
            values = [f"{f(record[name]):.{digits}f}" for f in (statistics.median, min, max)]
            cells.append(f"{values[0]} ({values[1]} to {values[2]})")
        side, resolution = f"{record['side_px']} px, {record['jpeg_kb']} kB", f"{record['resolution_px']} px"
        lines.append(f"| {side} | {resolution} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", "Pictures a CPU second: median (range). Last column: taken in turns.", ""])


def main(args):
    """Measure each case, write and print the results."""
    torch.set_num_threads(1)
    records = [measure(*case, args) for case in args.cases]
    args.output_dir.mkdir(parents=True, exist_ok=True)
    (args.output_dir / "loader.json").write_text(json.dumps(records, indent=1), encoding="utf-8")
    (args.output_dir / "loader.md").write_text(as_markdown(records), encoding="utf-8")
    print(as_markdown(records))


if __name__ == "__main__":
    main(ARGS)
