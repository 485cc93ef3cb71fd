#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Encode training shards once, so that training needs neither VAE nor text encoders.

    accelerate launch scripts/cache_latents.py --output_dir /data/laion-cache --resolution 1024 \\
        --pretrained_teacher_model stabilityai/stable-diffusion-xl-base-1.0 --mixed_precision fp16 \\
        --train_shards_path_or_url "/data/laion/{00000..00099}.tar"
    accelerate launch train_lcm_lora_sdxl.py --train_shards_path_or_url /data/laion-cache ...

Beside the flags below it takes the training scripts' flags of the groups `teacher` and `data`, and
--mixed_precision, --seed and --vae_encode_batch_size. The model decides which training script encodes.
Input: what a training script takes. Output: a shard for each with a usable sample, 00000.tar on, of KEY.txt, KEY.json,
KEY.safetensors: in float16 the moments of the VAE's posterior (a latent is drawn from them anew at each use) and
text embeddings; of SDXL also time ids. The first sample, `_cache`, describes how they were made; a training run
with other settings is refused. Processes share the shards; a second run makes missing ones. Broken ones: exit code 2.
"""

import io
import json
import os
import re
import sys
import zlib
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
from lib.cli import COUNT, ToolParser, folder_problems, refuse, started

PASSED_ON = ("mixed_precision", "seed", "vae_encode_batch_size")
FILTERS = ("min_image_side_px", "max_watermark", "max_unsafe", "min_aesthetic", "require_metadata")


def parse_args(argv=None):
    """Return this tool's flags; `rest` are the words for the training script. Wrong flags exit with 2."""
    cli = ToolParser(__doc__)
    add = cli.add_argument
    add("--pretrained_teacher_model", required=True, metavar="MODEL", help="Hub id, folder or single file")
    add("--teacher_revision", metavar="REV", help="Hub branch, tag or commit")
    add("--cache_dir", metavar="DIR", help="where files from the Hub are kept")
    add("--output_dir", required=True, type=Path, metavar="DIR", help="folder for the cached shards")
    add("--num_views", type=COUNT, default=1, metavar="N", help="crops and flips of each picture (default: 1)")
    add("--batch_size", type=COUNT, default=32, metavar="N", help="pictures encoded at a time (default: 32)")
    add("--decode_threads", type=COUNT, default=4, metavar="N", help="threads of a process (default: 4)")
    args, args.rest = cli.parse_known_args(argv)
    refuse(cli, folder_problems(args.output_dir))
    for name in ("pretrained_teacher_model", "teacher_revision", "cache_dir"):
        if getattr(args, name) is not None:
            args.rest += [f"--{name}", getattr(args, name)]
    return args


if __name__ == "__main__":
    ARGS = started(parse_args())

import numpy as np
import torch
from accelerate.utils import gather_object
from lib.pipelines import family_of, read_json, writing_alone, writing_to
from lib.trainers import DTYPES, exit_code
from PIL import Image
from safetensors.torch import save
from tqdm.auto import tqdm
from webdataset import TarWriter


def parse_trainer_args(trainer, words):
    """Return the training script's flags; those that do not touch the cache are refused."""
    parser = trainer.OneLineParser(allow_abbrev=False)
    trainer.add_model_args(parser)
    trainer.add_data_args(parser)
    for name in PASSED_ON:
        parser.add_argument(f"--{name}")
    given, unknown = parser.parse_known_args(words)
    if unknown:
        parser.error(trainer.unknown_flag(unknown[0], parser))
    for name in ("max_train_samples", "shuffle_buffer_samples", "dataloader_num_workers"):
        if getattr(given, name) != parser.get_default(name):
            parser.error(f"--{name}: every sample is cached, in order, by --decode_threads; leave it out")
    return trainer.parse_args([*words, "--max_train_steps", "1", "--report_to", "none"])


def make_head(trainer, pipe, args, num_views):
    """Return the first sample of a shard: how the tensors were made, and the unconditional embeddings."""
    made = trainer.cache_identity(args) | {"scaling_factor": pipe.vae.config.scaling_factor, "num_views": num_views}
    uncond_embeds = trainer.encode_prompts(pipe, [""], pipe.vae.device)
    return {
        "__key__": trainer.CACHE_KEY,
        "json": json.dumps(made, sort_keys=True).encode(),
        "safetensors": save({name: value.half().cpu().contiguous() for name, value in uncond_embeds.items()}),
    }


