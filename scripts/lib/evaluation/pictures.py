# SPDX-License-Identifier: Apache-2.0
"""The pictures of an evaluation: which rows there are, drawing what is missing, reading what is kept.

A picture is a PNG whose text chunk "record" holds how it was drawn and what it took: so it is known whether
it still fits. Blocks of `--batch_size` pictures are drawn together, always the same ones, so that neither an
interruption nor the number of processes changes a picture.
"""

import hashlib
import json
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import diffusers
import numpy as np
import torch
import webdataset as wds
from drawing import draw, peak_gib, reset_peak, set_sampler
from model_args import LORA_FILE, TITLES, InputError
from PIL import Image, PngImagePlugin
from tqdm import tqdm

REFERENCE_SEED = 2**31  # beyond the rows' seeds; torch's CPU generator tells seeds apart by 32 bits
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True)
class Row:
    """One way to draw all the pictures; `lora` is a (adapter name, fingerprint) pair, or None."""

    name: str
    label: str
    sampler: str
    steps: int
    guidance: float
    lora: tuple | None = None
    first_seed: int = 0


def fingerprint(source):
    """Return 8 hex digits that change with a local model's files (names, sizes, times), or with a Hub id."""
    path, parts = Path(source), [str(source)]
    if path.exists():
        names = [LORA_FILE] if (path / LORA_FILE).exists() else ["**/*"]
        files = (
            [path]
            if path.is_file()
            else sorted({f for name in names for f in path.glob(name) if f.is_file()})
        )
        parts = [f"{f.name} {f.stat().st_size} {f.stat().st_mtime_ns}" for f in files]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:8]


def list_rows(args):
    """Return the rows: the yardstick, the teacher's second draw (the floor), then every sampler."""
    teacher = ("Teacher", "ddim", args.teacher_steps, args.guidance_scale[0], None)
    rows = [Row("reference", *teacher, args.seed + REFERENCE_SEED), Row("teacher", *teacher, args.seed)]
    for sampler in args.samplers:
        is_lcm = sampler.startswith("lcm")
        loras = list(enumerate(args.lora)) if sampler == "lcm-lora" else [(0, None)]
        guidances = args.lcm_guidance_scale if is_lcm else args.guidance_scale
        for (index, path), guidance, steps in product(loras, guidances, args.steps):
            name, label, lora = f"{sampler}-guidance{guidance:g}-{steps}steps", TITLES[sampler], None
            if path:
                lora = (f"lcm{index}", fingerprint(path))
                name = f"{name}-{lora[1]}"
                label += f" {path}" if len(args.lora) > 1 else ""
            rows.append(Row(name, label, sampler, steps, guidance, lora, args.seed))
    return rows


