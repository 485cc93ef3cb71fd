# SPDX-License-Identifier: Apache-2.0
"""The pictures of an evaluation: which rows there are, drawing what is missing, reading what is kept.

A picture is a PNG whose text chunk "record" holds its settings and its cost. Blocks of `--batch_size` pictures are
always drawn together, so that neither an interruption nor the number of processes changes a picture.
"""

import hashlib
import json
import os
import re
from dataclasses import dataclass
from itertools import chain, islice, product
from pathlib import Path

import diffusers
import numpy as np
import torch
from PIL import Image, ImageOps, PngImagePlugin
from tqdm import tqdm

from lib.cli import LORA_SAMPLERS, TITLES
from lib.pipelines import MAX_PICTURE_PX, device_name, draw, lora_files, refuse_folder, set_sampler
from lib.trainers import UnusableInput, sd15

REFERENCE_SEED = 2**31  # beyond the rows' seeds; torch's CPU generator tells seeds apart by 32 bits
READ = re.compile(rf"(?i)\.({'|'.join(sd15.IMAGE_SUFFIXES)})$|{sd15.TAR_NAMES.pattern}")


@dataclass(frozen=True)
class Row:
    """One way to draw all the pictures; `lora` is a (adapter name, fingerprint) pair, or None."""

    folder: str
    label: str
    sampler: str
    steps: int
    guidance: float
    lora: tuple | None = None
    first_seed: int = 0


def fingerprint(source, find=lora_files):
    """Return 8 hex digits of a Hub id, or of what the files of a LoRA or local model hold."""
    places = find(source)  # a LoRA of the Hub may be pushed anew
    digest = hashlib.sha256(b"" if places[0].exists() else str(source).encode())
    files = chain(*(sorted(sd15.files_below(path, refuse_folder)) if path.is_dir() else [path] for path in places))
    for path in filter(Path.is_file, files):
        with path.open("rb") as data:
            digest.update(path.name.encode() + hashlib.file_digest(data, "sha256").digest())
    return digest.hexdigest()[:8]


def teacher_row(args, folder, first_seed):
    return Row(folder, "Teacher", "ddim", args.teacher_steps, args.guidance_scale[0], None, first_seed)


def list_rows(args):
    """Return the rows of the report: the teacher's many steps, whose distance is the floor, and the samplers."""
    rows = [teacher_row(args, "teacher", args.seed)]
    adapters = [(path, (f"lcm{index}", fingerprint(path))) for index, path in enumerate(args.lora)]
    for sampler in args.samplers:
        is_lcm = sampler.startswith("lcm")
        loras = adapters if sampler in LORA_SAMPLERS else [(None, None)]
        guidances = args.lcm_guidance_scale if is_lcm else args.guidance_scale
        for (path, lora), guidance, steps in product(loras, guidances, args.steps):
            folder, label = f"{sampler}-guidance{guidance:g}-{steps}steps", TITLES[sampler]
            folder += f"-{lora[1]}" if lora else ""
            label += f" {path}" if lora and len(args.lora) > 1 else ""
            rows.append(Row(folder, label, sampler, steps, guidance, lora, args.seed))
    return rows