def prepared(trainer, pool, shard, args, own, skipped):
    """Yield (key, undecoded sample, prepared sample) of a shard's views, decoded in threads, ahead of use."""
    waiting = deque()

    def take():
        key, raw, future = waiting.popleft()
        try:
            yield key, raw, future.result()
        except trainer.SkippedSample as cause:
            skipped[str(cause)] += 1

    for raw in trainer.read_shard(shard, skipped):
        for view in range(own.num_views):
            key = f"{raw['__key__']}-{view}" if own.num_views > 1 else raw["__key__"]
            waiting.append((key, raw, pool.submit(trainer.prepare_sample, raw, args, view)))
        while len(waiting) > 2 * own.batch_size:
            yield from take()
    while waiting:
        yield from take()


def encode(trainer, pipe, batch, args):
    """Return the cached tensors of a batch, a dict for each; raises UnusableInput where the VAE overflows."""
    device, samples = pipe.vae.device, [sample for _, _, sample in batch]
    pixels = torch.from_numpy(np.stack([sample["pixels"] for sample in samples])).to(device)
    tensors = {"moments": trainer.encode_moments(pipe.vae, pixels, args)}
    tensors |= trainer.encode_prompts(pipe, [sample["caption"] for sample in samples], device)
    halves = {name: value.half().cpu() for name, value in tensors.items()}
    for name, value in halves.items():
        if bad := [key for row, (key, _, _) in zip(value, batch, strict=True) if not row.isfinite().all()]:
            raise trainer.UnusableInput(f"{name} of {bad[0]} overflow; use --mixed_precision no or the fp16-fix VAE")
    inputs = ({"time_ids": s["time_ids"]} if "time_ids" in s else {} for s in samples)  # SDXL alone has them
    return [{name: value[i].contiguous() for name, value in halves.items()} | more for i, more in enumerate(inputs)]


def write_batch(trainer, writer, batch, encoded):
    for (key, raw, sample), tensors in zip(batch, encoded, strict=True):
        record = {"__key__": key, "json": metadata_with_size(trainer, raw), "txt": sample["caption"]}
        writer.write(record | {"safetensors": save(tensors)})


def metadata_with_size(trainer, raw):
    """Return a sample's json, with the size of its picture where it has none: a filter at training may need it."""
    if "side" in trainer.metadata_of(raw):
        return raw["json"]
    data = next(raw[suffix] for suffix in trainer.IMAGE_SUFFIXES if suffix in raw)
    width, height = Image.open(io.BytesIO(trainer.encoded(data)), formats=trainer.PICTURE_FORMATS).size
    record = json.loads(raw.get("json", b"{}"))
    return json.dumps(record | {"original_width": width, "original_height": height}).encode()


def cache_shard(trainer, pipe, head, shard, target, args, own, skipped, bar):
    """Write the cached form of a shard, whole or not at all; adds to the counts of what was `skipped`, by cause."""
    before, done, source = Counter(skipped), 0, source_of(trainer, shard)
    scratch = target.with_name(f".writing-{target.name}")
    # One thread writes a batch while the next is encoded. A whole time saves each member an extended header.
    with (
        scratch.open("wb") as file,  # webdataset takes the drive of a Windows path for an address's scheme
        TarWriter(file, mtime=0) as tar,
        ThreadPoolExecutor(own.decode_threads) as pool,
        ThreadPoolExecutor(1) as writer,
    ):
        tar.write(head)
        samples, written = prepared(trainer, pool, shard, args, own, skipped), None
        while batch := list(islice(samples, own.batch_size)):
            encoded = encode(trainer, pipe, batch, args)
            if written:
                written.result()  # at most one batch waits; raises what the writing raised
            written = writer.submit(write_batch, trainer, tar, batch, encoded)
            done += len(batch)
            bar.update(len(batch))
        if written:
            written.result()
    found = dict(skipped - before)
    if not done or any(cause.startswith("shard ") for cause in found):  # it broke off
        return scratch.unlink()
    stats = {"samples": done, "source": source, "skipped": found, "filters": {f: getattr(args, f) for f in FILTERS}}
    trainer.write_atomically(target.with_name(f"{target.stem}_stats.json"), json.dumps(stats, indent=1))
    os.replace(scratch, target)