class Gallery:
    """The pictures of all rows in one folder, and this process's share of them."""

    def __init__(self, args, rank=0, processes=1):
        """Name the folder and the blocks; nothing is read or drawn yet."""
        self.folder, self.prompts, self.count = args.output_dir / "pictures", args.prompts, args.num_images
        blocks = [
            range(s, min(s + args.batch_size, self.count)) for s in range(0, self.count, args.batch_size)
        ]
        self.blocks, self.resolution = blocks[rank::processes], args.resolution
        self.common = {
            "teacher": fingerprint(args.pretrained_teacher_model),
            "variant": [args.teacher_revision, args.variant, args.mixed_precision],
            "resolution": args.resolution, "diffusers": diffusers.__version__, "torch": torch.__version__,
        }  # fmt: skip

    def path(self, row, index):
        """Return where a picture is kept."""
        return self.folder / row.name / f"{index:05d}.png"

    def prompt(self, index):
        """Return the prompt of a picture."""
        return self.prompts[index % len(self.prompts)]

    def settings(self, row, index):
        """Return everything that decides a picture, as JSON keeps it."""
        own = {"sampler": row.sampler, "steps": row.steps, "guidance": row.guidance}
        own |= {
            "lora": row.lora and row.lora[1],
            "seed": row.first_seed + index,
            "prompt": self.prompt(index),
        }
        return self.common | own

    def record(self, row, index):
        """Return the record of a kept picture; raises InputError if it was drawn with other settings."""
        path = self.path(row, index)
        try:
            with Image.open(path) as picture:
                record = json.loads(picture.text["record"])
        except (OSError, LookupError, ValueError) as error:
            raise InputError(f"{path}: no picture of this tool ({error}); delete it") from error
        wanted = self.settings(row, index)
        changed = [key for key, value in wanted.items() if record["settings"].get(key) != value]
        if changed:
            remedy = "give another --output_dir, or delete that folder"
            raise InputError(f"{path.parent}: drawn with another {', '.join(changed)}; {remedy}")
        return record

    def missing(self, rows):
        """Return the blocks that this process is to draw, {row: [block]}; raises InputError as `record`."""
        found = {}
        for row, block in product(rows, self.blocks):
            kept = [self.path(row, index).exists() for index in block]
            for index in (index for index, is_kept in zip(block, kept, strict=True) if is_kept):
                self.record(row, index)
            if not all(kept):
                found.setdefault(row, []).append(block)
        return found

    def draw(self, pipe, missing, is_quiet):
        """Draw blocks, {row: [block]}, and keep those of their pictures that are not there yet."""
        calls = []
        hook = pipe.unet.register_forward_pre_hook(lambda _module, inputs: calls.append(len(inputs[0])))
        bar = tqdm(total=sum(map(len, missing.values())), desc="drawing", unit="block", disable=is_quiet)
        for row, blocks in missing.items():
            set_sampler(pipe, row.sampler, {row.lora[0]: 1.0} if row.lora else {})
            warm = [self.prompt(index) for index in blocks[0]]
            draw(pipe, warm, 1, row.guidance, list(blocks[0]), resolution=self.resolution)  # not timed
            for block in blocks:
                texts, seeds = [self.prompt(i) for i in block], [row.first_seed + i for i in block]
                calls.clear()
                reset_peak(pipe.device)
                pictures, seconds = draw(
                    pipe, texts, row.steps, row.guidance, seeds, resolution=self.resolution
                )
                took = {
                    "seconds": seconds,
                    "evaluations": sum(calls) / len(block),
                    "peak_gib": peak_gib(pipe.device),
                }
                for index, picture in zip(block, pictures, strict=True):
                    if not self.path(row, index).exists():
                        self.keep(row, index, picture, took)
                bar.update()
        bar.close()
        hook.remove()

    def keep(self, row, index, picture, took):
        """Write a picture with its record, first under a temporary name: what is there is complete."""
        path, text = self.path(row, index), PngImagePlugin.PngInfo()
        text.add_text("record", json.dumps({"settings": self.settings(row, index), **took}))
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path.with_suffix(".part"), "PNG", pnginfo=text)
        path.with_suffix(".part").replace(path)

    def read(self, row, indices):
        """Return pictures as uint8 [N, H, W, 3]."""
        pictures = [np.asarray(Image.open(self.path(row, index)).convert("RGB")) for index in indices]
        return torch.from_numpy(np.stack(pictures))


def real_files(paths):
    """Return the pictures and .tar shards that paths are or hold; raises InputError where one has none."""
    found = []
    for path in map(Path, paths):
        inside = sorted(path.rglob("*")) if path.is_dir() else [path]
        files = [file for file in inside if file.suffix.lower() in (".tar", *IMAGE_SUFFIXES)]
        if not files:
            raise InputError(f"--reference {path}: give a folder of pictures or of .tar shards, or a shard")
        found += files
    return found


def real_pictures(paths):
    """Yield the PIL pictures of files, folders and .tar shards, in order of name."""
    for file in real_files(paths):
        if file.suffix == ".tar":
            # Every process reads all: the split is by picture, in read_real.
            shard = wds.WebDataset(str(file), shardshuffle=False, nodesplitter=iter).decode("pilrgb")
            yield from (picture for (picture,) in shard.to_tuple("jpg;png;webp;jpeg"))
        else:
            yield Image.open(file).convert("RGB")


def read_real(paths, size, rank, processes, chunk=32):
    """Yield uint8 [n, H, W, 3] of every process's share, cut at the middle and scaled to size (W, H)."""
    width, height = size
    pictures = []
    for number, picture in enumerate(real_pictures(paths)):
        if number % processes != rank:
            continue
        scale = max(width / picture.width, height / picture.height)
        left, top = (picture.width - width / scale) / 2, (picture.height - height / scale) / 2
        box = (left, top, picture.width - left, picture.height - top)
        pictures.append(np.asarray(picture.resize(size, Image.Resampling.LANCZOS, box=box)))
        if len(pictures) == chunk:
            yield torch.from_numpy(np.stack(pictures))
            pictures = []
    if pictures:
        yield torch.from_numpy(np.stack(pictures))
