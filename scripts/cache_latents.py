#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Encode training shards once, so that training needs neither VAE nor text encoders.

    accelerate launch scripts/cache_latents.py --output_dir /data/laion-cache --resolution 1024 \\
        --pretrained_teacher_model stabilityai/stable-diffusion-xl-base-1.0 --mixed_precision fp16 \\
        --train_shards_path_or_url "/data/laion/{00000..00099}.tar"
    accelerate launch train_lcm_lora_sdxl.py --train_shards_path_or_url /data/laion-cache ...

Beside the flags below it takes the training scripts' flags of the groups `teacher` and `data`, and
--mixed_precision, --seed and --vae_encode_batch_size. The model tells which training script encodes.
Input: the shards that a training script takes. Output: one shard for each, 00000.tar onwards, with KEY.txt,
KEY.json and KEY.safetensors: in float16 the moments of the VAE's posterior (a latent is drawn from them anew
at each use) and text embeddings; time ids. The first sample, `_cache`, says how they were made; a training
run with other settings is refused. Processes share the shards; a second run makes the missing ones.
Exit codes: 0 done; 2 wrong usage, unusable input, or shards that broke off; 1 anything else.
"""

import argparse
import json
import logging
import os
import sys
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

PASSED_ON = ("mixed_precision", "seed", "vae_encode_batch_size")


def parse_args():
    """Return (this tool's flags, words for the training script); wrong flags exit with 2."""
    cli = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = cli.add_argument
    add("--pretrained_teacher_model", required=True, metavar="MODEL", help="Hub id, folder or single file")
    add("--teacher_revision", metavar="REV", help="Hub branch, tag or commit")
    add("--cache_dir", metavar="DIR", help="where files from the Hub are kept")
    add("--output_dir", required=True, type=Path, metavar="DIR", help="folder for the cached shards")
    add("--num_views", type=int, default=1, metavar="N", help="crops and flips of each picture (default: 1)")
    add("--batch_size", type=int, default=32, metavar="N", help="pictures encoded at a time (default: 32)")
    add("--decode_threads", type=int, default=4, metavar="N", help="threads of a process (default: 4)")
    args, rest = cli.parse_known_args()
    for name in ("num_views", "batch_size", "decode_threads"):
        if getattr(args, name) < 1:
            cli.error(f"--{name} {getattr(args, name)}: must be at least 1")
    for name in ("pretrained_teacher_model", "teacher_revision", "cache_dir"):
        if getattr(args, name) is not None:
            rest += [f"--{name}", getattr(args, name)]
    return args, rest


if __name__ == "__main__":
    ARGS, REST = parse_args()  # before the imports below, which take seconds

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
for package in ("xformers", "bitsandbytes"):
    logging.getLogger(package).setLevel(logging.ERROR)  # on import they warn of CUDA code not needed here

import torch
import webdataset as wds
from accelerate.utils import gather_object
from diffusers import DiffusionPipeline
from diffusers.loaders import single_file_utils
from safetensors.torch import save
from tqdm.auto import tqdm

import train_lcm_lora_sd15 as sd15
import train_lcm_lora_sdxl as sdxl


def trainer_of(args):
    """Return the training script of the model's family, as a module.

    Raises:
        UnusableInput: there is no such model, or it is neither SD 1.x or 2.x nor SDXL.
    """
    model = args.pretrained_teacher_model
    try:
        if Path(model).is_file():
            kind = single_file_utils.infer_diffusers_model_type(
                single_file_utils.load_single_file_checkpoint(model)
            )
            name = "StableDiffusionXLPipeline" if kind.startswith("xl") else "StableDiffusionPipeline"
        else:
            config = DiffusionPipeline.load_config(
                model, revision=args.teacher_revision, cache_dir=args.cache_dir
            )
            name = config["_class_name"]
    except (OSError, ValueError, LookupError) as error:
        reason = " ".join(str(error).split())[:300]
        raise sd15.UnusableInput(f"--pretrained_teacher_model {model} cannot be loaded: {reason}") from error
    if name not in ("StableDiffusionPipeline", "StableDiffusionXLPipeline"):
        raise sd15.UnusableInput(f"--pretrained_teacher_model {model} is a {name}; name an SD or SDXL model")
    return sd15 if name == "StableDiffusionPipeline" else sdxl


def parse_trainer_args(trainer, words):
    """Return the training script's flags; those that do not touch the cache are refused."""
    parser = trainer.OneLineParser(allow_abbrev=False)
    trainer.add_model_args(parser)
    trainer.add_data_args(parser)
    for name in PASSED_ON:
        parser.add_argument(f"--{name}")
    parser.parse_args(words)
    return trainer.parse_args([*words, "--max_train_steps", "1", "--report_to", "none"])


def make_head(trainer, pipe, args, num_views):
    """Return the first sample of a shard: how the tensors were made, and the uncond embeddings."""
    made = trainer.cache_identity(args) | {
        "scaling_factor": pipe.vae.config.scaling_factor,
        "num_views": num_views,
    }
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


def encode(trainer, pipe, samples, args):
    """Return the cached tensors of prepared samples, a dict for each.

    Raises:
        UnusableInput: the VAE overflows in the chosen precision.
    """
    device = pipe.vae.device
    pixels = trainer.collate(samples)["pixels"].to(device)
    tensors = {"moments": trainer.encode_moments(pipe.vae, pixels, args)}
    tensors |= trainer.encode_prompts(pipe, [sample["caption"] for sample in samples], device)
    halves = {name: value.half().cpu() for name, value in tensors.items()}
    for name, value in halves.items():
        if not value.isfinite().all():
            raise trainer.UnusableInput(f"{name} overflow; use --mixed_precision no, or SDXL's fp16-fix VAE")
    return [
        {name: value[i].contiguous() for name, value in halves.items()} | {"time_ids": sample["time_ids"]}
        for i, sample in enumerate(samples)
    ]


def cache_shard(trainer, pipe, head, shard, target, args, own, bar):
    """Write the cached form of a shard, whole or not at all; returns skipped samples by cause."""
    skipped = Counter()
    scratch = target.with_name(f".writing-{target.name}")
    # A time of whole seconds saves an extended header for each member.
    with wds.TarWriter(str(scratch), mtime=0) as writer, ThreadPoolExecutor(own.decode_threads) as pool:
        writer.write(head)
        samples = prepared(trainer, pool, shard, args, own, skipped)
        while batch := list(islice(samples, own.batch_size)):
            encoded = encode(trainer, pipe, [sample for _, _, sample in batch], args)
            for (key, raw, sample), tensors in zip(batch, encoded, strict=True):
                record = {"json": raw["json"]} if "json" in raw else {}
                record |= {"__key__": key, "txt": sample["caption"], "safetensors": save(tensors)}
                writer.write(record)
            bar.update(len(batch))
    if any(cause.startswith("shard ") for cause in skipped):  # it broke off
        scratch.unlink()
    else:
        os.replace(scratch, target)
    return skipped


def check_existing(trainer, folder, head):
    """Raise UnusableInput where the folder holds shards that were made in another way."""
    found = sorted(str(path) for path in folder.glob("[!.]*.tar"))
    old = trainer.find_cache(found)
    if found and (old is None or old["json"] != head["json"]):
        raise trainer.UnusableInput(
            f"--output_dir {folder}: holds other shards already; remove them or choose another folder"
        )


@torch.no_grad()
def main(own, words):
    """Encode the shards that are not there yet."""
    trainer = trainer_of(own)
    args = parse_trainer_args(trainer, words)
    accelerator = trainer.start(args)
    shards = trainer.agree(accelerator, trainer.list_shards, args.train_shards_path_or_url)
    dtype = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[accelerator.mixed_precision]
    pipe = trainer.load_teacher(args, dtype, accelerator.device, unet=None)
    head = make_head(trainer, pipe, args, own.num_views)
    own.output_dir.mkdir(parents=True, exist_ok=True)
    trainer.agree(accelerator, check_existing, trainer, own.output_dir, head)
    skipped, number_of = Counter(), {shard: number for number, shard in enumerate(shards)}
    with tqdm(unit="picture", desc="encoding", disable=not accelerator.is_main_process) as bar:
        for shard in shards[accelerator.process_index :: accelerator.num_processes]:
            target = own.output_dir / f"{number_of[shard]:05d}.tar"
            if not target.exists():
                skipped += cache_shard(trainer, pipe, head, shard, target, args, own, bar)
    skipped = sum((Counter(part) for part in gather_object([dict(skipped)])), Counter())
    broken = [cause for cause in skipped if cause.startswith("shard ")]
    if accelerator.is_main_process:
        print(f"skipped samples: {trainer.describe(skipped) or 'none'}", file=sys.stderr)
    accelerator.end_training()
    if broken:
        raise trainer.UnusableInput(f"{len(broken)} shards are missing in {own.output_dir}; run again")


if __name__ == "__main__":
    try:
        main(ARGS, REST)
    except (sd15.UnusableInput, sdxl.UnusableInput) as error:
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