def source_of(trainer, shard):
    """Return what tells a shard from others: its name with its size, or with the sizes of a picture folder's files."""
    if isinstance(shard, trainer.PictureFolder):
        sizes = [(name, trainer.size_of(shard.folder / name)) for name in shard.files]
        return f"{len(sizes)} files, crc32 {zlib.crc32(json.dumps(sizes).encode()):08x}"
    is_remote = trainer.is_remote(shard)
    return trainer.masked(shard) if is_remote else f"{Path(shard).name}, {Path(shard).stat().st_size} bytes"


def missing_shards(trainer, folder, head, shards, args):
    """Return the head's json, and (shard, path of its cached form) where there is none yet; raises UnusableInput."""
    first, *others = {trainer.check_shard(path) for path in folder.glob("[!.]*.tar")} or {head["json"]}
    older = re.sub(rb', \w+ of their middle"', b'"', head["json"])  # version 0.2.0's: these shards stay so
    if others or first not in (head["json"], older):
        raise trainer.UnusableInput(f"--output_dir {folder}: holds other shards; remove them or choose another folder")
    targets = [(shard, folder / f"{number:05d}.tar") for number, shard in enumerate(shards)]
    filters = {name: getattr(args, name) for name in FILTERS}
    for shard, target in targets:
        made = read_json(target.with_name(f"{target.stem}_stats.json")) if target.exists() else {}
        if changed := trainer.differences(made.get("filters", filters), filters):
            raise trainer.UnusableInput(f"{target}: was made with other filters ({changed}); choose another folder")
        source = made.get("source")
        is_comparable = source and trainer.is_remote(source) == trainer.is_remote(shard)
        if is_comparable and source != source_of(trainer, shard):
            remedy = f"this command would make it of {trainer.masked(str(shard))}; remove it or choose another folder"
            raise trainer.UnusableInput(f"{target}: was made of {source}; {remedy}")
    return first, [(shard, target) for shard, target in targets if not target.exists()]


@torch.no_grad()
def main(own):
    trainer = family_of(own)
    args = parse_trainer_args(trainer, own.rest)
    accelerator = trainer.start(args)
    shards = trainer.agree(accelerator, trainer.list_shards, args.train_shards_path_or_url)
    args.teacher_revision = trainer.agree(accelerator, trainer.check_teacher, args)
    pipe = trainer.load_teacher(args, DTYPES[accelerator.mixed_precision], accelerator.device, unet=None)
    head = make_head(trainer, pipe, args, own.num_views)
    # What is missing is shared, not all shards: so no process of a resumed run waits for one that has more left.
    head["json"], missing = trainer.agree(accelerator, missing_shards, trainer, own.output_dir, head, shards, args)
    skipped = trainer.Skipped()
    with tqdm(unit="picture", desc="encoding", disable=not accelerator.is_main_process) as bar:
        for shard, target in missing[accelerator.process_index :: accelerator.num_processes]:
            with writing_to(own.output_dir), writing_alone(target):
                cache_shard(trainer, pipe, head, shard, target, args, own, skipped, bar)
    skipped = sum((Counter(part) for part in gather_object([dict(skipped)])), Counter())
    broken = [cause for cause in skipped if cause.startswith("shard ")]
    if accelerator.is_main_process:
        print(f"skipped samples: {trainer.describe(skipped) or 'none'}", file=sys.stderr)
    accelerator.end_training()
    if broken:
        raise trainer.UnusableInput(f"{len(broken)} shards are missing in {own.output_dir}; run again")
    if not any(own.output_dir.glob("[!.]*.tar")):
        raise trainer.UnusableInput(f"no sample can be cached: {trainer.describe(skipped)}")


if __name__ == "__main__":
    sys.exit(exit_code(main, ARGS))
