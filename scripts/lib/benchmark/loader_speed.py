# SPDX-License-Identifier: Apache-2.0
"""Pictures a CPU second from shards to batches, beside Pillow's decoding of the same JPEGs."""

import io
import json
import statistics
import tempfile
import time
from collections import deque
from itertools import cycle, islice

import numpy as np
import torch
import webdataset as wds
from PIL import Image

from lib.trainers import sd15


def make_jpeg(side, seed):
    """Return a JPEG of side x side px with detail at every scale, as a photograph has."""
    rng, total, cells = np.random.default_rng(seed), np.zeros((side, side, 3), np.float32), 2
    while cells <= side:
        noise = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        total += np.asarray(noise.resize((side, side), Image.Resampling.BICUBIC), np.float32) * cells**-0.3
        cells *= 2
    total -= total.min()
    data = io.BytesIO()
    Image.fromarray((255 * total / total.max()).astype(np.uint8)).save(data, "JPEG", quality=90)
    return data.getvalue()


def measure_rates(side, resolution, args):
    pictures = list(islice(cycle([make_jpeg(side, seed) for seed in range(min(args.pictures, 32))]), args.pictures))
    rates = {"loader": [], "decode": []}
    with tempfile.TemporaryDirectory() as folder:
        shard = f"{folder}/00000.tar"
        with open(shard, "wb") as file, wds.TarWriter(file) as writer:
            for number, data in enumerate(pictures):
                record = {"__key__": f"{number:05d}", "jpg": data, "txt": "a picture"}
                writer.write(record | {"json": {"original_width": side, "original_height": side}})
        flags = "--pretrained_teacher_model a/b --train_batch_size 1 --shuffle_buffer_samples 16 --max_train_steps 1"
        flags = ["--train_shards_path_or_url", shard, "--resolution", str(resolution), *flags.split()]
        stream = sd15.ShardStream([shard], sd15.parse_args(flags), 1, 0, 1)
        for _ in range(args.repeats + 1):
            for name, work in (
                ("decode", lambda: [Image.open(io.BytesIO(data)).convert("RGB") for data in pictures]),
                ("loader", lambda: deque(islice(stream, len(pictures)), maxlen=0)),
            ):
                started = time.process_time()
                work()
                rates[name].append(len(pictures) / (time.process_time() - started))
    warm = {name: values[1:] for name, values in rates.items()}  # the first of each is the warm-up
    shares = [ours / limit for ours, limit in zip(warm["loader"], warm["decode"], strict=True)]
    kb = statistics.mean(map(len, pictures)) / 1000
    return {"side_px": side, "resolution_px": resolution, "jpeg_kb": round(kb, 1), "share": shares} | warm


def loader_table(records):
    lines = ["| JPEGs | training | plain decode | loader | loader / decode |", "|---|---|---|---|---|"]
    for record in records:
        cells = []
        for name, digits in (("decode", 1), ("loader", 1), ("share", 2)):
            values = [f"{f(record[name]):.{digits}f}" for f in (statistics.median, min, max)]
            cells.append(f"{values[0]} ({values[1]} to {values[2]})")
        side, resolution = f"{record['side_px']} px, {record['jpeg_kb']} kB", f"{record['resolution_px']} px"
        lines.append(f"| {side} | {resolution} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", "Pictures per CPU second: median (range). Last column: by round.", ""])


def measure_loader(args):
    torch.set_num_threads(1)
    records = [measure_rates(*case, args) for case in args.cases]
    (args.output_dir / "loader.json").write_text(json.dumps(records, indent=1))
    print(loader_table(records))