class Gallery:
    """The pictures of all rows in one folder, and this process's share of them.

    `gap` separates the seeds of a prompt's second and later pictures from those of its first one.
    """

    def __init__(self, args, rank=0, processes=1, gap=0):
        self.folder, self.prompts, self.count = args.output_dir / "pictures", args.prompts, args.num_images
        self.resolution, self.gap, size = args.resolution, gap, args.batch_size
        self.all_blocks = [range(self.count)[i : i + size] for i in range(0, self.count, size)]
        self.blocks = self.all_blocks[rank::processes]
        flags = "teacher_revision variant mixed_precision prediction_type resolution"
        self.common = {flag: getattr(args, flag) for flag in flags.split()}
        self.common |= {"diffusers": diffusers.__version__, "torch": torch.__version__}
        models = {flag: getattr(args, flag) for flag in ("pretrained_vae_model_name_or_path", "teacher_config")}
        models["teacher"] = args.pretrained_teacher_model
        self.common |= {flag: model and fingerprint(model, lambda it: [Path(it)]) for flag, model in models.items()}

    def path(self, row, index):
        return self.folder / row.folder / f"{index:05d}.png"

    def prompt(self, index):
        return self.prompts[index % len(self.prompts)]

    def seed(self, row, index):
        return row.first_seed + index + (self.gap if index >= len(self.prompts) else 0)

    def settings(self, row, index):
        """Return everything that decides a picture, as JSON keeps it."""
        own = {"sampler": row.sampler, "steps": row.steps, "guidance": row.guidance}
        own |= {"lora": row.lora and row.lora[1], "seed": self.seed(row, index), "prompt": self.prompt(index)}
        return self.common | own

    def record(self, row, index):
        """Return the record of a kept picture; refuse one that was drawn with other settings."""
        path = self.path(row, index)
        try:
            if not path.is_file():  # a FIFO would be waited for
                raise ValueError("it is no file")
            with Image.open(path, formats=["PNG"]) as picture:
                record = json.loads(picture.text["record"])
            kept, _ = record["settings"], record["place"]
        except (OSError, LookupError, ValueError, TypeError) as error:
            raise UnusableInput(f"{path}: no picture of this tool ({error}); delete it") from error
        wanted = self.settings(row, index)
        changed = sorted(key for key in wanted.keys() | kept.keys() if kept.get(key) != wanted.get(key))
        if changed:
            remedy = "give another --output_dir, or delete that folder"
            raise UnusableInput(f"{path.parent}: drawn with another {', '.join(changed)}; {remedy}")
        return record

    def missing(self, rows):
        """Return the blocks that this process is to draw, {row: [block]}; refuse any picture as `record` does."""
        found, mine = {}, {*self.blocks}
        for row, block in product(rows, self.all_blocks):  # each process, so that all of them refuse
            kept = [index for index in block if self.path(row, index).exists()]
            for index in kept:
                self.record(row, index)
            if len(kept) < len(block) and block in mine:
                found.setdefault(row, []).append(block)
        return found

    def draw(self, pipe, missing, is_quiet):
        """Draw blocks, {row: [block]}, and keep those of their pictures that are not there yet."""
        bar = tqdm(total=sum(map(len, missing.values())), desc="drawing", unit="block", disable=is_quiet)
        fitting = {}  # pictures that fit into memory together, by what a pass consists of
        for row, blocks in missing.items():
            weights = {row.lora[0]: 1.0} if row.lora else {}
            given = set_sampler(pipe, row.sampler, weights) | {"resolution": self.resolution}
            kind = bool(row.lora), row.guidance > 1
            pipe.batch_that_fits = fitting.get(kind, len(self.blocks[0]))
            if kind not in fitting:  # the first pass of a kind is slower, and not timed
                draw(pipe, [self.prompt(index) for index in blocks[0]], 1, row.guidance, list(blocks[0]), **given)
            for block in blocks:
                texts, seeds = [self.prompt(i) for i in block], [self.seed(row, i) for i in block]
                pictures, seconds = draw(pipe, texts, row.steps, row.guidance, seeds, is_strict=True, **given)
                took = {"seconds": seconds, "evaluations": row.steps * (1 + pipe.do_classifier_free_guidance)}
                took["place"] = f"{device_name(pipe.device)}, {len(block)} at a time"
                for index, picture in zip(block, pictures, strict=True):
                    if not self.path(row, index).exists():
                        self.keep(row, index, picture, took)
                bar.update()
            fitting[kind] = pipe.batch_that_fits
        bar.close()

    def keep(self, row, index, picture, took):
        """Write a picture with its record under a temporary name first, so that what is there is complete."""
        path, text = self.path(row, index), PngImagePlugin.PngInfo()
        text.add_text("record", json.dumps({"settings": self.settings(row, index), **took}))
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(part := path.with_suffix(f".{os.getpid()}.part"), "PNG", pnginfo=text)  # as another run may
        part.replace(path)

    def picture(self, row, index):
        with Image.open(self.path(row, index), formats=["PNG"]) as picture:
            return picture.convert("RGB")

    def read(self, row, indices):
        """Return pictures as uint8 [N, H, W, 3]."""
        return torch.from_numpy(np.stack([np.asarray(self.picture(row, index)) for index in indices]))


def real_files(paths):
    found = []
    for path in map(Path, paths):
        inside = sorted(sd15.files_below(path, refuse_folder)) if path.is_dir() else [path]
        files = [file for file in inside if file.is_file() and READ.search(file.name)]
        if not files:
            raise UnusableInput(f"--reference {path}: give a folder of pictures or of .tar shards, or a shard")
        found += files
    return found


def encoded_pictures(paths, skipped):
    """Yield each real picture, in order of name: its path, or its bytes."""
    for file in real_files(paths):
        if not sd15.TAR_NAMES.search(file.name):
            yield str(file)
            continue
        # Members of a shard are never decoded by their suffix: a decoder of .pkl or .pth runs what it reads.
        # An absolute path, because a file may be called "pipe:COMMAND.tar".
        for sample in sd15.read_shard(str(file.absolute()), skipped):
            found = [sample[suffix] for suffix in sd15.IMAGE_SUFFIXES if suffix in sample]
            yield from found[:1]
            skipped["no picture"] += not found


def real_pictures(paths, skipped, rank=0, processes=1):
    """Yield this process's share of the real pictures, upright RGB; count those that cannot be used."""
    # Every process reads the shards; the first one counts what is wrong with them.
    for number, picture in enumerate(encoded_pictures(paths, sd15.Skipped() if rank else skipped)):
        if number % processes == rank:
            try:
                yield sd15.open_picture(picture, MAX_PICTURE_PX)[0]
            except sd15.SkippedSample as cause:
                skipped[str(cause)] += 1


def read_real(paths, size, skipped, rank=0, processes=1, chunk=32):
    """Yield uint8 [n, H, W, 3] of a process's share, cut at the middle and scaled to size (W, H)."""
    pictures = real_pictures(paths, skipped, rank, processes)
    while part := [ImageOps.fit(picture, size, Image.Resampling.LANCZOS) for picture in islice(pictures, chunk)]:
        yield torch.from_numpy(np.stack(part))
