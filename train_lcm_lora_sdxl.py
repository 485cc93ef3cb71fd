#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Distil an LCM-LoRA from an SDXL teacher (SDXL, SSD-1B, fine-tunes), so that it draws in 2 to 8 steps.

One GPU, eight GPUs, and a recipe for a card (flags in a file):

    python train_lcm_lora_sdxl.py @scripts/launch/recipes/sdxl-12gb.txt \\
        --pretrained_teacher_model stabilityai/stable-diffusion-xl-base-1.0 \\
        --train_shards_path_or_url "/data/laion/{00000..00099}.tar" \\
        --max_train_steps 10000 --output_dir outputs/lcm-lora
    torchrun --nproc_per_node 8 train_lcm_lora_sdxl.py ...
    accelerate launch train_lcm_lora_sdxl.py ...

The same command again resumes from the newest complete checkpoint in --output_dir.

Input: webdataset shards (`KEY.jpg|png|webp`, `KEY.txt`, `KEY.json`), or a folder of pictures with captions
beside them. Output: `pytorch_lora_weights.safetensors` for diffusers, ComfyUI, A1111 and Forge, checkpoints,
pictures at 1, 2, 4 and 8 steps, `log.jsonl`, `args.json`, a model card.
Exit codes: 0 done; 2 wrong usage, unusable input or a full disk; 3 stopped by a signal with a checkpoint saved
(128 + the signal's number where nothing had to be saved); 1 anything else, such as a loss that is not finite.
`accelerate launch` and torchrun turn each but 0 into 1.

The file reads downhill: arguments, mathematics, data, models, step, files, log, run. The method is
`training_loss`. Blocks between `>>> shared` and `<<< shared` are equal in the scripts for SD 1.5 and for SDXL.
Sources: LCM = Latent Consistency Models, arXiv:2310.04378; LCM-LoRA, arXiv:2311.05556.
"""

import argparse
import copy
import difflib
import errno
import glob
import gzip
import io
import json
import logging
import math
import multiprocessing.connection
import operator
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import traceback
import warnings
import zlib
from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import accumulate, chain, groupby, islice, product
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

SCRIPT_VERSION = "0.2.0"

# ---- What is particular to this model family -------------------------------------------------------------

FAMILY = "SDXL"
OTHER_SCRIPT = "train_lcm_lora_sd15.py"
DEFAULT_RESOLUTION_PX = 1024
DEFAULT_W_MIN = 3.0  # range of the released SDXL recipe
TEXT_PARTS = ("tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2")
CACHED_TENSORS = {"moments", "prompt_embeds", "pooled_prompt_embeds", "time_ids"}
VAE_SCALING = 0.13025  # of the family's own VAE
CARD_TAGS = ("stable-diffusion-xl", "stable-diffusion-xl-diffusers")
USUAL_VAE = "madebyollin/sdxl-vae-fp16-fix"  # SDXL's own overflows in float16
# Flags that launch lines may carry and that change nothing.
FLAGS_WITHOUT_EFFECT = {
    "cast_teacher_unet": "teacher and student share one UNet's weights",
    "local_rank": "the launcher's environment has the rank",
    "revision": "the teacher's revision is --teacher_revision",
}

# >>> shared: constants
# Shapes: B batch, H and W pixels, h and w latent pixels, R resolution in pixels, T = 1000 training timesteps,
# N solver steps, k = T // N, L tokens, D text width.
LORA_TARGETS = (
    "to_q,to_k,to_v,to_out.0,proj_in,proj_out,ff.net.0.proj,ff.net.2,"
    "conv1,conv2,conv_shortcut,downsamplers.0.conv,upsamplers.0.conv,time_emb_proj"
)
SIGMA_DATA = 0.5  # of the boundary condition; LCMScheduler's value
PICTURE_FROM = 0.775  # share of T from which on the student jumps to the picture even with --phases 2
VALIDATION_STEPS = (1, 2, 4, 8)
TEACHER_STEPS = 50  # of the pictures with which the student's are compared
NEUTRAL_PROMPTS = (  # drawn in place of training captions where the pictures become public
    "a lighthouse on a rocky coast at sunset", "portrait of an old fisherman", "a red bicycle in front of a shop",
    "a mountain lake on a clear morning",
)  # fmt: skip
NO_REPOSITORY = "PATH/TO/THIS/FOLDER"  # in the card of a LoRA that is not uploaded
UNET_PARTS = ("conv_", "time_", "add_", "class_", "encoder_hid_", "down_blocks.", "mid_block.", "up_blocks.")
WEIGHTS_NAME = "pytorch_lora_weights.safetensors"
MANIFEST_NAME = "checkpoint.json"
LR_SCHEDULERS = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")
INTERPOLATIONS = ("nearest", "nearest_exact", "box", "bilinear", "hamming", "bicubic", "lanczos")
TRACKERS = "tensorboard wandb comet_ml aim mlflow clearml dvclive swanlab trackio all none".split()
READ_ATTEMPTS = 3
DEAD_SHARDS, DEAD_SHARDS_AT_START = 8, 3  # so many unreadable shards in a row end a run
EMPTY_EPOCHS = 5  # a loader process that finds nothing usable in so many in a row ends a run, too; see `__iter__`
STALL_S, COMMAND_STALL_S = 30, 600  # a server, a command that sends nothing for so long is given up
MAX_CAPTION = 10_000  # characters; megabytes of text would take minutes to cut into tokens
WAITING_BYTES = 2**28  # of samples whose files are not neighbours in their tar
AUDIT_USABLE_SAMPLES, AUDIT_SAMPLES = 32, 1000
# Flags that may differ when a run is resumed; every other one must stay the same.
FREE_FLAGS = frozenset(
    "allow_tf32 cache_dir cast_teacher_unet checkpointing_steps checkpoints_total_limit compile dry_run "
    "enable_xformers_memory_efficient_attention gradient_checkpointing hub_model_id hub_public_repo hub_token "
    "init_lora local_rank logging_dir logging_steps max_train_samples max_train_steps num_train_epochs output_dir "
    "push_checkpoints_to_hub push_to_hub report_to resume_from_checkpoint revision tracker_project_name "
    "vae_encode_batch_size validation_prompts validation_steps".split()
)
# Flags that may name a place on the disk.
PLACES = "train_shards_path_or_url pretrained_teacher_model pretrained_vae_model_name_or_path teacher_config".split()
# Flags that one --objective alone reads.
READ_BY = {
    "consistency": "loss_type huber_c loss_space phases".split(),
    "matching": "student_steps student_eta fake_learning_rate fake_updates fake_warmup_steps".split(),
}
# By PyTorch's allocator, cuBLAS or the driver, and cuDNN.
OUT_OF_MEMORY = re.compile("out of memory|ALLOC_FAILED|unable to find an engine")
# What users of other trainers type, and what it is here, where that is not the nearest name.
FOREIGN_FLAGS = {
    "pretrained_model_name_or_path": "--pretrained_teacher_model", "network_dim": "--lora_rank",
    "save_every_n_steps": "--checkpointing_steps", "lr": "--learning_rate", "optimizer_type": "--use_8bit_adam",
    "optimizer": "--use_8bit_adam", "warmup": "--lr_warmup_steps", "unet_lr": "--learning_rate",
    "output_name": "--output_dir", "xformers": "--enable_xformers_memory_efficient_attention",
    "vae": "--pretrained_vae_model_name_or_path", "cache_latents": "scripts/cache_latents.py", "rank": "--lora_rank",
    "lora_dim": "--lora_rank", "num_workers": "--dataloader_num_workers", "tf32": "--allow_tf32",
    "save_steps": "--checkpointing_steps", "fp16": "--mixed_precision", "bf16": "--mixed_precision",
    "resume": "--resume_from_checkpoint", "save_precision": "scripts/export_lora.py",
    "caption_extension": "scripts/make_shards.py",
}  # fmt: skip
STOP_SIGNALS = [number for number in signal.Signals if number.name in ("SIGINT", "SIGTERM", "SIGUSR1")]
if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as under nohup
    STOP_SIGNALS.append(signal.SIGHUP)  # a terminal that is closed


class UnusableInput(Exception):
    """Something the user must change: one line that names the thing and the remedy."""

    exit_code = 2
    is_agreed = False  # whether every process raises it together


class NonFiniteLoss(Exception):
    exit_code = 1
    is_agreed = True


class StoppedBySignal(Exception):
    """A signal asked the run to stop and its checkpoint is saved."""

    exit_code = 3
    is_agreed = True


class StopWaiting(BaseException):
    """A signal came while the only process waited for data; a BaseException, so that no decoder swallows it."""


# <<< shared: constants

# ---- Arguments -------------------------------------------------------------------------------------------


# >>> shared: arguments
class OneLineParser(argparse.ArgumentParser):
    """Reports a wrong command line in one line, and reads files of flags (`@FILE`)."""

    def error(self, message):
        self.exit(2, f"error: {masked(message)}; --help lists all flags\n")

    def parse_known_args(self, args=None, namespace=None):
        return super().parse_known_args([*self.expand(sys.argv[1:] if args is None else args)], namespace)

    def expand(self, words):
        # Not by argparse, which reads a file as the system's encoding, or with bytes that are no text at all.
        for word in words:
            if not word.startswith("@"):
                yield word
                continue
            try:
                for line in Path(os.path.expanduser(word[1:])).read_text("utf-8-sig").split("\n"):
                    yield from self.expand(words_of(line))
            except (OSError, ValueError, RecursionError) as error:
                cause = getattr(error, "strerror", None) or error
                self.error(f"{word}: {cause}; a word that begins with @ names a file of flags: mend it")


def words_of(line):
    """Yield the words of a line as a shell does: a comment begins with a word (not in C#7), ~/ is the home folder."""
    inner = shlex.shlex(line, posix=True)
    inner.whitespace_split, inner.commenters = True, ""
    inner.escape = "\\" * (os.sep == "/")  # not of Windows' paths
    while not line[inner.instream.tell() :].lstrip().startswith("#"):
        if (word := inner.get_token()) is None:
            return
        yield os.path.expanduser(word) if word.startswith("~/") else word


class LastOfAll(argparse.Action):
    """A flag of several names, of which the last one counts; it says which values it takes the place of."""

    def __call__(self, _parser, namespace, values, option_string=None):
        before = getattr(namespace, self.dest)
        if before and own_rank() == 0:
            given = " ".join(map(masked, before))
            print(f"warning: {option_string} takes the place of {given}: one flag names all data", file=sys.stderr)
        setattr(namespace, self.dest, values)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action):
        tells_nothing = action.default is None or action.default is False  # but 0, which equals False, is shown
        return action.help if tells_nothing else super()._get_help_string(action)


def checked(kind, holds, allowed):
    """Return an argparse type: a `kind` (int or float) for which `holds`, described by `allowed`."""

    def parse(text):
        with suppress(ValueError):
            if holds(value := kind(text)):  # NaN fails every comparison
                return value
        raise argparse.ArgumentTypeError(f"{text!r}: must be {allowed}")

    return parse


COUNT = checked(int, lambda value: value >= 1, "a whole number, at least 1")
WHOLE = checked(int, lambda value: value >= 0, "a whole number, at least 0")
SIDE_PX = checked(int, lambda value: value >= 8 and value % 8 == 0, "one number, a multiple of 8 from 8 on")
ALPHA = checked(float, lambda value: 1e-3 <= value <= 65504, "in [0.001, 65504], as its file holds it in float16")
SEED = checked(int, lambda value: 0 <= value < 2**63, "in [0, 2^63)")
VALIDATION_INTERVAL = checked(int, lambda value: value >= -1, "a whole number, at least -1")
FINITE = checked(float, math.isfinite, "a finite number")
NOT_NEGATIVE = checked(float, lambda value: 0 <= value < math.inf, "a finite number, at least 0")
POSITIVE = checked(float, lambda value: 0 < value < math.inf, "a finite number greater than 0")
SHARE = checked(float, lambda value: 0 <= value <= 1, "in [0, 1]")
FRACTION = checked(float, lambda value: 0 <= value < 1, "in [0, 1)")
TEXT = checked(str, lambda value: not re.search("[\ud800-\udfff]", value), "UTF-8")


# fmt: off
def add_model_args(parser):
    add = parser.add_argument_group("teacher").add_argument
    add("--pretrained_teacher_model", help="Hub id, diffusers folder, or single .safetensors/.ckpt file; required")
    add("--teacher_revision", help="Hub branch, tag or commit of the teacher")
    add("--variant", help="variant of the teacher's files, such as fp16")
    add("--teacher_config", help="folder or Hub id that describes a single-file teacher; default: from the Hub")
    add("--prediction_type", choices=("epsilon", "v_prediction", "sample"),
        help="what the teacher's UNet predicts; default: as its files state, without a statement epsilon")
    add("--pretrained_vae_model_name_or_path", help="Hub id or folder of a VAE to use in place of the teacher's own")
    add("--cache_dir", help="where files from the Hub are kept")
    for name, reason in FLAGS_WITHOUT_EFFECT.items():
        if name != "use_fix_crop_and_size":
            values = {"action": "store_true"} if name == "cast_teacher_unet" else {}
            names = dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}"))  # torch's launchers give --local-rank
            add(*names, help=f"accepted, without effect: {reason}", **values)


def add_objective_args(parser):
    add = parser.add_argument_group("LoRA").add_argument
    add("--lora_rank", type=COUNT, default=64, help="rank of every LoRA matrix")
    add("--lora_alpha", type=ALPHA, help="scale is alpha / rank; default: the rank, scale 1")
    add("--lora_dropout", type=FRACTION, default=0.0, help="dropout on the LoRA's input, not while the target is made")
    add("--lora_target_modules", default=LORA_TARGETS, help="comma-separated suffixes of the modules that get a LoRA")
    add("--init_lora", metavar="LORA", help="LCM-LoRA of any rank to start from: a .safetensors file, a run's folder, "
        "or a Hub id such as latent-consistency/lcm-lora-sdv1-5, whose file is pytorch_lora_weights.safetensors")

    add = parser.add_argument_group("distillation").add_argument
    add("--w_min", type=NOT_NEGATIVE, default=DEFAULT_W_MIN, help="least guidance w of the teacher, drawn per sample: "
        "cond + w * (cond - uncond); a pipeline's guidance_scale is w + 1")
    add("--w_max", type=FINITE, default=15.0, help="greatest w")
    add("--num_ddim_timesteps", type=COUNT, default=50, help="solver steps N over the T training timesteps")
    add("--loss_type", choices=("huber", "l2"), default="huber", help="distance between prediction and target")
    add("--huber_c", type=POSITIVE, default=0.001, help="c of the pseudo-Huber loss sqrt(d^2 + c^2) - c")
    add("--loss_space", choices=("sample", "epsilon"), default="sample",
        help="compare clean latents, or the noise that they imply, which is alpha_t / sigma_t times the clean "
        "latents and so gives small timesteps more weight")
    add("--phases", type=int, choices=(1, 2), default=1,
        help="2: from the timesteps between the middle and nearly pure noise the student jumps to the middle, for "
        "Euler or DDIM; 1 is LCM, which always jumps to the picture, for LCMScheduler")
    add("--timestep_scaling_factor", type=POSITIVE, default=10.0, help="timestep scaling of the boundary condition")
    add("--proportion_empty_prompts", type=SHARE, default=0.0, help="share of captions replaced by the empty one")

    add = parser.add_argument_group("second stage: distribution matching, from an LCM-LoRA").add_argument
    add("--objective", choices=("consistency", "matching"), default="consistency", help="consistency: an LCM-LoRA. "
        "matching: brings the pictures of an LCM-LoRA (--init_lora) closer to the teacher's; takes captions alone")
    add("--student_steps", nargs="+", type=COUNT, default=[1, 2, 4, 8], metavar="N",
        help="step counts to train for; each forward pass draws one of them")
    add("--student_eta", type=SHARE, default=0.3,
        help="share of fresh noise between the student's steps, DDIM's eta: 0 is DDIM, 1 nearly LCMScheduler")
    add("--fake_learning_rate", type=POSITIVE, help="peak rate of the fake score; default: 3 times the LoRA's")
    add("--fake_updates", type=COUNT, default=2, help="updates of the fake score for one of the LoRA, on its batch")
    add("--fake_warmup_steps", type=WHOLE, default=50, help="first updates, in which the fake score alone learns")


def add_data_args(parser):
    add = parser.add_argument_group("data").add_argument
    add("--train_shards_path_or_url", "--train_data_dir", "--prompts_file", nargs="+", metavar="SHARDS",
        action=LastOfAll, help="webdataset shards: paths, folders, *.tar, http(s) addresses, 'pipe:' commands, "
        "{00000..00099} expands; a folder of pictures with a caption file (a.txt) beside each (a.jpg); with "
        "--objective matching also a text file (prompts.txt), a prompt a line; required")
    add("--resolution", type=SIDE_PX, default=DEFAULT_RESOLUTION_PX, help="side of the training pictures, px")
    add("--interpolation_type", choices=INTERPOLATIONS, default="bilinear", help="how pictures are resized")
    add("--center_crop", action="store_true", help="crop the centre in place of a random part")
    add("--random_flip", action="store_true", help="mirror each picture with probability 1/2")
    add("--use_fix_crop_and_size", action="store_true",
        help="SDXL only: condition on the training resolution and a zero crop offset in place of each picture's own")
    add("--dataloader_num_workers", type=WHOLE,
        help="loader processes for each training process; default: up to 4 on a GPU, by the CPU cores, else 0")
    add("--shuffle_buffer_samples", type=COUNT, default=1000,
        help="undecoded samples of tars that a loader holds in memory, to shuffle among")
    add("--max_train_samples", type=COUNT, help="samples in one epoch, where epochs set the length of the run")
    add("--min_image_side_px", type=WHOLE, default=0, help="skip originals whose smaller side is less")
    add("--max_image_pixels", type=COUNT, default=100_000_000, help="skip pictures with more pixels, undecoded")
    add("--max_watermark", type=SHARE, help="skip samples with a greater watermark probability")
    add("--max_unsafe", type=SHARE, help="skip samples with a greater unsafe probability")
    add("--min_aesthetic", type=FINITE, help="skip samples with a smaller aesthetic score")
    add("--require_metadata", action="store_true", help="skip samples that lack a field which a filter needs")


def add_optimizer_args(parser):
    add = parser.add_argument_group("optimization").add_argument
    add("--train_batch_size", type=COUNT, default=16, help="samples of one process in one forward pass")
    add("--gradient_accumulation_steps", type=COUNT, default=1, help="forward passes averaged into one update")
    add("--max_train_steps", type=COUNT, help="updates; default: from --num_train_epochs")
    add("--num_train_epochs", type=COUNT,
        help="passes over the data, or over --max_train_samples (then 100 by default), to set the updates")
    add("--learning_rate", type=POSITIVE, default=1e-4, help="peak learning rate")
    add("--scale_lr", action="store_true", help="multiply the rate by batch size, accumulation and processes")
    add("--lr_scheduler", default="constant", choices=LR_SCHEDULERS, help="schedule, as in diffusers")
    add("--lr_warmup_steps", type=WHOLE, default=0, help="updates of linear warm-up, in every schedule")
    add("--use_8bit_adam", action="store_true", help="AdamW with 8-bit state (bitsandbytes)")
    add("--adam_beta1", type=FRACTION, default=0.9, help="decay of the first moment")
    add("--adam_beta2", type=FRACTION, default=0.999, help="decay of the second moment")
    add("--adam_weight_decay", type=NOT_NEGATIVE, default=0.0, help="decoupled weight decay")
    add("--adam_epsilon", type=POSITIVE, default=1e-8, help="epsilon of Adam")
    add("--max_grad_norm", type=POSITIVE, default=1.0, help="gradients are clipped to this norm")


def add_output_args(parser):
    add = parser.add_argument_group("output").add_argument
    add("--output_dir", default="lcm-lora", help="folder for everything the run leaves")
    add("--resume_from_checkpoint", default="latest",
        help="'latest': the newest complete one, if any; NAME or PATH: that one; 'none': refuse a folder with some")
    add("--checkpointing_steps", type=COUNT, default=500, help="updates between checkpoints")
    add("--checkpoints_total_limit", type=COUNT, help="checkpoints kept; older ones are removed")
    add("--validation_steps", type=VALIDATION_INTERVAL, default=200,
        help="updates between validation pictures; with --init_lora also before the first; 0: at the end; -1: never")
    add("--validation_prompts", nargs="+", type=TEXT, metavar="PROMPT",
        help="prompts to draw; default: four captions of the data, or neutral ones with --push_to_hub")
    add("--logging_steps", type=COUNT, default=10,
        help="updates between log lines; several processes notice a signal only then")
    add("--logging_dir", default="logs", help="folder of the TensorBoard files, inside --output_dir")
    add("--report_to", choices=TRACKERS, default="tensorboard",
        help="tracker; all: every one that is installed; mlflow, comet_ml, dvclive and trackio get no pictures")
    add("--tracker_project_name", default="lcm-lora", help="project in the tracker")
    add("--push_to_hub", action="store_true", help="upload LoRA, pictures and model card when the run is done")
    add("--push_checkpoints_to_hub", action="store_true", help="with --push_to_hub: upload each checkpoint's LoRA too")
    add("--hub_model_id", help="Hub repository; default: the name of --output_dir")
    add("--hub_public_repo", action="store_true", help="make the Hub repository public; default: private")
    add("--hub_token", help="Hub token for uploads; default: that of `hf auth login` or HF_TOKEN, which downloads use")
    add("--dry_run", action="store_true", help="check flags and data, print the run, and stop before any model loads")

    add = parser.add_argument_group("system").add_argument
    add("--seed", type=SEED, default=0, help="seeds sample order, noise, timesteps, w and LoRA weights")
    add("--mixed_precision", choices=("no", "fp16", "bf16"),
        help="compute dtype; default: that of `accelerate launch`, else no (float32)")
    add("--allow_tf32", action="store_true", help="TF32 matrix products; convolutions use it anyway")
    add("--gradient_checkpointing", action="store_true", help="recompute activations: less memory, slower")
    add("--use_4bit_base", action="store_true",
        help="frozen weights of the attention blocks in 4 bits (NF4, bitsandbytes): less memory, slower")
    add("--enable_xformers_memory_efficient_attention", action="store_true",
        help="attention of xformers, where it runs, in place of PyTorch's SDPA")
    add("--vae_encode_batch_size", type=COUNT, default=4,
        help="pictures that the VAE encodes at a time; in float32 on a GPU it is one")
    add("--compile", action="store_true", help="torch.compile of the transformer blocks; the first updates are slow")
# fmt: on


def build_parser():
    parser = OneLineParser(description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False)
    for add_args in (add_model_args, add_objective_args, add_data_args, add_optimizer_args, add_output_args):
        add_args(parser)
    return parser


def unknown_flag(word, parser):
    """Return the error for a flag that does not exist: what it is called here, or the nearest name."""
    if not word.startswith("-"):
        return f"{one_line(word)[:80]}: a value too many; a switch takes none, and few flags several (--help)"
    word = word.partition("=")[0]
    name = word.lstrip("-").replace("-", "_")
    if name in ("dataset_name", "dataset_config_name", "image_column", "caption_column"):
        command = "python scripts/make_shards.py --dataset_name NAME --output_dir shards"
        return f"{word}: not a flag here; make shards first: {command}, then --train_shards_path_or_url shards"
    flags = [flag for action in parser._actions for flag in action.option_strings]
    near = FOREIGN_FLAGS.get(name) or next(iter(difflib.get_close_matches(f"--{name}", flags, 1, 0.73)), None)
    return f"{word}: no such flag" + (f"; did you mean {near}?" if near else "")


def check_args(args, error):
    """Call `error` where flags contradict each other or one is missing; single values are checked by their type."""
    for flag, value in vars(args).items():
        values = value if isinstance(value, list) else [value]
        if flag != "validation_prompts" and not all(each.strip() for each in values if isinstance(each, str)):
            error(f"--{flag}: its value is empty, as that of an unset variable is; give one, or leave the flag out")
    for flag in ("pretrained_teacher_model", "train_shards_path_or_url"):
        if not getattr(args, flag):
            error(f"--{flag} is missing")
    check_objective(args, error)
    if args.w_max < args.w_min:
        error(f"--w_max {args.w_max}: must be at least --w_min {args.w_min}")
    if args.num_ddim_timesteps < max(VALIDATION_STEPS):
        error(f"--num_ddim_timesteps {args.num_ddim_timesteps}: must be at least 8, as validation draws with 8 steps")
    for flag in ("learning_rate", "fake_learning_rate"):
        if args.lr_scheduler == "polynomial" and (getattr(args, flag) or 1) <= 1e-7:
            error(f"--{flag} {getattr(args, flag)}: must be over 1e-7, where the polynomial schedule ends")
    if not (args.max_train_steps or args.max_train_samples or args.num_train_epochs):
        error("--max_train_steps is missing; or give --num_train_epochs")
    if args.push_checkpoints_to_hub and not args.push_to_hub:
        error("--push_checkpoints_to_hub: needs --push_to_hub")
    if not args.lora_target_modules.strip(", "):
        error(f"--lora_target_modules {args.lora_target_modules!r}: must name at least one module suffix")


def check_objective(args, error):
    if args.objective == "consistency":
        if any(value.endswith(".txt") and not is_remote(value) for value in args.train_shards_path_or_url):
            error("--prompts_file: prompts without pictures are for --objective matching")
        k = max(1, 1000 // args.num_ddim_timesteps)
        if args.phases == 2 and (k == 1 or 500 % k):
            error("--phases 2: the solver's timesteps must hold the middle, and not 0; give --num_ddim_timesteps 50")
    elif not args.init_lora:
        error("--objective matching: needs --init_lora, the LCM-LoRA to start from")
    elif max(args.student_steps) > args.num_ddim_timesteps:
        error(f"--student_steps {max(args.student_steps)}: must be at most --num_ddim_timesteps")


def is_remote(shard):
    return isinstance(shard, str) and (shard.startswith("pipe:") or "://" in shard)


def check_paths(args, error):
    if any(os.path.isfile(path) for path in (args.output_dir, *Path(args.output_dir).parents)):
        error(f"--output_dir {args.output_dir}: is a file, or in one; name a folder")
    for flag in ("pretrained_teacher_model", "pretrained_vae_model_name_or_path", "teacher_config", "init_lora"):
        value = getattr(args, flag) or ""
        is_there = os.path.isfile(value) or os.path.isdir(value)  # a FIFO would be waited for
        is_local = re.search(r"^[./~]|/.*/|\\|\.(safetensors|ckpt)$", value) or os.path.exists(value)
        if is_local and "://" not in value and not is_there:
            error(f"--{flag} {value}: no such file or folder; give an existing path or a Hub id, owner/name")
    vae = args.pretrained_vae_model_name_or_path
    if vae and os.path.isfile(vae):
        error(f"--pretrained_vae_model_name_or_path {vae}: is a file; name a folder or Hub id, such as {USUAL_VAE}")
    if args.resume_from_checkpoint not in ("latest", "none") and not named_checkpoints(args):
        where = f"no such checkpoint, neither here nor in {args.output_dir}"
        error(f"--resume_from_checkpoint {args.resume_from_checkpoint}: {where}; give 'latest', 'none' or its folder")


def named_checkpoints(args):
    """Return the folders that --resume_from_checkpoint may mean: as given, or in the output folder."""
    paths = (Path(args.resume_from_checkpoint), Path(args.output_dir) / args.resume_from_checkpoint)
    return [path for path in paths if path.is_dir()]


def parse_args(argv=None):
    """Return checked flags; wrong ones end the process with exit code 2 and one line."""
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    if rest:
        flags = [word for word in rest if word.startswith("--")] or rest[:1]
        parser.error("; ".join(unknown_flag(word, parser) for word in flags))
    check_args(args, parser.error)
    check_paths(args, parser.error)
    if args.lora_alpha is None:
        args.lora_alpha = float(args.lora_rank)
    if argv is None:  # trackers record the command line
        sys.argv = [masked(word.replace(args.hub_token or "\0", "***")) for word in sys.argv]
    return args


SECRET_NAMES = r"(?:token|(?:api|account|access)[_-]?key(?:[_-]?id)?|secret\w*|passw\w*|credentials?|\bsig(?:nature)?)"
SECRETS = (  # pattern, replacement; in this order
    (r"(\w+:/+)[^/\s'\"]*@", r"\1***@"),
    (r"(\w+:/+[^\s'\"?#;]*)[?#;]\S+", r"\1?***"),
    (r"(?i)\b(authorization|cookie)[\"']?\s*:.*", r"\1: ***"),
    (rf"(?i)({SECRET_NAMES}[\"']?\s*[=:]\s*)([\"'][^\"']*[\"']|\S+)", r"\1***"),
    (rf"(?i)(--?(?:[\w-]*{SECRET_NAMES}|u|user|header)\s+)([\"'][^\"']*[\"']|\S+)", r"\1***"),
    (r"(?i)\b((?:bearer|basic|digest)\s+)\S{8,}", r"\1***"),
    (r"\b(hf_|sk-|gh[a-z]_|github_pat_|glpat-|xox[a-z]-|AKIA)[\w-]{8,}", r"\1***"),
)


def own_rank():
    """Return the number of this process among those of the run; a RANK without WORLD_SIZE is of something else."""
    return int(os.environ.get("RANK") or 0) if int(os.environ.get("WORLD_SIZE") or 1) > 1 else 0


def masked(text):
    """Return a text without secrets: credentials and queries of addresses, tokens, words of `pipe:` commands."""
    parts = re.split(r"(?i)::(?=\s*(?:file:)?pipe:)", text)
    if len(parts) > 1:
        return "::".join(map(masked, parts))
    if re.match(r"(?i)\s*(file:)?pipe:", text):  # any word may be a secret, but the program and the names of tars
        program, *words = text.split()
        places = [word for word in words if re.fullmatch(r"['\"]?(\w+://)?[\w./{}*-]+\.(tar|tgz|gz)['\"]?", word)]
        program = program if re.fullmatch(r"pipe:[\w./-]+", program) else "pipe:***"
        return " ".join([program, *["***"] * (len(words) > len(places)), *places])
    for pattern, replacement in SECRETS:
        text = re.sub(pattern, replacement, text)
    return text


def one_line(error):
    return masked(" ".join(str(error).split()))[:300] or type(error).__name__


def public_flags(args):
    flags = {name: value for name, value in vars(args).items() if name != "hub_token"}
    flags["train_shards_path_or_url"] = [masked(value) for value in args.train_shards_path_or_url]
    return {name: masked(value) if isinstance(value, str) else value for name, value in flags.items()}


def end_with_parent(number):
    """Have the kernel (Linux) send this process a signal once its parent is gone."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, int(number))  # PR_SET_PDEATHSIG


# <<< shared: arguments

if __name__ == "__main__":
    # Flags are read before the imports below, which take seconds, so that --help and wrong flags answer at once.
    ARGS = parse_args()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while libraries load: the end, without a traceback
    if ("TORCHELASTIC_RUN_ID" if "RANK" in os.environ else "ACCELERATE_DYNAMO_MODE") in os.environ:
        # torchrun may be killed; `accelerate launch` of one process does not pass signals on.
        end_with_parent(signal.SIGTERM)
    print("loading libraries", file=sys.stderr, flush=True)

# >>> shared: data
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # imports warn of parts that are not used here
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # tokenizers run in forked loader processes
for _package in ("xformers", "bitsandbytes"):  # PEFT imports bitsandbytes, which warns of kernels not used here
    logging.getLogger(_package).setLevel(logging.ERROR)
warnings.filterwarnings("ignore", message="The `local_dir_use_symlinks`|Cannot enable progress bars")

import braceexpand
import diffusers
import filelock
import numpy as np
import psutil
import torch
import webdataset as wds
from accelerate import Accelerator, DistributedType, InitProcessGroupKwargs
from accelerate.utils import broadcast_object_list, concatenate, gather_object, send_to_device, slice_tensors
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, LCMScheduler
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.optimization import get_scheduler
from diffusers.training_utils import cast_training_params
from diffusers.utils import convert_unet_state_dict_to_peft, logging as diffusers_logging, make_image_grid
from diffusers.utils.hub_utils import populate_model_card
from huggingface_hub import ModelCard, ModelCardData, auth_check, create_repo, hf_hub_download, upload_folder
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HTTPError, LocalTokenNotFoundError
from huggingface_hub.utils import enable_progress_bars, get_session
from peft import LoraConfig
from peft.tuners import lora
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.other import get_pattern_key
from PIL import ExifTags, Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as load_tensors, load_file, save as tensors_to_bytes
from torch.nn import functional
from tqdm.auto import tqdm
from transformers.utils import logging as transformers_logging

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

# ---- Schedule and consistency mathematics: pure functions of float32 tensors -----------------------------


@dataclass(frozen=True)
class Schedule:
    """The teacher's noise schedule and the solver's grid on it."""

    alphas: torch.Tensor  # [T] f32; alphas^2 + sigmas^2 = 1
    sigmas: torch.Tensor  # [T] f32
    ddim_timesteps: torch.Tensor  # [N] int64, ascending: k-1, 2k-1, ..., Nk-1 (trailing)
    k: int
    prediction_type: str
    timestep_scaling: float

    def at(self, timesteps):
        """Return (alpha_t, sigma_t), each [B,1,1,1], at timesteps [B]."""
        return self.alphas[timesteps].view(-1, 1, 1, 1), self.sigmas[timesteps].view(-1, 1, 1, 1)


def make_schedule(scheduler_config, args, device):
    """Return the Schedule of a diffusers scheduler config, with the solver that the flags describe."""
    scheduler = DDPMScheduler.from_config(scheduler_config)
    prediction_type, num_steps = scheduler.config.prediction_type, args.num_ddim_timesteps
    if prediction_type not in ("epsilon", "v_prediction", "sample"):
        raise UnusableInput(f"teacher: prediction_type {prediction_type!r} is not epsilon, v_prediction or sample")
    alphas_cumprod = scheduler.alphas_cumprod.to(torch.float32)
    # Pure noise at the last timestep: eps gives no clean latent there, and a clean latent no eps.
    is_consistency = args.objective == "consistency"
    if "epsilon" in (prediction_type, is_consistency and args.loss_space) and alphas_cumprod[-1] < 1e-6:
        only = "only v_prediction and sample can be distilled, with --loss_space sample"
        raise UnusableInput(f"teacher: its schedule ends at zero terminal SNR, where {only}")
    k = len(alphas_cumprod) // num_steps
    if k == 0:
        raise UnusableInput(f"--num_ddim_timesteps {num_steps}: the teacher has {len(alphas_cumprod)}")
    if is_consistency and args.phases == 2 and len(alphas_cumprod) != 1000:
        raise UnusableInput(f"--phases 2: the teacher has {len(alphas_cumprod)} timesteps, not 1000; leave it out")
    grid = (torch.arange(1, num_steps + 1) * k - 1).to(device)
    alphas, sigmas = alphas_cumprod.sqrt().to(device), (1 - alphas_cumprod).sqrt().to(device)
    return Schedule(alphas, sigmas, grid, k, prediction_type, args.timestep_scaling_factor)


def add_noise(schedule, latents, eps, timesteps):
    """Return z_t = alpha_t latents + sigma_t eps."""
    alpha_t, sigma_t = schedule.at(timesteps)
    return alpha_t * latents + sigma_t * eps


def clean_estimate(schedule, model_output, z_t, timesteps):
    """Return the (z0, eps) that a UNet's output [B,4,h,w] means at z_t, for eps, v and sample prediction."""
    alpha_t, sigma_t = schedule.at(timesteps)
    if schedule.prediction_type == "epsilon":
        return (z_t - sigma_t * model_output) / alpha_t, model_output
    if schedule.prediction_type == "v_prediction":
        return alpha_t * z_t - sigma_t * model_output, alpha_t * model_output + sigma_t * z_t
    return model_output, (z_t - alpha_t * model_output) / sigma_t


def ddim_step(schedule, z0, eps, prev_timesteps):
    """Return the deterministic DDIM step to prev_timesteps (arXiv:2010.02502, eq. 12, sigma = 0)."""
    return add_noise(schedule, z0, eps, prev_timesteps)


def phase_ends(schedule, timesteps):
    """Return where the student of two phases jumps to from each timestep: 0, the picture, or T / 2 - 1, half way.

    From the second half it is half way (PCM, arXiv:2405.18407), but not from nearly pure noise, where drawing begins.
    """
    half = len(schedule.alphas) // 2
    is_between = (timesteps >= half) & (timesteps < PICTURE_FROM * len(schedule.alphas))
    return is_between * (half - 1)


def jump(schedule, z0, z_t, timesteps, ends):
    """Return the z at which DDIM arrives from z_t with the clean estimate z0."""
    alpha_t, sigma_t = schedule.at(timesteps)
    return ddim_step(schedule, z0, (z_t - alpha_t * z0) / sigma_t, ends)


def boundary_scalings(timesteps, timestep_scaling):
    """Return (c_skip, c_out), each [B,1,1,1]: 1 and 0 at timestep 0 (LCM, sec. 3; as LCMScheduler's)."""
    scaled = timesteps.to(torch.float32).view(-1, 1, 1, 1) * timestep_scaling
    norm = scaled**2 + SIGMA_DATA**2
    return SIGMA_DATA**2 / norm, scaled / norm.sqrt()


def distance(pred, target, loss_type, huber_c):
    """Return the mean squared difference, or the mean pseudo-Huber one (arXiv:2310.14189), over elements."""
    squares = (pred - target).square()
    return squares.mean() if loss_type == "l2" else ((squares + huber_c**2).sqrt() - huber_c).mean()


def loss_between(schedule, pred, target, timesteps, args):
    """Return the distance of clean latents z_0 [B,4,h,w], or of eps = (z_t - alpha z_0) / sigma."""
    if args.loss_space == "epsilon":
        alpha_t, sigma_t = schedule.at(timesteps)
        pred, target = pred * (alpha_t / sigma_t), target * (alpha_t / sigma_t)
    return distance(pred, target, args.loss_type, args.huber_c)


# ---- Data: shards -> samples -> batches ------------------------------------------------------------------

# Pillow's names. An allowlist: some of Pillow's other readers start programs (EPS runs Ghostscript).
Image.init()
PICTURE_FORMATS = [name for name in "JPEG PNG WEBP BMP GIF TIFF PPM JPEG2000 AVIF TGA".split() if name in Image.OPEN]
IMAGE_SUFFIXES = tuple("jpg jpeg png webp jpe jfif bmp gif tif tiff ppm pgm pnm pbm tga jp2 j2k jpx avif".split())
CAPTION_SUFFIXES = ("text", "txt", "caption")  # in the order in which the public LCM scripts look for them
# What a file in a shard is, by its suffix; files of other suffixes are not read.
KINDS = dict.fromkeys(IMAGE_SUFFIXES, "picture") | dict.fromkeys(CAPTION_SUFFIXES, "caption")
KINDS |= {"json": "json", "safetensors": "tensors"}
TAR_NAMES = re.compile(r"\.(tar|tgz|tbz2?|txz|tar\.(gz|bz2|xz))$", re.IGNORECASE)
BLANKS = "\ufeff \t\r\n"  # around captions
CACHE_KEY = "_cache"  # the sample that heads a shard of cached tensors and describes how they were made
# Spellings of LAION's and img2dataset's metadata, in lower case.
METADATA_KEYS = {
    "width": ("original_width", "width"),
    "height": ("original_height", "height"),
    "watermark": ("pwatermark", "watermark", "watermark_score"),
    "unsafe": ("punsafe", "unsafe", "unsafe_score"),
    "aesthetic": ("aesthetic", "aesthetic_score", "aesthetics", "aesthetic_score_laion_v2"),
}
STREAM_ERRORS = (OSError, EOFError, ValueError, tarfile.TarError, zlib.error)  # a shard cannot be read on
SAMPLES_PER_FOLDER_SHARD = 256
Image.MAX_IMAGE_PIXELS = None  # --max_image_pixels is the limit, compared before a picture is decoded
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY  # workflows in PNGs exceed Pillow's 1 MB a text


class SkippedSample(Exception):
    """A sample that is not used; the message is the cause, the same for all samples of that cause."""


class Skipped(Counter):
    """Counts of what was not used, by cause."""

    dead_shards = 0  # so many in a row gave nothing at all


class PictureFolder(NamedTuple):
    """A virtual shard: some samples of a folder of pictures, each with a caption beside it."""

    name: str
    folder: Path
    files: tuple  # names of the files, relative to the folder, those of one sample side by side

    def __str__(self):
        return self.name


def list_shards(values):
    """Return every shard that the values of --train_shards_path_or_url name, after a look at the local ones."""
    flag, shards = "--train_shards_path_or_url", []
    for given in chain.from_iterable(re.split(r"::(?![^\[\]]*\])", value) for value in values):
        value = re.sub(r"(?i)^file:(//localhost(?=/)|//)?(/(?=[a-z]:))?", "", given)
        scheme = value.partition("://")[0].lower() if re.match(r"\w+://", value) else "http"
        if not scheme.startswith("http"):
            reader = {"s3": "aws s3 cp {} -", "gs": "gsutil cat {}"}.get(scheme, "COMMAND {}").format(masked(value))
            raise UnusableInput(f"{flag} {masked(value)}: {scheme}:// is read through a command; give 'pipe:{reader}'")
        try:
            # os.path, because pathlib raises where an address is longer than a file name can be.
            names = [value] if os.path.exists(value) else [*braceexpand.braceexpand(value, os.sep == "/")]
        except ValueError as error:
            raise UnusableInput(f"{flag} {masked(value)}: its braces do not match; mend the pattern") from error
        for name in names:
            if not name.strip():  # as of an unset variable; it would be the current folder
                raise UnusableInput(f"{flag} {' '.join(map(masked, values))}: a part of it is empty; mend it")
            shards += [name] if is_remote(value) else find_local(name)
    kinds, faults = {}, []
    for shard in shards:
        try:
            if not is_remote(shard):
                kinds.setdefault(check_shard(Path(shard)) if isinstance(shard, str) else b"", shard)
        except UnusableInput as error:
            faults.append((shard, error))
    if faults:
        more = "; unusable, too: " * (len(faults) > 1) + ", ".join(masked(shard) for shard, _ in faults[1:20])
        raise UnusableInput(f"{faults[0][1]}{more}" + f" and {len(faults) - 20} more" * (len(faults) > 20))
    if len(kinds) > 1:
        mixed = "cached shards and others" if b"" in kinds else "shards that were cached in different ways"
        raise UnusableInput(f"{flag} mixes {mixed}, such as {' and '.join(map(str, kinds.values()))}; name one kind")
    return shards


def find_local(name):
    """Return the shards that a local path, folder or glob names; the name itself where nothing is there."""
    if os.path.isdir(name):  # pathlib's raises where a folder above may not be entered
        found = list_folder(Path(name))
    else:
        found = [name] if os.path.isfile(name) else sorted(glob.glob(name, recursive=True)) or [name]
    # A file that is there must not be taken for a command or an address because of its name.
    return [os.path.join(".", path) if is_remote(path) else path for path in found]


def list_folder(folder):
    """Return the tars in a folder, or else its pictures as virtual shards."""
    tars = sorted(str(path) for path in folder.glob("[!.]*") if TAR_NAMES.search(path.name))
    if tars:
        # Not all that is below: the names alone of a million files may take minutes.
        names = [path.name for path in islice(chain(folder.glob("[!.]*.*"), folder.glob("[!.]*/[!.]*.*")), 10_000)]
        if number := sum(split_name(name)[1] in IMAGE_SUFFIXES for name in names):
            tqdm.write(f"{folder}: {number} pictures beside its tars are not read", file=sys.stderr)
        if (number := sum(bool(TAR_NAMES.search(name)) for name in names) - len(tars)) > 0:
            tqdm.write(f"{folder}: {number} tars in its folders are not read; name those, too", file=sys.stderr)
        return tars
    samples, unread, faults = {}, Counter(), []
    for path in sorted(files_below(folder, faults.append)):
        name = path.relative_to(folder).as_posix()
        key, suffix = split_name(name)
        if suffix:
            samples.setdefault(key, []).append(name)
        else:
            is_tar = TAR_NAMES.search(path.name)
            unread[is_tar[0].lower() if is_tar else path.suffix.lower() or path.name] += 1
    unread |= Counter(f"folder {error.filename} ({error.strerror})" for error in faults)
    keys = [key for key, names in samples.items() if any(split_name(name)[1] in IMAGE_SUFFIXES for name in names)]
    unread["text without a picture"] += len(samples) - len(keys)
    if not keys:
        lack = f"holds no .tar file and no picture, but {describe(unread) or 'nothing'}; name one that does"
        other = "; convert pictures to PNG or JPEG, and read tables by scripts/make_shards.py"
        lack += ", as the folders of its tars" if any(map(TAR_NAMES.search, unread)) else other
        raise UnusableInput(f"--train_shards_path_or_url {folder}: {lack}")
    if +unread:
        tqdm.write(f"{folder}: files that are not read: {describe(unread)}", file=sys.stderr)
    parts = (keys[start : start + SAMPLES_PER_FOLDER_SHARD] for start in range(0, len(keys), SAMPLES_PER_FOLDER_SHARD))
    return [
        PictureFolder(f"{folder} ({part[0]} to {part[-1]})", folder, tuple(chain(*map(samples.get, part))))
        for part in parts
    ]


def files_below(folder, onerror):
    """Yield the files below a folder but hidden ones; linked folders come last, each once, so that a loop ends."""
    waiting, seen = [folder], set()
    while waiting:
        for parent, folders, names in os.walk(waiting.pop(0), onerror=onerror):
            if (real := os.path.realpath(parent)) in seen:
                folders.clear()
                continue
            seen.add(real)
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            waiting += [Path(parent, name) for name in folders if os.path.islink(Path(parent, name))]
            paths = (Path(parent, name) for name in names if not name.startswith("."))
            # One that is not there, as at a link's end, is counted when it is read; a pipe would be waited for.
            yield from (path for path in paths if os.path.isfile(path) or not os.path.exists(path))


def check_shard(path):
    """Raise UnusableInput for a broken local shard; return how one of cached tensors was made, b"" for another."""
    fault, made, place = "", b"", masked(str(path))
    if os.path.exists(path) and not os.path.isfile(path):  # opening a FIFO would wait for ever
        raise UnusableInput(f"shard {place}: is no regular file; name a tar, or give 'pipe:cat {place}' for a stream")
    try:
        with path.open("rb") as file:
            head, size = file.read(512), path.stat().st_size
            if head.startswith(f"{CACHE_KEY}.json\0".encode()):
                made = file.read(tarfile.TarInfo.frombuf(head, "utf-8", "replace").size)
            file.seek(max(0, size - 1024))
            tail = file.read()
        if path.suffix == ".txt":
            fault = "" if path.read_text("utf-8-sig").strip() else "holds no prompts"
        elif not head.strip(b"\0"):
            fault = "is empty"
        elif head.startswith(b"\x28\xb5\x2f\xfd"):
            fault = f"is compressed by zstd; give 'pipe:zstd -dc {place}'"
        elif not head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ")):  # of a compressed one only reading can tell
            tarfile.TarInfo.frombuf(head, "utf-8", "replace")
            fault = "is truncated, its end mark is missing" if size % 512 or tail.strip(b"\0") else ""
    except tarfile.HeaderError:
        fault = "is not a tar file; give pictures as their folder, prompts as .txt, a table to scripts/make_shards.py"
    except UnicodeDecodeError:
        fault = "is not UTF-8"
    except OSError as error:
        hub = "; of a data set of the Hub scripts/make_shards.py --dataset_name NAME makes shards"
        hub *= bool(re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", place))
        raise UnusableInput(f"data {place}: {error.strerror}; name shards or a folder of pictures{hub}") from error
    if fault:
        raise UnusableInput(f"shard {place}: {fault}; write or download it again, or leave it out")
    return made if b'"family"' in made else b""  # else of a picture called _cache


def read_shard(shard, skipped, attempts=READ_ATTEMPTS, cache=None):
    """Yield a shard's samples, undecoded: {"__key__", "__url__", suffix: bytes, or the path of a folder's picture}.

    A broken shard is read again, up to `attempts` times in which no sample is new, then counted in `skipped` and
    left. Where `cache` is the head of the first shard of a cache, shards cached in another way are counted and left.
    """
    done, failures, name = 0, 0, masked(str(shard))
    while failures < attempts:
        time.sleep(failures if done or not is_remote(shard) else 5 * failures**2)  # 0, 5 and 20 s where nothing came
        lost, before = Counter(), done
        try:
            for sample in islice(group_members(shard_members(shard, lost), lost), done, None):
                done += 1
                if cache is None or sample["__key__"] != CACHE_KEY:
                    yield sample | {"__url__": "" if isinstance(shard, PictureFolder) else name}
                elif cache["json"] != sample.get("json"):
                    skipped[f"shard {name} was cached in another way than the first one"] += 1
                    return
            skipped.update(lost)
            skipped.dead_shards = 0
            return
        except STREAM_ERRORS as error:
            cause = f"{type(error).__name__}: {error.args[-1] if error.args else error}"
            failures = 1 if done > before else failures + 1
    skipped[f"shard {name} broke off ({cause})"] += 1
    skipped.dead_shards = 0 if done else skipped.dead_shards + 1  # the network or the disk, not one file
    if skipped.dead_shards >= (DEAD_SHARDS if attempts > 1 else DEAD_SHARDS_AT_START):
        found = f"{skipped.dead_shards} shards in a row cannot be read; the last: {name} ({cause})"
        raise UnusableInput(f"{found}; check the address or command, the network or disk, and the permissions")


class Member(tarfile.TarInfo):
    """A member of `Tars`: tarfile takes any odd header for the end."""

    @classmethod
    def fromtarfile(cls, tars):
        try:
            member = super().fromtarfile(tars)
        except (tarfile.HeaderError, EOFError) as error:  # EOFError: of what follows a stream of bzip2 or xz
            tars.has_ended |= isinstance(error, tarfile.EOFHeaderError)
            if not tars.has_ended:
                raise tarfile.ReadError(f"ends before its end mark: {error}") from error
            tars.has_junk |= isinstance(error, (tarfile.InvalidHeaderError, EOFError))
            if isinstance(error, EOFError):
                raise tarfile.EmptyHeaderError from error
            raise
        tars.has_ended = False
        return member


class Tars(tarfile.TarFile):
    """A tar that must end in its end mark, or several that follow each other, as in `cat a.tar b.tar`."""

    tarinfo, ignore_zeros = Member, True
    has_ended = False  # with zeros, behind which another one may begin
    has_junk = False  # behind an end mark


def shard_members(shard, lost=None):
    """Yield (name, bytes, or the path of a folder's picture) of a shard's data; count in `lost` what is left out."""
    lost = Counter() if lost is None else lost
    if isinstance(shard, PictureFolder):
        for name in shard.files:
            path = shard.folder / name
            # Pictures are read when their turn comes: a thousand of a camera, shuffled, would fill the memory.
            with suppress(OSError):  # a caption that has gone is counted as such, its sample alone
                yield name, str(path) if KINDS[split_name(name)[1]] == "picture" else path.read_bytes()
    elif shard.endswith(".txt") and not is_remote(shard):  # prompts
        lines = enumerate(Path(shard).read_text("utf-8-sig").split("\n"))  # not at U+2028, which a prompt may hold
        yield from ((f"{number}.txt", line.encode()) for number, line in lines if line.strip())
    else:
        with open_shard(shard) as packed, Tars.open(fileobj=(stream := unzipped(packed)), mode="r|*") as tar:
            for member in tar:
                tar.members.clear()  # else tarfile keeps one for each file, of a tar of a million samples 2 GB
                if member.issparse():  # its few bytes may stand for terabytes
                    raise tarfile.ReadError("sparse files are not read; pack without --sparse")
                if member.type in (tarfile.SYMTYPE, tarfile.LNKTYPE) and split_name(member.name)[1]:
                    lost["link in a tar; pack with tar --dereference --hard-dereference"] += 1
                if member.isreg() and split_name(member.name)[1]:
                    yield member.name, tar.extractfile(member).read()
            if tar.has_junk or stream.has_junk:
                lost["bytes behind an end mark that are no tar"] += 1


class Peeked:
    """A stream of which the first bytes, `head`, have been read already."""

    has_junk = False

    def __init__(self, head, stream):
        self.head, self.stream = head, stream

    def read(self, size):
        part, self.head = self.head[:size], self.head[size:]
        return part + self.stream.read(size - len(part)) if len(part) < size else part


class Unzipped(gzip.GzipFile):
    """What gzip has packed, in one part or several; tarfile itself would end with the first."""

    has_junk = False  # behind its end, which the program gzip leaves out, too

    def read(self, size):
        try:
            return self.read1(size)  # `read` would lose what comes before a fault
        except gzip.BadGzipFile as error:
            self.has_junk = "Not a gzipped" in str(error)
            if self.has_junk:
                return b""
            raise


def unzipped(stream):
    whole = Peeked(head := stream.read(2), stream)
    return Unzipped(fileobj=whole) if head == b"\x1f\x8b" else whole


class CommandOutput:
    """The output of a command, as a stream whose reads end with an error where the command stalls or fails."""

    def __init__(self, process, shard, words):
        self.process, self.shard, self.words = process, shard, words

    def read(self, size):
        data = b""
        while len(data) < min(size, tarfile.BLOCKSIZE):  # tarfile tells compression by what one read gives
            if os.name == "posix" and not multiprocessing.connection.wait([self.process.stdout], COMMAND_STALL_S):
                raise OSError(f"the command sent nothing for {COMMAND_STALL_S} s")
            if not (part := self.process.stdout.read(size - len(data))):
                break
            data += part
        if not data:
            self.check(COMMAND_STALL_S)
        return data

    def check(self, seconds):
        """Raise OSError where the command fails within that time, or does not end although its output has."""
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired as error:
            raise OSError("the command does not end") from error
        if code:
            self.words.seek(0)
            reason = last_words(self.words.read().decode("utf-8", "replace"), self.shard)
            raise OSError(f"the command ended with exit code {code}: {reason}".rstrip(": "))


@contextmanager
def open_shard(shard):
    """Yield the byte stream of a shard: a file, or the output of a command (curl for http)."""
    if not is_remote(shard):
        with open(shard, "rb") as stream:
            yield stream
        return
    # curl gives up a server that stalls.
    limits = f"--connect-timeout {STALL_S} --speed-limit 1000 --speed-time {STALL_S}"
    quoted = shlex.quote(shard) if os.name == "posix" else f'"{shard}"'  # the quotes of cmd.exe
    curl = f"curl --fail --silent --show-error --location {limits} {quoted}"
    command = shard.removeprefix("pipe:") if shard.startswith("pipe:") else curl
    options = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "bufsize": 0}
    if os.name == "posix":  # a group, so that all of the command can be killed, here or once this process is gone
        options["process_group"] = 0
        command = f"(while kill -0 {os.getpid()}; do sleep 1; done; kill -9 0) >/dev/null 2>&1 &\n{command}"
    with tempfile.TemporaryFile() as words, subprocess.Popen(command, shell=True, stderr=words, **options) as process:
        output = CommandOutput(process, shard, words)
        try:
            yield output
            while output.read(2**20):
                pass  # a command whose output nobody reads would fail
        except STREAM_ERRORS:
            with suppress(subprocess.TimeoutExpired):  # a command that runs on is not what made the tar bad
                process.wait(1)
                output.check(0)
            raise
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL) if os.name == "posix" else process.kill()


def last_words(text, shard):
    """Return the end of a command's error output as one line, without what may be secret words of the command."""
    pattern = r"([=:@]|(?:^|\s)-\S+\s+)?['\"]?([^\s'\"=:&?@]+)"
    shown = {word for _, word in re.findall(pattern, masked(shard))}
    found = [pair for pair in re.findall(pattern, shard) if len(pair[1]) > 3]
    words = {word for lead, word in found if lead or not re.fullmatch("[a-z]+", word)}
    text = masked(" ".join(text.split()))
    for word in sorted(words - shown, key=len, reverse=True):
        text = text.replace(word, "***")
    return text[-200:]


def split_name(name):
    """Return (key, suffix) of a file in a shard; a suffix of "" for a file that is not read."""
    folder, _, base = name.removeprefix("./").rpartition("/")
    stem, _, suffix = base.rpartition(".")
    if suffix.lower() not in KINDS or base.startswith("."):
        return name, ""
    if stem.rpartition(".")[2].lower() in IMAGE_SUFFIXES:
        stem = stem.rpartition(".")[0]  # a.jpg.txt beside a.jpg
    return f"{folder}/{stem}" if folder else stem, suffix.lower()


def group_members(members, lost):
    """Yield samples {"__key__", suffix: bytes} of (name, bytes) pairs, counting in `lost` what belongs to none.

    A sample whose files are neighbours, as they usually are, is given away when the next one begins, if it has
    a caption, something to train on, and each kind of file that the shard has had so far. Any other waits for
    its rest until the end of the shard or until WAITING_BYTES wait.
    """
    waiting, given, kinds, held, last, is_new = {}, {}, set(), 0, None, False

    def give(key):
        nonlocal held
        sample = waiting.pop(key)
        held -= sum(map(len, sample.values()))
        given[key] = frozenset(sample)
        if (number := sum(KINDS[suffix] == "picture" for suffix in sample)) > 1:
            lost["second picture of a sample, such as a.png beside a.jpg"] += number - 1
        # K.mask.png beside K.png belongs to K and is no sample of its own.
        parents = accumulate(key.split(".")[:-1], "{}.{}".format)
        is_extra = len(sample) == 1 and any(parent in given or parent in waiting for parent in parents)
        return [] if is_extra else [{"__key__": key} | sample]

    for name, data in members:
        key, suffix = split_name(name)
        if key != last and not key.startswith(f"{last}."):
            found = {KINDS[suffix] for suffix in waiting.get(last, ())} if is_new else set()
            if found >= kinds and found & {"caption", "json"} and found & {"picture", "tensors"}:
                yield from give(last)
            last, is_new = key, key not in waiting
        kinds.add(KINDS[suffix])
        if suffix in given.get(key, ()) or suffix in waiting.get(key, ()):
            lost["file name twice in its shard"] += 1
        elif key in given:
            lost["file far from the rest of its sample; pack with tar --sort=name"] += 1
        else:
            waiting.setdefault(key, {})[suffix] = data
            held += len(data)
        while held > WAITING_BYTES and len(waiting) > 1:
            yield from give(next(iter(waiting)))
    for key in list(waiting):
        yield from give(key)


def metadata_of(sample):
    """Return a json's "caption", "side" in px and fields of METADATA_KEYS: floats, None for what is no number."""
    try:
        fields = json.loads(sample.get("json", b"{}")).items()  # of a name in two spellings the filled one counts
        fields = sorted(fields, key=lambda item: item[1] not in (None, []) and bool(str(item[1]).strip()))
        record = {name.lower(): value for name, value in fields}
    except (ValueError, AttributeError, RecursionError) as error:
        raise SkippedSample("json cannot be read") from error
    found = {}
    for name, spellings in METADATA_KEYS.items():
        for value in (record[spelling] for spelling in spellings if record.get(spelling) not in (None, "")):
            found.setdefault(name, as_number(value))
    captions = (record.get(name) for name in ("caption", "prompt", "text"))
    texts = chain.from_iterable(value if isinstance(value, list) else [value] for value in captions)
    found["caption"] = max((text for text in texts if isinstance(text, str)), key=is_filled, default=None)
    if None not in (found.get("width"), found.get("height")):
        found["side"] = min(found["width"], found["height"])
    return found


def as_number(value):
    """Return a finite number, also one that json holds as text, as a float; None for anything else."""
    with suppress(ValueError, TypeError, OverflowError):
        return float(value) if not isinstance(value, bool) and math.isfinite(float(value)) else None


def check_metadata(metadata, args):
    rules = (
        ("smaller side", "side", args.min_image_side_px or None, operator.ge),
        ("watermark", "watermark", args.max_watermark, operator.le),
        ("unsafe", "unsafe", args.max_unsafe, operator.le),
        ("aesthetic score", "aesthetic", args.min_aesthetic, operator.ge),
    )
    for name, field_name, limit, passes in rules:
        if limit is None:
            continue
        value = metadata.get(field_name)
        if value is None and field_name in metadata:
            raise SkippedSample(f"{name} in the metadata is no number")
        if value is None and args.require_metadata:
            raise SkippedSample(f"no {name} in the metadata")
        if value is not None and not passes(value, limit):
            raise SkippedSample(f"filtered by {name}")


def caption_of(sample, metadata):
    """Return a sample's caption: that of its caption file, or the one in its json; the first that is not empty."""
    captions = (*map(sample.get, CAPTION_SUFFIXES), metadata.get("caption"))
    caption = max((text for text in captions if text is not None), key=is_filled, default=None)
    if caption is None:
        raise SkippedSample("no caption")
    try:
        caption = caption.decode() if isinstance(caption, bytes) else caption
        caption.encode()  # json can hold half a character
        return caption[:MAX_CAPTION].strip(BLANKS)
    except UnicodeError as error:
        raise SkippedSample("caption is not UTF-8") from error


def is_filled(text):
    return bool(text.strip(BLANKS if isinstance(text, str) else BLANKS.encode()))


def encoded(picture):
    """Return the bytes of a sample's picture, which in a folder is a path."""
    try:
        return Path(picture).read_bytes() if isinstance(picture, str) else picture
    except OSError as error:
        raise SkippedSample("picture cannot be read") from error


def open_picture(picture, max_pixels, draft_px=None, background="white"):
    """Return (upright RGB picture, original (width, height)) of encoded bytes or a path, or raise SkippedSample."""
    data = encoded(picture)
    try:
        picture = Image.open(io.BytesIO(data), formats=PICTURE_FORMATS)
        if picture.width * picture.height > max_pixels:
            raise SkippedSample("picture over --max_image_pixels")
        is_turned = False
        with suppress(Exception):  # what is called EXIF may be none
            # Pictures stored on their side; Pillow gives the size of a TIFF upright already.
            is_turned = picture.format != "TIFF" and picture.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
        original = picture.size[::-1] if is_turned else picture.size
        if draft_px:  # a JPEG is decoded at 1/2, 1/4 or 1/8 of its size, where no side becomes smaller than that
            picture.draft("RGB", (draft_px, draft_px))
        picture.load()
        for name in ("exif", "Raw profile type exif"):
            picture.info.pop(name, None)  # Pillow would write it anew, and fail at a tag of a wrong type
        ImageOps.exif_transpose(picture, in_place=True)
        return to_rgb(picture, background), original
    except SkippedSample:
        raise
    except Exception as error:  # Pillow's decoders raise almost anything on damaged files
        is_heic = re.match(rb"....ftyp(hei|hev|mif1|msf1)", data, re.DOTALL)  # as phones name .jpg
        cause = "picture is HEIC, whatever its name" if is_heic else "picture cannot be decoded"
        raise SkippedSample(cause) from error


def to_rgb(picture, background="white"):
    """Return a picture of any mode as RGB: 16-bit scaled to 8, transparency laid on a background."""
    if picture.mode.startswith(("I", "F")):
        values = np.nan_to_num(np.asarray(picture, np.float32), posinf=0, neginf=0)
        top = values.max(initial=0)
        if picture.mode == "F":  # [0, 1], [0, 255] or [0, 65535], with room for what sharpening adds
            is_dark = np.quantile(values, 0.9) <= 1 and (values % 1).any()  # or [0, 1] and lamps
            if 2 < top <= 20 or (top > 2 and is_dark):
                raise SkippedSample("float picture whose range cannot be told")
            values = values * (255 if top <= 2 else 1 if top <= 510 else 1 / 257)
        elif picture.mode != "I" or top > 255:
            values = values / 257
        picture = Image.fromarray(values.round().clip(0, 255).astype(np.uint8))
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, background), picture)
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def crop(picture, args, rng):
    """Return (pixels, array uint8 [R,R,3], (top, left) of the crop in the resized picture)."""
    side, (width, height) = args.resolution, picture.size
    scale = side / min(width, height)
    size = tuple(max(side, round(length * scale)) for length in (width, height))
    spare = (size[1] - side, size[0] - side)
    top, left = (n // 2 for n in spare) if args.center_crop else (rng.randint(0, n) for n in spare)
    x, y = width / size[0], height / size[1]
    box = (left * x, top * y, min((left + side) * x, width), min((top + side) * y, height))
    method = Image.Resampling[args.interpolation_type.removesuffix("_exact").upper()]
    picture = picture.resize((side, side), method, box)  # only the part that is kept: a strip would grow without bound
    if args.random_flip and rng.random() < 0.5:
        picture, left = ImageOps.mirror(picture), spare[1] - left
    return np.array(picture), (top, left)


def prepare_sample(sample, args, epoch, cached=False):
    """Return an undecoded sample as a training sample; its crop is a function of (seed, epoch, shard, key)."""
    image = next((sample[suffix] for suffix in IMAGE_SUFFIXES if suffix in sample), None)
    is_matching, whole = getattr(args, "objective", None) == "matching", (args.resolution, args.resolution)
    if image is None and not cached and not is_matching:
        raise SkippedSample("no picture")
    metadata = metadata_of(sample)
    unmeasured = {} if cached else {"side": math.inf}  # where the metadata lacks it, the picture tells below
    check_metadata(unmeasured | metadata, args)
    caption = caption_of(sample, metadata)
    if is_matching:  # takes captions alone; size and crop are those that a pipeline draws with
        tensors = cached_tensors(sample) if cached else {}
        return tensors | {"caption": caption} | size_and_crop(whole, (0, 0), whole, args)
    if cached:
        return cached_tensors(sample) | {"caption": caption}
    picture, original = open_picture(image, args.max_image_pixels, args.resolution)
    check_metadata({"side": min(original)} | metadata, args)
    # The shard's own name alone, of a folder none: who resumes may spell its path in another way.
    shard = re.split(r"[/\\]", sample["__url__"])[-1]
    key = f"{args.seed} {epoch} {shard} {sample['__key__']}"
    rng = random.Random(key.encode(errors="surrogateescape"))  # names of old zips are not UTF-8
    pixels, corner = crop(picture, args, rng)
    inputs = size_and_crop(original[::-1], corner, pixels.shape[:2], args)
    return {"pixels": pixels, "caption": caption, "is_enlarged": min(original) < args.resolution} | inputs


def cached_tensors(sample):
    """Return moments [2C,h,w], embeddings, and for SDXL time ids [6]."""
    try:
        tensors = load_tensors(sample["safetensors"])
    except KeyError:
        raise SkippedSample("no cached tensors") from None
    except SafetensorError as error:
        raise SkippedSample("cached tensors cannot be read") from error
    if not are_whole(tensors, CACHED_TENSORS):
        raise SkippedSample("cached tensors are incomplete or not finite")
    return tensors


def are_whole(tensors, names):
    is_number = (value.is_floating_point() and value.isfinite().all() for value in tensors.values())
    return tensors.keys() == names and all(is_number)


class ShardStream(torch.utils.data.IterableDataset):
    """Endless batches of training samples, each once in every consumer's pass over its part, which is an epoch.

    The stream is divided among `consumers` = processes x workers. An epoch's shards, in an order drawn from
    (seed, epoch), lie end to end, and consumer c reads the c-th of as many equal parts. Four shards and three
    consumers:

        shards     |  3   3   3 |  0   0   0 |  2   2   2 |  1   1   1 |     each cut into 3 parts
        consumers  |  a   a   a    a |  b   b    b   b |  c    c   c   c |   each gets 4 of them

    A shard that two consumers share is read by both, sample by sample in turns; so one shard serves any number.
    A consumer whose part holds fewer samples begins its next epoch earlier.
    """

    def __init__(self, shards, args, consumers, first_consumer, workers, tokenizers=(), cache=None):
        self.shards, self.args, self.tokenizers = shards, args, tokenizers
        self.cache = cache  # the head of shards that hold cached tensors, None for pictures
        self.consumers, self.first_consumer, self.workers = consumers, first_consumer, workers
        # Where a resumed run goes on: after so many batches of this process, from these (epoch, samples read in it).
        self.start_batch, self.start_positions = 0, {}

    def raw_samples(self, epoch, consumer, skipped):
        order = list(range(len(self.shards)))
        random.Random(f"{self.args.seed} {epoch}").shuffle(order)
        parts_per_shard = self.consumers // math.gcd(self.consumers, len(order))
        parts_per_consumer = len(order) * parts_per_shard // self.consumers
        parts = range(consumer * parts_per_consumer, (consumer + 1) * parts_per_consumer)
        for shard, of_shard in groupby(parts, lambda part: order[part // parts_per_shard]):
            mine = {part % parts_per_shard for part in of_shard}
            for number, sample in enumerate(read_shard(self.shards[shard], skipped, cache=self.cache)):
                if (number + epoch) % parts_per_shard in mine:  # in turn: of few samples some parts are larger
                    if self.args.objective == "matching":  # pictures would fill the buffer, and nothing reads them
                        sample = {name: value for name, value in sample.items() if name not in IMAGE_SUFFIXES}
                    yield sample

    def __iter__(self):
        """Yield batches: pixels uint8 [B,R,R,3] and token ids, or cached tensors; captions; the position; skips."""
        info = torch.utils.data.get_worker_info()
        # The DataLoader begins with its worker 0, which takes the part of the worker whose turn is next.
        worker = ((info.id if info else 0) + self.start_batch) % self.workers
        consumer = self.first_consumer + worker
        epoch, start = self.start_positions.get(str(consumer), (0, 0))
        skipped, batch, empty, limit = Skipped(), [], 0, EMPTY_EPOCHS  # `empty`: epochs since a usable sample
        if 1 < len(self.shards) < 10 * self.consumers:  # a bad or short one may be all that this one has in an epoch
            limit *= 2 * min(len(self.shards), self.consumers)
        while True:
            empty += start == 0  # before the start of a resumed epoch there was one
            buffer = self.args.shuffle_buffer_samples
            rng = random.Random(f"{self.args.seed} {epoch} {consumer}")
            shuffled = wds.shuffle(buffer, initial=buffer, rng=rng)(self.raw_samples(epoch, consumer, skipped))
            try:
                if start:
                    next(islice(shuffled, start - 1, None), None)  # to where the checkpoint was,
                    skipped.clear()  # whose counts hold what is read once more
                number = start
                for number, raw in enumerate(shuffled, start + 1):
                    try:
                        batch.append(prepare_sample(raw, self.args, epoch, self.cache is not None))
                    except SkippedSample as cause:
                        skipped[str(cause)] += 1
                        continue
                    empty = 0
                    if len(batch) == self.args.train_batch_size:
                        yield self.collate(batch) | {"position": (consumer, epoch, number), "skipped": dict(skipped)}
                        skipped.clear()
                        batch = []
                if empty == limit or (len(self.shards) == 1 and not epoch and not number and not skipped):
                    causes = describe(skipped) or "fewer samples than processes x loader workers; use fewer of them"
                    found = f"gave a loader process no usable sample in {empty} epoch{'s' * (empty > 1)}"
                    raise UnusableInput(f"--train_shards_path_or_url {found}: {causes}")
            except UnusableInput as error:  # as data, because an exception loses its type between processes
                yield {"error": str(error)}
                return
            epoch, start = epoch + 1, 0

    def collate(self, samples):
        batch = torch.utils.data.default_collate(samples)
        if not self.cache:
            batch["ids"] = tokenize(self.tokenizers, batch["caption"])
        if torch.utils.data.get_worker_info():  # a lack of room raises here; in the queue's thread the run would wait
            for value in (*batch.values(), *batch.get("ids", ())):
                if isinstance(value, torch.Tensor):
                    value.share_memory_()
        return batch


def tokenize(tokenizers, captions):
    """Return token ids, a tensor [B,L] for each tokenizer, of captions padded or cut to its length."""
    options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    return [each(captions, max_length=each.model_max_length, **options).input_ids for each in tokenizers]


def describe(skipped, first=()):
    """Return counts by cause as one line, the 20 most frequent first, with the name of a sample where it is known."""
    counts = +Counter(skipped)
    names = {cause: f" (such as {one_line(name)[:80]})" for cause, name in dict(first).items()}
    found = masked(", ".join(f"{cause}: {count}{names.get(cause, '')}" for cause, count in counts.most_common(20)))
    return found + f", and {len(counts) - 20} causes more" * (len(counts) > 20)


def audit(shards, args):
    """Return (usable samples, report line, head of the cache or None) after reading the first samples."""
    skipped, usable, examined, cache, known, first = Skipped(), [], 0, None, set(), {}
    samples = (sample for shard in shards for sample in read_shard(shard, skipped, attempts=1, cache=cache))
    for sample in islice(samples, AUDIT_SAMPLES):
        if sample["__key__"] == CACHE_KEY and not sample.keys() & {*IMAGE_SUFFIXES}:
            if usable:  # of remote shards; local ones were looked at before
                raise UnusableInput("--train_shards_path_or_url mixes pictures with cached shards; name one kind")
            cache = sample  # `samples` is lazy: from here it leaves out the shards of other caches
            check_cache(cache, args)
            continue
        examined += 1
        try:
            known |= metadata_of(sample).keys()
            usable.append(prepare_sample(sample, args, epoch=0, cached=cache is not None))
            usable[-1].pop("pixels", None)  # other processes need only captions and their embeddings
        except SkippedSample as cause:
            skipped[str(cause)] += 1
            first.setdefault(str(cause), sample["__key__"])
        if len(usable) == AUDIT_USABLE_SAMPLES and (cache or not args.dry_run):
            break
    if not usable:
        raise UnusableInput(
            f"none of the first {examined} samples of --train_shards_path_or_url can be used "
            f"({describe(skipped, first) or 'no samples'}); shards and folders hold KEY.jpg|png|webp with KEY.txt or "
            "a caption in KEY.json; loosen the filters, mend the data, or take captions from a table (or one for all, "
            "--default_caption): python scripts/make_shards.py --source FOLDER_OR_TABLE --output_dir shards"
        )
    skipped["pictures smaller than --resolution, enlarged"] = sum(s.get("is_enlarged", False) for s in usable)
    skipped["captions that are empty"] = sum(not sample["caption"] for sample in usable)
    kind = "of cached tensors" if cache else "of pictures in folders" if isinstance(shards[0], PictureFolder) else ""
    number = f"{len(shards)} shard{'s' * (len(shards) > 1)} {kind}".strip()
    report = f"{number}; of the first {examined} samples {len(usable)} can be used ({describe(skipped, first)})"
    report = report.removesuffix(" ()")
    for flag in ("max_watermark", "max_unsafe", "min_aesthetic"):
        if getattr(args, flag) is not None and flag[4:] not in known:
            cause = f"no sample that was read has a number for {flag[4:]}; --require_metadata leaves those out"
            report += f"\nwarning: --{flag} filters nothing, because {cause}"
    return usable, report, cache


def check_cache(cache, args):
    remedy = "make it again with scripts/cache_latents.py, or train on the pictures"
    try:
        head, uncond_embeds = json.loads(cache["json"]), load_tensors(cache["safetensors"])
        is_whole = are_whole(uncond_embeds, CACHED_TENSORS - {"moments", "time_ids"}) and head["scaling_factor"] > 0
    except (KeyError, ValueError, TypeError, SafetensorError) as error:
        raise UnusableInput(f"the cache's head cannot be read ({error}); {remedy}") from error
    identity = cache_identity(args)
    if changed := differences({name: head.get(name) for name in identity}, identity):
        raise UnusableInput(f"the cache was made for another run ({changed}); {remedy}")
    if not is_whole:
        raise UnusableInput(f"the cache's head is damaged; {remedy}")


def differences(old, new):
    """Return "NAME was OLD, is NEW; ..." for what differs between two dicts."""
    names = [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
    # Version 0.2.0's checksums have no middle.
    names = [name for name in names if re.sub(r", \w+ of their middle$", "", str(new.get(name))) != old.get(name)]
    return "; ".join(f"{name} was {old.get(name)!r}, is {new.get(name)!r}" for name in names)


def cache_identity(args):
    """Return what the tensors of a cache depend on, by flag; local models count by their `fingerprint`."""
    flags = "pretrained_teacher_model teacher_revision pretrained_vae_model_name_or_path resolution".split()
    flags += "interpolation_type center_crop random_flip use_fix_crop_and_size".split()
    identity = {"family": FAMILY} | {name: getattr(args, name) for name in flags if name not in FLAGS_WITHOUT_EFFECT}
    for name, value in identity.items():
        if name.startswith("pretrained") and value and Path(value).exists():
            identity[name] = fingerprint(Path(value))
        elif isinstance(value, str):
            identity[name] = masked(value)
    return identity


def fingerprint(model, names=("vae*", "text_encoder*", "tokenizer*")):
    """Return checksums of a model file or of parts of a folder: of sizes and ends, and of 64 MiB between them."""
    parts = [path for name in names for path in model.glob(name)] or [model]
    paths = chain(*([part] if part.is_file() else files_below(part, None) for part in parts))
    files, ends, middle = sorted(path for path in paths if path.is_file()), 0, 0
    for path in files:
        size, name = path.stat().st_size, "" if path == model else path.relative_to(model).as_posix()
        with path.open("rb") as file:
            head = file.read(2**20)
            for place in range(2**20, size, max(2**20, size // 64)):  # where a LoRA that is merged in changes it
                file.seek(place)
                middle = zlib.crc32(file.read(2**20), middle)
            file.seek(max(0, size - 2**20))
            ends = zlib.crc32(f"{name} {size}".encode() + head + file.read(), ends)
    return f"crc32 {ends:08x} of {len(files)} files, {middle:08x} of their middle"


def data_checksum(shards):
    """Return a checksum of names and sizes of local shards and pictures; None where one is remote."""
    if any(map(is_remote, shards)):
        return None
    files = []
    for shard in shards:
        _, folder, names = shard if isinstance(shard, PictureFolder) else ("", Path(shard).parent, [Path(shard).name])
        files += [(name, size_of(folder / name)) for name in names]
    return f"crc32 {zlib.crc32(json.dumps(files).encode()):08x} of {len(files)} files"


def size_of(path):
    return os.path.getsize(path) if os.path.exists(path) else None


def count_samples(shards, reads=False):
    """Return how many samples local shards hold, by stats files, folders, or a reading; None if one does not tell."""
    total = 0
    if any(map(is_remote, shards)):
        return None
    for shard in shards:
        if isinstance(shard, PictureFolder):
            total += len({split_name(name)[0] for name in shard.files})
            continue
        try:
            record = json.loads(Path(TAR_NAMES.sub("", shard) + "_stats.json").read_text(encoding="utf-8"))
            total += int(record.get("samples", record.get("successes")))
        except (OSError, ValueError, TypeError, AttributeError):
            if not reads:
                return None
            try:
                total += len({split_name(name)[0] for name, _ in shard_members(shard)} - {CACHE_KEY})
            except STREAM_ERRORS as error:
                fault = f"shard {masked(shard)}: {one_line(error)}"
                raise UnusableInput(f"{fault}; write or download it again, or give --max_train_samples") from error
    return total


def make_loader(stream, num_workers, device):
    options = {"worker_init_fn": start_worker, "pin_memory": device.type == "cuda"}
    options["multiprocessing_context"] = "fork" if num_workers and sys.platform == "linux" else None
    return torch.utils.data.DataLoader(stream, batch_size=None, num_workers=num_workers, **options)


def start_worker(_worker):
    """Let a loader process outlive the signals that ask the run to save and stop, and end with the run."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    end_with_parent(9)  # SIGKILL, a name that Windows does not have
    if (parent := multiprocessing.parent_process()) and parent.pid != os.getppid():  # it ended before the line above
        os._exit(1)
    # A run that stops closes the connection on which a batch is handed over: multiprocessing would print a traceback.
    shown = sys.excepthook
    sys.excepthook = lambda kind, *rest: issubclass(kind, (ConnectionError, EOFError)) or shown(kind, *rest)


# <<< shared: data

# ---- Models: teacher, student, conditioning --------------------------------------------------------------


def load_pipeline(args, dtype, **options):
    """Return the teacher's pipeline in the compute dtype, with a VAE that does not overflow in it."""
    place = {"revision": args.teacher_revision, "cache_dir": args.cache_dir}
    options |= {"add_watermarker": False, "feature_extractor": None, "image_encoder": None}
    options |= {"dtype": dtype, "cache_dir": args.cache_dir}
    teacher = args.pretrained_teacher_model
    if teacher.startswith(("http://", "https://")) or Path(teacher).is_file():
        pipe = diffusers.StableDiffusionXLPipeline.from_single_file(teacher, config=args.teacher_config, **options)
    else:
        if "vae" not in options and not Path(teacher).exists() and dtype == torch.float16:
            own = {"scaling_factor": VAE_SCALING}
            with suppress(OSError):  # a teacher without a VAE of its own, or of which the cache has none
                own = AutoencoderKL.load_config(teacher, subfolder="vae", **place)
            if own.get("force_upcast", True) and own.get("scaling_factor") == VAE_SCALING:
                options["vae"] = AutoencoderKL.from_pretrained(USUAL_VAE, dtype=dtype, cache_dir=args.cache_dir)
                if own_rank() == 0:
                    way = "to keep that, --mixed_precision bf16, or name its own folder as the VAE"
                    tqdm.write(f"VAE: {USUAL_VAE} for the teacher's, which overflows in fp16; {way}", file=sys.stderr)
        pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(teacher, variant=args.variant, **options | place)
    if pipe.vae and dtype == torch.float16 and pipe.vae.config.force_upcast:
        pipe.vae.to(torch.float32)  # SDXL's own VAE overflows in float16
    return pipe


def check_family(pipe):
    if pipe.unet and pipe.unet.config.addition_embed_type != "text_time":
        raise UnusableInput(f"the teacher is not {FAMILY}: its UNet takes no size and crop; use {OTHER_SCRIPT}")
    if pipe.text_encoder_2 and not pipe.text_encoder:
        raise UnusableInput("the teacher is SDXL's refiner, which draws nothing by itself; name a base model")
    if pipe.unet:
        layers, levels = pipe.unet.config.layers_per_block, len(pipe.unet.config.down_block_types)
        if not isinstance(layers, int) or levels * (layers + 1) > 10:  # diffusers would not read its names back
            raise UnusableInput("the teacher's UNet has other blocks than SDXL's, which a LoRA's file cannot name")


def size_and_crop(original, corner, target, args):
    """Return SDXL's conditioning: original height and width, crop top and left, target height and width."""
    if args.use_fix_crop_and_size:
        original, corner = target, (0, 0)
    return {"time_ids": torch.tensor([*original, *corner, *target], dtype=torch.float32)}


def encode_ids(pipe, ids):
    """Return the text embeddings [B,L,D] and pooled ones [B,P] of token ids, by the pipeline's names."""
    encoders = pipe.text_encoder, pipe.text_encoder_2
    outputs = [encoder(part, output_hidden_states=True) for encoder, part in zip(encoders, ids, strict=True)]
    prompt_embeds = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
    return {"prompt_embeds": prompt_embeds, "pooled_prompt_embeds": outputs[1].text_embeds}


def unet_inputs(embeds, batch):
    """Return what the UNet takes beside z_t and timesteps: embeddings, pooled ones, size and crop."""
    added = {"text_embeds": embeds["pooled_prompt_embeds"], "time_ids": batch["time_ids"]}
    return {"encoder_hidden_states": embeds["prompt_embeds"], "added_cond_kwargs": added}


# Names in SDXL's original UNet, which sd-scripts trains on, of what diffusers calls otherwise.
LDM_LAYERS = {
    "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}  # fmt: skip
LDM_MODULES = {
    "conv_in": "input_blocks.0.0", "conv_out": "out.2", "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2", "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}  # fmt: skip


def kohya_name(module, layers_per_block):
    """Return kohya's name of a UNet's module: for SDXL the original UNet's, because A1111 knows no others."""
    name = LDM_MODULES.get(module, module)
    parts = re.fullmatch(r"(down|mid|up)_blocks?\.(?:(\d+)\.)?(\w+)s\.(\d+)\.(.+)", module)
    if parts:
        side, block, kind, layer, inner = parts.groups()
        place = {"resnet": 0, "attention": 1, "downsampler": 0, "upsampler": 2}[kind]
        if side == "mid":
            name = f"middle_block.{2 * int(layer) + place}"
        else:
            layer = layers_per_block if kind.endswith("sampler") else int(layer)
            first = int(block) * (layers_per_block + 1) + (side == "down")  # input block 0 is conv_in
            name = f"{'input' if side == 'down' else 'output'}_blocks.{first + layer}.{place}"
        inner = "op" if kind == "downsampler" else LDM_LAYERS.get(inner, inner)
        name += f".{inner}"
    return "lora_unet_" + name.replace(".", "_")


def kohya_model(_text_width):
    """Return the header fields that name the base model."""
    return {"ss_base_model_version": "sdxl_base_v1-0", "modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}


# >>> shared: training
def load_teacher(args, dtype, device, check=True, **parts):
    """Return the teacher's pipeline, frozen, on the device; its scheduler is its own until validation.

    `parts` take the place of the teacher's own and stay as they are; one that is None is not loaded. Without
    `check`, models that can draw and not be distilled are taken too.
    """
    given, flag = frozenset(parts), "pretrained_teacher_model"
    if "://" in args.pretrained_teacher_model and not args.prediction_type:
        remedy = "download the file and name it, or give --prediction_type"
        raise UnusableInput(f"{masked(args.pretrained_teacher_model)}: its prediction type is unknown; {remedy}")
    try:
        if args.pretrained_vae_model_name_or_path and "vae" not in parts:
            options, flag = {"dtype": dtype, "cache_dir": args.cache_dir}, "pretrained_vae_model_name_or_path"
            parts["vae"] = AutoencoderKL.from_pretrained(args.pretrained_vae_model_name_or_path, **options)
            check_vae(parts["vae"], args)
        flag = "pretrained_teacher_model"
        pipe = load_pipeline(args, dtype, **parts)
        set_prediction(pipe, args)
        if check:
            check_parts(pipe)
        if getattr(args, "use_4bit_base", False) and "unet" not in given:
            quantize_4bit(pipe.unet)  # before the move, so that the GPU never holds all full-precision weights
        for name, module in pipe.components.items():
            if isinstance(module, torch.nn.Module) and name not in given:  # a given student must stay trainable
                module.requires_grad_(False).eval().to(device)
    except Exception as error:  # libraries raise almost anything for a missing, cut or foreign model
        if isinstance(error, (UnusableInput, torch.AcceleratorError)) or OUT_OF_MEMORY.search(str(error)):
            raise
        raise UnusableInput(loading_error(args, error, flag)) from error
    pipe.set_progress_bar_config(disable=True)
    return pipe


def check_vae(vae, args):
    """Raise UnusableInput where another VAE's latents are not those that the teacher was trained on."""
    is_file = "://" in args.pretrained_teacher_model or Path(args.pretrained_teacher_model).is_file()
    teacher, own = args.teacher_config if is_file else args.pretrained_teacher_model, {}
    if not teacher:  # a single file has its family's VAE
        own = {"_class_name": "AutoencoderKL", "scaling_factor": VAE_SCALING}
    with suppress(OSError):  # a teacher without a VAE of its own
        options = {"cache_dir": args.cache_dir, "revision": None if is_file else args.teacher_revision}
        own = own or AutoencoderKL.load_config(teacher, subfolder="vae", **options)
    remedy = "name a VAE for this teacher, or mend the teacher's vae/config.json"
    for name, usual in {"latent_channels": 4, "scaling_factor": 0.18215, "shift_factor": None}.items():
        if own.get("_class_name") == "AutoencoderKL" and own.get(name, usual) != vae.config[name]:
            fault = f"its {name} is {vae.config[name]}, that of the teacher's own VAE {own.get(name, usual)}"
            given = masked(args.pretrained_vae_model_name_or_path)
            raise UnusableInput(f"--pretrained_vae_model_name_or_path {given}: {fault}; {remedy}")


def check_teacher(args):
    """Return the teacher's revision, on the Hub its commit; raise UnusableInput where no pipeline is there."""
    teacher, place = args.pretrained_teacher_model, {"cache_dir": args.cache_dir, "revision": args.teacher_revision}
    if "://" in teacher or Path(teacher).is_file():
        marks = "conditioner.", "cond_stage_model.", ".label_emb.", "model.diffusion_model.input_blocks.0.0.weight"
        names = weight_names(Path(teacher))
        has_xl_text, has_text, has_size, is_unet = (any(mark in name for name in names) for mark in marks)
        if is_unet and (has_xl_text or (has_size and not has_text)) == ("sdxl" in OTHER_SCRIPT):
            raise UnusableInput(f"--pretrained_teacher_model {masked(teacher)}: is not {FAMILY}; use {OTHER_SCRIPT}")
        return args.teacher_revision
    try:
        kind = diffusers.DiffusionPipeline.load_config(teacher, **place).get("_class_name") or ""
        revision = args.teacher_revision
        if not Path(teacher).exists():
            revision = Path(hf_hub_download(teacher, "model_index.json", **place)).parent.name
    except Exception as error:
        raise UnusableInput(loading_error(args, error)) from error
    # Before gigabytes of it are downloaded.
    if re.match("StableDiffusion(XL)?[A-Z]", kind) and ("XL" in kind) == ("sdxl" in OTHER_SCRIPT):
        raise UnusableInput(f"--pretrained_teacher_model {teacher}: is a {kind}; use {OTHER_SCRIPT}")
    return revision


def loading_error(args, error, flag="pretrained_teacher_model"):
    model, reason, where, each = getattr(args, flag), "", "", error
    path, name = Path(model), f"--{flag} {masked(model)}"
    while each:  # the first cause is often the telling one
        if isinstance(each, GatedRepoError) and not path.exists():
            terms = f"accept its terms on https://huggingface.co/{model}"
            return f"{name}: is gated; {terms}, then log in with `hf auth login`"
        text, each = " ".join(str(each).split()), each.__cause__ or each.__context__
        reason += f" {text}" * (text not in reason)
    if any("lora" in key for key in weight_names(path / WEIGHTS_NAME if path.is_dir() else path)):
        return f"{name}: this is a LoRA; name the model that it was made for"
    if path.suffix != ".safetensors" and re.search("Weights only|Unpickl|weights_only|Unsupported global", reason):
        return f"{name}: holds more than tensors, which could run code; convert the file to .safetensors"
    for part in sorted(chain(*map(path.glob, ("unet", "vae", "text_encoder*")))) if not args.variant else ():
        files = sorted(each.name for each in part.glob("*.*") if each.suffix in (".safetensors", ".bin"))
        kinds = [re.split("[.-]", file.partition(".")[2])[0] for file in files]  # of a plain file its suffix
        if kinds and not {"safetensors", "bin"} & {*kinds}:
            return f"{name}: has only weight files of a variant ({files[0]}); give --variant {kinds[0]}"
    remedy = "" if flag == "pretrained_teacher_model" else "; name its own folder, file or Hub id"
    if path.is_file() and not remedy:
        remedy = "; the file must hold the UNet, VAE and text encoder that --teacher_config describes"
        if isinstance(error, (FileNotFoundError, HfHubHTTPError)):  # the Hub was asked for a description
            place = f"those of {masked(args.teacher_config or 'its kind on the Hub')} cannot be read"
            remedy = "give --teacher_config, a local diffusers model of the same architecture"
            return f"{name}: a single file holds no configs, and {place} ({one_line(error)[:160]}); {remedy}"
    if "://" not in model and not path.exists():
        where = " (no such path here, so it was taken for a Hub id)"
        remedy = "; check the id and the network, or name a local folder or file"
        if re.search(r"no file named \S+\.(safetensors|bin)", reason) and not args.variant:
            remedy = "; if it has only weight files of a variant, give --variant fp16"
    return f"{name} cannot be loaded{where}: {masked(reason.strip())[:400]}{remedy}"


def weight_names(path):
    """Return the names of the tensors in a single file; v_pred or eps_pred too where its header tells."""
    with suppress(Exception):  # what cannot be read here fails, with its reason, when it is loaded
        if path.suffix.lower() == ".safetensors":
            with safe_open(path, framework="pt") as file:
                header = file.metadata() or {}  # sd-scripts' and ComfyUI's spelling
                kinds = [header.get(f"modelspec.{name}", "") for name in ("prediction_type", "predict_key")]
                marks = {"v": "v_pred", "e": "eps_pred"}
                return {*file.keys(), *(marks[kind[0]] for kind in kinds if kind[:1] in marks)}
        if path.is_file():
            state = torch.load(path, map_location="meta", weights_only=True)
            return set(map(str, state.get("state_dict", state)))
    return set()


def set_prediction(pipe, args):
    """Give the pipeline's scheduler the prediction type of --prediction_type or of a file's marker tensors."""
    if "beta_start" not in pipe.scheduler.config or pipe.scheduler.config.get("timestep_type") == "continuous":
        raise UnusableInput(f"the teacher's {type(pipe.scheduler).__name__} has no betas; name a diffusion model")
    names, changes = weight_names(Path(args.pretrained_teacher_model)), {}
    if any(name.startswith("edm_") for name in names):
        raise UnusableInput("the teacher is an EDM model, such as CosXL, whose noise has no betas; name another one")
    if args.prediction_type or "v_pred" in names:
        changes["prediction_type"] = args.prediction_type or "v_prediction"
    elif "eps_pred" in names:
        changes["prediction_type"] = "epsilon"
    if "ztsnr" in names:
        changes |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    is_sd2 = pipe.unet and pipe.unet.config.cross_attention_dim == 1024
    if is_sd2 and names and not (changes or args.teacher_config):
        remedy = "give --prediction_type epsilon (a base model, 512 px) or v_prediction (768 px)"
        raise UnusableInput(f"{args.pretrained_teacher_model}: SD 2.x does not tell what it predicts; {remedy}")
    if changes:  # PNDMScheduler would drop one of them
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, **changes)


def check_parts(pipe):
    check_family(pipe)
    if pipe.unet:
        config = pipe.unet.config
        if config.time_cond_proj_dim is not None:
            raise UnusableInput("the teacher is guidance-distilled (time_cond_proj_dim); name an undistilled model")
        if config.in_channels != config.out_channels:
            channels = f"{config.in_channels} channels and gives {config.out_channels}"
            raise UnusableInput(f"the teacher's UNet takes {channels}: inpainting models cannot be teachers")
    for name in TEXT_PARTS:
        if getattr(getattr(pipe, name), "model_max_length", 0) > 10**6:
            raise UnusableInput(f"the teacher's {name} has no maximum length: its folder is missing or cut")


def quantize_4bit(unet):
    """Turn attention's linear layers into bitsandbytes' NF4 ones (arXiv:2305.14314), packed when they move."""
    import bitsandbytes

    linears = [(name, layer) for name, layer in unet.named_modules() if isinstance(layer, torch.nn.Linear)]
    # Where a block of 64 weights spans two rows, bitsandbytes 0.50 unpacks it wrongly on CPUs with AVX-512.
    fitting = [(name, layer) for name, layer in linears if ".attentions." in name and layer.in_features % 64 == 0]
    if not fitting:
        lack = "the teacher has no attention layer of a multiple of 64 inputs"
        raise UnusableInput(f"--use_4bit_base: {lack}; leave it out")
    options = {"compress_statistics": False, "quant_type": "nf4"}
    for name, linear in fitting:
        shape = linear.in_features, linear.out_features, linear.bias is not None, linear.weight.dtype
        packed = bitsandbytes.nn.Linear4bit(*shape, device="meta", **options)
        packed.weight = bitsandbytes.nn.Params4bit(linear.weight.data, requires_grad=False, module=packed, **options)
        packed.bias = linear.bias
        packed.support_avx512bf16_for_cpu = False  # that kernel repacks in place what student and teacher share
        unet.set_submodule(name, packed)


def make_twin(unet):
    """Return the teacher: a frozen UNet on the very weights of `unet`, free of what is added to `unet` later."""
    # The twin takes no memory, and without adapter layers its passes skip PEFT's dispatch.
    shared = {id(tensor): tensor for tensor in chain(unet.parameters(), unet.buffers())}
    for module in unet.modules():  # the scales of packed weights are no buffers
        if getattr(module, "quant_state", None) is not None:
            shared[id(module.quant_state)] = module.quant_state
    return copy.deepcopy(unet, shared).requires_grad_(False).eval()


class LoraForward:
    """PEFT's LoRA layer, x W^T + b + scaling dropout(x) A^T B^T, with float32 A and B, computed in the dtype of x.

    PEFT's own forward pass computes the LoRA's branch in float32 where there is no autocast.
    """

    def forward(self, x):
        if self.disable_adapters:
            return super().forward(x)
        down, up, scaling = (part["default"] for part in (self.lora_A, self.lora_B, self.scaling))
        up = up.weight if scaling == 1 else up.weight * scaling
        apply, base, options = functional.linear, self.base_layer, ()
        if isinstance(base, torch.nn.Conv2d):  # A has the base's kernel size, B is 1 x 1
            apply, options = functional.conv2d, (None, base.stride, base.padding)
        hidden = apply(self.lora_dropout["default"](x), down.weight.to(x.dtype), *options)
        return base(x) + apply(hidden, up.to(x.dtype))


class LoraLinear(LoraForward, lora.Linear):
    pass


class LoraConv2d(LoraForward, lora.Conv2d):
    pass


def add_lora(unet, args):
    """Add the LoRA to the UNet, in float32 whatever the base's dtype, and return its parameters."""
    targets = [name.strip() for name in args.lora_target_modules.split(",") if name.strip()]
    layers = {torch.nn.Linear: LoraLinear, torch.nn.Conv2d: LoraConv2d}
    names = [f".{name}" for name, module in unet.named_modules() if isinstance(module, tuple(layers))]
    for target in targets:
        if not any(name.endswith(f".{target}") for name in names):
            raise UnusableInput(f"--lora_target_modules: the teacher has no layer {target!r}; leave it out")
    torch.manual_seed(args.seed)
    options = {"lora_alpha": args.lora_alpha, "lora_dropout": args.lora_dropout, "target_modules": targets}
    config = LoraConfig(r=args.lora_rank, **options)
    # PEFT's documented way for layers of one's own: peft/docs/source/developer_guides/custom_models.md
    config._register_custom_module(layers)
    unet.add_adapter(config)
    cast_training_params(unet, dtype=torch.float32)
    return [parameter for parameter in unet.parameters() if parameter.requires_grad]


def prepare_unet(unet, args):
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if args.enable_xformers_memory_efficient_attention and not xformers_fault(unet.device):
        unet.enable_xformers_memory_efficient_attention()
    if args.compile:
        # A graph for each width of the blocks in each pass, of teacher, target, student and so on: more than
        # the 8 of one function after which torch stops compiling.
        torch._dynamo.config.recompile_limit = 64
        unet.compile_repeated_blocks()


def encode_prompts(pipe, captions, device):
    """Return the embeddings of captions, a row each, by the pipeline's names; "" gives the unconditional ones."""
    tokenizers = [getattr(pipe, name) for name in TEXT_PARTS if name.startswith("tokenizer")]
    embeds = encode_ids(pipe, [ids.to(device) for ids in tokenize(tokenizers, list(captions))])
    if pipe.config.get("force_zeros_for_empty_prompt"):  # as SDXL has it
        for value in embeds.values():
            value[[caption == "" for caption in captions]] = 0
    return embeds


def encode_moments(vae, pixels, args):
    """Return the VAE posterior's mean and log variance [B,2C,h,w] f32 of pixels uint8 [B,R,R,3]."""
    pixels = pixels.permute(0, 3, 1, 2)
    if pixels.is_cuda:  # GroupNorm on CUDA copies channels-last tensors in every block; on CPUs they are the faster
        pixels = pixels.contiguous()
    # SDXL's own VAE, in float32, takes 2.5 GiB for a picture of 1024 px.
    is_on_gpu = pixels.is_cuda or pixels.is_meta  # as estimate_memory.py counts it
    at_once = 1 if vae.dtype == torch.float32 and is_on_gpu else args.vae_encode_batch_size
    parts = (part.float() / 127.5 - 1 for part in pixels.split(at_once))
    return torch.cat([vae.encode(part.to(vae.dtype)).latent_dist.parameters.float() for part in parts])


def make_optimizer(parameters, args, num_processes, max_train_steps):
    """Return (AdamW or its 8-bit form, learning-rate schedule stepped once an update)."""
    lr = args.learning_rate
    if args.scale_lr:
        lr *= args.train_batch_size * args.gradient_accumulation_steps * num_processes
    options = {"lr": lr, "betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    options["weight_decay"] = args.adam_weight_decay
    make = adam_8bit if args.use_8bit_adam else partial(torch.optim.AdamW, fused=True)
    optimizer, warmup = make(parameters, **options), args.lr_warmup_steps
    name = "constant_with_warmup" if args.lr_scheduler == "constant" and warmup else args.lr_scheduler
    return optimizer, get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=max_train_steps)


def adam_8bit(parameters, **options):
    """Return bitsandbytes' AdamW8bit, whose own `step` waits for the GPU after every matrix; this one does not."""
    import bitsandbytes

    class AdamW8bit(bitsandbytes.optim.AdamW8bit):
        @torch.no_grad()
        def step(self, closure=None):  # noqa: ARG002 - accelerate passes it on
            if not self.initialized:
                self.check_overrides()
                self.to_gpu()
                self.initialized = True
            for group_number, group in enumerate(self.param_groups):
                for number, parameter in enumerate(group["params"]):
                    if parameter.grad is not None:
                        if not self.state[parameter]:
                            self.init_state(group, parameter, group_number, number)
                        self.update_step(group, parameter, group_number, number)

    return AdamW8bit(parameters, **options)


class Lora(NamedTuple):
    """The change of one layer's weight: alpha / rank * up @ down."""

    down: torch.Tensor  # [rank, in] or [rank, in, kh, kw]
    up: torch.Tensor  # [out, rank] or [out, rank, 1, 1]
    alpha: float


def lora_file(path):
    """Return the weight file of a folder that a run, a checkpoint or PEFT left; a file's path as it is."""
    names = (WEIGHTS_NAME, "adapter_model.safetensors", "unet/adapter_model.safetensors")
    return next((Path(path, name) for name in names if Path(path, name).is_file()), Path(path))


def init_lora_file(args):
    """Return the weight file of --init_lora, which is downloaded where a Hub id is given."""
    if Path(args.init_lora).exists():
        return lora_file(args.init_lora)
    try:
        return Path(hf_hub_download(args.init_lora, WEIGHTS_NAME, cache_dir=args.cache_dir))
    except Exception as error:
        raise UnusableInput(loading_error(args, error, "init_lora")) from error


def read_lora(path, layers_per_block=None):
    """Return {UNet module: Lora} of a file with diffusers', PEFT's or kohya's keys, or of its folder."""
    path = lora_file(path)
    if path.is_dir():
        raise UnusableInput(f"{path}: holds no {WEIGHTS_NAME} nor adapter_model.safetensors; name a LoRA's file")
    try:
        loras, rest, number = parse_lora(path, layers_per_block)
    except (OSError, SafetensorError, ValueError, LookupError, AttributeError, TypeError, RuntimeError) as error:
        cause = f"not a whole LoRA of a UNet in safetensors ({one_line(error)})"
        raise UnusableInput(f"{path}: {cause}; name another file") from error
    if rest or 2 * len(loras) != number or not loras:  # diffusers drops DoRA's scales, for one
        raise UnusableInput(f"{path}: not a LoRA of a UNet alone ({rest[:1] or number}); name another file")
    if not all(x.isfinite().all() for one in loras.values() for x in (one.alpha * one.down.float(), one.up.float())):
        raise UnusableInput(f"{path}: holds weights that are not finite; name another LoRA")
    return loras


def parse_lora(path, layers_per_block):
    """Return ({UNet module: Lora}, names of what is no part of one, number of matrices) of a file."""
    with safe_open(path, framework="pt") as file:
        text = (file.metadata() or {}).get("lora_adapter_metadata")  # diffusers'; PEFT has a file beside
    state, config = load_file(path), json.loads(text or "{}")
    is_peft = any(re.match(r"(unet\.)?base_model\.", name) for name in state)
    if not config and (is_peft or path.name == "adapter_model.safetensors"):
        # Beside another file it is another LoRA's; diffusers' LCM scripts write it one folder above.
        folders = [path.parent, path.resolve().parent, *[path.absolute().parents[1]] * (path.name == WEIGHTS_NAME)]
        beside = [each for folder in folders if (each := folder / "adapter_config.json").is_file()]
        config = json.loads(beside[0].read_text("utf-8")) if beside else {}
    config = {name.removeprefix("unet."): value for name, value in config.items() if value is not None}
    if "lora_alpha" not in config and any(name.startswith("base_model.") for name in state):
        raise ValueError("PEFT's adapter_config.json, which has the alpha, is not beside it or lacks it")
    # In the original names blocks are counted through, downsamplers too: one after each block's layers.
    blocks = re.findall(r"\blora_unet_input_blocks_(\d+)_\d_(op)?", " ".join(state))
    fits = (n for n in (2, 1, *range(3, 10)) if all((int(i) % (n + 1) == 0) == bool(op) for i, op in blocks))
    unet = SimpleNamespace(layers_per_block=layers_per_block or next(fits, 2))
    number = sum(not name.endswith(".alpha") for name in state)
    found = StableDiffusionLoraLoaderMixin.lora_state_dict(state, unet_config=unet)
    state, alphas = (convert_unet_state_dict_to_peft(part or {}) for part in found)
    loras, misfits, patterns = {}, [], config.get("alpha_pattern") or {}
    for name in [name for name, value in state.items() if name.endswith(".lora_A.weight") and value.ndim > 1]:
        key = name.removesuffix(".lora_A.weight")
        module = re.sub(r"^(unet\.)?(base_model\.model\.)?", "", key)
        down, up = state.pop(name), state.pop(f"{key}.lora_B.weight", torch.zeros(0, 0))
        alpha = patterns.get(get_pattern_key(patterns, module), config.get("lora_alpha", len(down)))
        alpha *= len(down) ** 0.5 if config.get("use_rslora") else 1
        loras[module] = Lora(down, up, float(alphas.get(f"{key}.alpha", alphas.get(f"{name}.alpha", alpha))))
        is_number = up.is_floating_point() and down.is_floating_point()
        if not (is_number and up.shape[1:2] == down.shape[:1] != (0,) and module.startswith(UNET_PARTS)):
            misfits.append(module)  # half a layer, or one of a text encoder
    return loras, [*state, *misfits], number


def reduce_rank(one, rank):
    """Return a Lora's best approximation of at most this rank, by SVD; alpha is the new rank."""
    if rank >= len(one.down):
        return one
    q_up, r_up = torch.linalg.qr(one.up.flatten(1).float())
    q_down, r_down = torch.linalg.qr(one.down.flatten(1).float().T)
    # The core between two thin QRs has the singular values of up @ down.
    u, s, v = torch.linalg.svd(one.alpha / len(one.down) * (r_up @ r_down.T))
    up, down = (q_up @ u[:, :rank]) * s[:rank].sqrt(), (s[:rank].sqrt() * (q_down @ v[:rank].T)).T
    down = down.reshape(len(down), *one.down.shape[1:])
    return Lora(down, up.reshape(*up.shape, *one.up.shape[2:]), float(len(down)))


@torch.no_grad()
def load_init_lora(unet, source):
    """Start the UNet's adapter from the LCM-LoRA of a file or folder, whatever its rank and alpha."""
    layers = {name: layer for name, layer in unet.named_modules() if isinstance(layer, lora.LoraLayer)}
    loras, misfits = read_lora(source, unet.config.layers_per_block), []
    rank, ranks = next(iter(layers.values())).r["default"], {len(one.down) for one in loras.values()}
    if max(ranks) != rank and own_rank() == 0:
        tqdm.write(f"--init_lora {source}: its rank {max(ranks)} becomes {rank}, the --lora_rank", file=sys.stderr)
    for name, one in loras.items():
        layer, sizes = layers.get(name), (one.down[0].numel(), len(one.up))
        parts = (layer.lora_A["default"].weight, layer.lora_B["default"].weight) if layer else ()
        if not parts or sizes != (parts[0][0].numel(), len(parts[1])):
            misfits.append(f"{name} ({sizes[0]} x {sizes[1]})")
            continue
        down, up = parts
        one = reduce_rank(one, len(down))
        rank, scale = len(one.down), layer.scaling["default"]
        # Rows of A beyond the LoRA's rank keep their random start: B's zeros leave the output as it is, and
        # zeros in both would never get a gradient.
        down[:rank] = one.down.view_as(down[:rank])
        up.zero_()[:, :rank] = (one.up.float() * (one.alpha / rank / scale)).view_as(up[:, :rank])
    if misfits:
        found = f"{len(misfits)} of {len(loras)} layers do not fit, such as {', '.join(misfits[:3])}"
        remedy = "name an LCM-LoRA of this model's architecture, or its layers in --lora_target_modules"
        raise UnusableInput(f"--init_lora {source}: {found}; {remedy}")


def make_trainable(unet, args, accelerator, num_updates, init_lora=None):
    """Add the LoRA to the UNet; return (the UNet, in DDP for several processes, optimizer, learning-rate schedule)."""
    parameters = add_lora(unet, args)
    if init_lora:
        load_init_lora(unet, init_lora)
    prepare_unet(unet, args)
    optimizer, lr_schedule = make_optimizer(parameters, args, accelerator.num_processes, num_updates)
    if accelerator.num_processes > 1:  # by hand, because accelerate's `prepare` adds autocast
        devices = [accelerator.device] if accelerator.device.type == "cuda" else None
        unet = torch.nn.parallel.DistributedDataParallel(unet, devices, gradient_as_bucket_view=True)
    return unet, accelerator.prepare_optimizer(optimizer), lr_schedule


# ---- One training step: draw, encode, condition, loss, update --------------------------------------------


@dataclass
class RunState:
    global_step: int = 0  # updates done
    saved_step: int | None = None  # updates done at the newest checkpoint in the output folder
    positions: dict = field(default_factory=dict)  # consumer -> (epoch, samples read in it)
    skipped: Counter = field(default_factory=Counter)  # samples of this process by cause
    stop_signal: str | None = None  # the first signal that asked the run to stop
    is_interrupted: bool = False  # by Ctrl-C, whose second ends the run at once
    is_training: bool = False  # updates would be lost, so signals wait for a checkpoint
    waits_at: float | None = None  # since when it waits for data
    watched_at: float | None = None  # the wait that was seen when a signal's alarm last rang
    is_alone: bool = True  # the only process; several have to agree before they save
    is_saved: bool = False  # training is over and its last update is in a checkpoint
    repository: str = ""  # on the Hub, with its owner
    wandb_run: str | None = None  # the id of wandb's run
    lock: object = None  # on the output folder, for as long as the process lives


@dataclass
class Job:
    args: argparse.Namespace
    accelerator: Accelerator
    dtype: torch.dtype  # of the arithmetic of UNet, VAE and text encoders
    pipe: object  # the pipeline that draws; its UNet is student_unet
    teacher_unet: torch.nn.Module  # without LoRA, on the weights of student_unet
    student_unet: torch.nn.Module  # with the LoRA
    student: torch.nn.Module  # student_unet for passes with gradient: wrapped in DDP for several processes
    schedule: Schedule
    optimizer: torch.optim.Optimizer
    lr_schedule: torch.optim.lr_scheduler.LRScheduler
    max_train_steps: int
    scaling_factor: float  # of the latents
    uncond_embeds: dict  # of the empty caption, one row
    prompts: list  # to draw at validation
    prompt_embeds: dict  # of the prompts
    state: RunState
    teacher_pictures: list = field(default_factory=list)  # of the prompts; empty where they cannot be drawn
    fake: object = None  # a Fake, for --objective matching


@dataclass
class Draws:
    """The random numbers of one forward pass: a function of (seed, update, micro step, process)."""

    posterior_eps: torch.Tensor  # [B,4,h,w], for the VAE's posterior
    eps: torch.Tensor  # [B,4,h,w], the forward process's noise
    index: torch.Tensor  # [B] int64 in 0..N-1, position in the solver's grid; on the CPU
    w: torch.Tensor  # [B,1,1,1] guidance
    empty: torch.Tensor  # [B] bool, captions to drop; on the CPU


def send(tensor, device):
    """Return a CPU tensor on the device; on CUDA without waiting for the work that is queued there."""
    if torch.device(device).type != "cuda":  # elsewhere an asynchronous copy may read memory that is freed (MPS)
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def make_generator(*key):
    """Return a generator on the CPU, so that every device gets the same numbers, that is a function of the key."""
    seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)
    return torch.Generator().manual_seed(seed)


def draw(args, shape, global_step, micro_step, process_index, device):
    """Return the Draws for latents of `shape` [B,4,h,w]; also seeds torch, for LoRA dropout."""
    generator = make_generator(args.seed, global_step, micro_step, process_index)
    torch.manual_seed(generator.initial_seed())
    batch = shape[0]
    posterior_eps, eps = send(torch.randn(2, *shape, generator=generator), device)
    index = torch.randint(args.num_ddim_timesteps, (batch,), generator=generator)
    w = args.w_min + (args.w_max - args.w_min) * torch.rand(batch, 1, 1, 1, generator=generator)
    empty = torch.rand(batch, generator=generator) < args.proportion_empty_prompts
    return Draws(posterior_eps, eps, index, send(w, device), empty)


def encode(job, batch):
    """Return (VAE moments [B,2C,h,w], text embeddings by name) of a batch of pictures or of cached tensors."""
    if "moments" in batch:
        return batch["moments"], {name: batch[name] for name in job.uncond_embeds}
    return encode_moments(job.pipe.vae, batch["pixels"], job.args), encode_ids(job.pipe, batch["ids"])


def sample_latents(moments, posterior_eps, scaling_factor):
    """Return scaled latents [B,C,h,w] f32, sampled from moments [B,2C,h,w] with the given noise [B,C,h,w]."""
    posterior = DiagonalGaussianDistribution(moments.float())
    return (posterior.mean + posterior.std * posterior_eps) * scaling_factor


def condition(uncond_embeds, embeds, batch, empty):
    """Return the UNet's (conditioning, uncond) of a batch, each with B rows.

    Captions that are empty or marked by `empty` [B] get `uncond_embeds`, those of the empty caption, one row.
    """
    empty = empty | torch.tensor([not caption for caption in batch["caption"]])
    uncond, cond = {}, {}
    for name, value in uncond_embeds.items():
        uncond[name] = value.expand(embeds[name].shape)
        is_empty = send(empty, value.device).view(-1, *[1] * (value.ndim - 1))
        cond[name] = torch.where(is_empty, value, embeds[name].to(value.dtype))
    return unet_inputs(cond, batch), unet_inputs(uncond, batch)


def predict(unet, z_t, timesteps, conditioning, dtype):
    """Return the UNet's output as float32; the one place where the compute dtype takes effect."""
    return unet(z_t.to(dtype), timesteps, **conditioning, return_dict=False)[0].float()


def consistency(unet, schedule, z_t, timesteps, conditioning, dtype):
    """Return f(z_t, t) = c_skip z_t + c_out z0 (LCM, eq. 8)."""
    c_skip, c_out = boundary_scalings(timesteps, schedule.timestep_scaling)
    z0, _ = clean_estimate(schedule, predict(unet, z_t, timesteps, conditioning, dtype), z_t, timesteps)
    return c_skip * z_t + c_out * z0


def guided_estimate(unet, schedule, z_t, timesteps, conditioning, uncond, w, dtype):
    """Return the teacher's guided (z0, eps) at z_t; both halves of the guidance are one batch."""
    twice, z_twice = timesteps.repeat(2), z_t.repeat(2, 1, 1, 1)
    output = predict(unet, z_twice, twice, concatenate([conditioning, uncond]), dtype)
    z0, eps = clean_estimate(schedule, output, z_twice, twice)
    (z0_cond, z0_uncond), (eps_cond, eps_uncond) = z0.chunk(2), eps.chunk(2)
    return z0_cond + w * (z0_cond - z0_uncond), eps_cond + w * (eps_cond - eps_uncond)


def teacher_step(unet, schedule, z_t, timesteps, prev_timesteps, conditioning, uncond, w, dtype):
    z0_cfg, eps_cfg = guided_estimate(unet, schedule, z_t, timesteps, conditioning, uncond, w, dtype)
    return ddim_step(schedule, z0_cfg, eps_cfg, prev_timesteps)


def phase_target(job, target, z_prev, z_t, index, conditioning):
    """Return the clean estimate that leads from z_t to where the student arrives from z_prev, with its `target` there.

    Where that is half way, and t_{n+k} is the first that leads to the picture, the student jumps on.
    """
    schedule = job.schedule
    timesteps = (index + 1) * schedule.k - 1  # on the CPU, so that choosing samples does not wait for the GPU
    prev_timesteps = (timesteps - schedule.k).clamp(min=0)
    ends, ends_prev = phase_ends(schedule, timesteps), phase_ends(schedule, prev_timesteps)
    rows = (ends_prev > ends).nonzero()[:, 0]
    timesteps, reached, ends = (send(each, z_t.device) for each in (timesteps, prev_timesteps, ends))
    if len(rows):
        rows = send(rows, z_t.device)
        z0, z, t, own = slice_tensors((target, z_prev, reached, conditioning), rows)
        half_way = phase_ends(schedule, t)
        z = jump(schedule, z0, z, t, half_way)
        z0 = consistency(job.student_unet, schedule, z, half_way, own, job.dtype)
        pairs = (target, z0), (z_prev, z), (reached, half_way)
        target, z_prev, reached = (whole.index_copy(0, rows, part) for whole, part in pairs)
    z_end = jump(schedule, target, z_prev, reached, ends)
    # `jump` from z_t to z_end, solved for its clean estimate.
    (alpha_t, sigma_t), (alpha_end, sigma_end) = schedule.at(timesteps), schedule.at(ends)
    return (sigma_t * z_end - sigma_end * z_t) / (alpha_end * sigma_t - sigma_end * alpha_t)


def training_loss(job, latents, conditioning, uncond, draws):
    """Return the consistency distillation loss of clean latents [B,4,h,w] (LCM, Alg. 1, with a LoRA student)."""
    schedule, teacher, dtype = job.schedule, job.teacher_unet, job.dtype
    # 1. Sample one DDIM step of the solver's grid: from t_{n+k} down to t_n.
    timesteps = schedule.ddim_timesteps[send(draws.index, latents.device)]
    prev_timesteps = (timesteps - schedule.k).clamp(min=0)
    # 2. Noise the latents to t_{n+k}.
    z_t = add_noise(schedule, latents, draws.eps, timesteps)
    has_dropout = job.args.lora_dropout > 0  # switching modes walks the whole UNet, 9,810 modules of SDXL
    if has_dropout:
        job.student_unet.eval()  # the target is computed without dropout
    with torch.no_grad():
        # 3. The teacher's guided DDIM step to t_n.
        z_prev = teacher_step(teacher, schedule, z_t, timesteps, prev_timesteps, conditioning, uncond, draws.w, dtype)
        # 4. Target: the student's clean estimate at (z_prev, t_n), without gradient.
        target = consistency(job.student_unet, schedule, z_prev, prev_timesteps, conditioning, dtype)
        if job.args.phases == 2:
            target = phase_target(job, target, z_prev, z_t, draws.index, conditioning)
    # 5. Prediction: the student's clean estimate at (z_t, t_{n+k}); both should agree.
    if has_dropout:
        job.student_unet.train()
    pred = consistency(job.student, schedule, z_t, timesteps, conditioning, dtype)
    return loss_between(schedule, pred, target, timesteps, job.args)


def batch_loss(job, batch, micro_step):
    args, device = job.args, job.accelerator.device
    batch = send_to_device(batch, device, non_blocking=device.type == "cuda")  # the loader has pinned it for CUDA
    with torch.no_grad():
        moments, embeds = encode(job, batch)
        shape = (len(moments), moments.shape[1] // 2, *moments.shape[2:])
        draws = draw(args, shape, job.state.global_step, micro_step, job.accelerator.process_index, device)
        latents = sample_latents(moments, draws.posterior_eps, job.scaling_factor)
        conditioning, uncond = condition(job.uncond_embeds, embeds, batch, draws.empty)
    return training_loss(job, latents, conditioning, uncond, draws)


def update(job, batches):
    """Make one update of the LoRA and return (loss, gradient norm), both on the device."""
    if job.fake:
        return update_matching(job, batches)
    losses, positions = [], {}
    for micro_step in range(job.args.gradient_accumulation_steps):
        batch = next_batch(job, batches, positions)
        with job.accelerator.accumulate(job.student):
            loss = batch_loss(job, batch, micro_step)
            losses.append(loss.detach())
            grad_norm = descend(job, job.optimizer, loss)
    job.lr_schedule.step()
    job.state.global_step += 1
    job.state.positions |= positions  # only now: a checkpoint between micro steps would lose their samples
    return torch.stack(losses).mean(), grad_norm


def descend(job, optimizer, loss):
    """Add a loss's gradient; at an update's last micro step, clip, step, and return the gradient's norm."""
    job.accelerator.backward(loss)
    grad_norm = None
    if job.accelerator.sync_gradients:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        grad_norm = job.accelerator.clip_grad_norm_(parameters, job.args.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    return grad_norm


def next_batch(job, batches, positions):
    """Return the next batch, noting in `positions` how far the data has been read, and what was skipped."""
    state = job.state
    state.waits_at = time.monotonic()  # tells this wait from the next one
    if state.stop_signal and state.is_alone:  # it came between two waits; a half-done update is given up
        state.waits_at = None  # a further signal must not raise where the loop saves
        raise StopWaiting
    batch = next(batches)
    state.waits_at = None
    if "error" in batch:
        raise UnusableInput(batch["error"])
    consumer, epoch, number = batch["position"]
    positions[str(consumer)] = (epoch, number)
    state.skipped.update(batch["skipped"])
    return batch


# ---- Matching: a second stage; whoever wants an LCM-LoRA alone may pass over it ---------------------------

# 1. The student draws as a pipeline does, from pure noise down to z_t, without gradient.
# 2. x = f(z_t, t), with gradient.
# 3. x is noised to a random tau. The guided teacher's estimate there says where its pictures lie; that of the
#    fake, a second LoRA, where the student's lie.
# 4. x moves along the difference (DMD, arXiv:2311.18828; on the student's own steps: TDM, arXiv:2503.06674).
# 5. The fake learns to denoise the same x.
TAU_MIN, TAU_END = 0.02, 0.98  # share of the T timesteps; outside, the teacher's estimate says little
MIN_ERROR = 0.05  # of the teacher's estimate, by which the direction is divided


@dataclass
class Fake:
    """The fake score: a UNet on the teacher's weights, whose LoRA learns to denoise what the student draws."""

    unet: torch.nn.Module
    model: torch.nn.Module  # unet, wrapped in DDP for several processes
    optimizer: torch.optim.Optimizer
    lr_schedule: torch.optim.lr_scheduler.LRScheduler
    grids: dict  # step count -> LCMScheduler's timesteps, descending
    watched: dict = field(default_factory=dict)  # numbers of the last update for log.jsonl, on the device


@dataclass
class MatchingDraws:
    timesteps: list  # of the roll-out; the last one is trained; the same on all processes, so that none waits
    noise: torch.Tensor  # [len(timesteps),B,4,h,w]
    tau: torch.Tensor  # [1+M,B] int64; row 0: the student's loss; rows 1 to M: the fake's updates
    tau_eps: torch.Tensor  # [1+M,B,4,h,w]
    w: torch.Tensor  # [B,1,1,1] guidance
    empty: torch.Tensor  # [B] bool, captions to drop; on the CPU


def make_fake(base_unet, args, accelerator, scheduler_config, max_train_steps):
    """Return the Fake on the weights of a UNet that has no LoRA yet."""
    unet = make_twin(base_unet)
    lr = args.fake_learning_rate or 3 * args.learning_rate
    own = argparse.Namespace(**vars(args) | {"lora_dropout": 0.0, "learning_rate": lr, "seed": args.seed + 1})
    model, optimizer, lr_schedule = make_trainable(unet, own, accelerator, max_train_steps)
    return Fake(unet, model, optimizer, lr_schedule, student_grids(scheduler_config, args))


def student_grids(scheduler_config, args):
    scheduler, grids = LCMScheduler.from_config(scheduler_config), {}
    for steps in args.student_steps:
        scheduler.set_timesteps(steps, original_inference_steps=args.num_ddim_timesteps)
        grids[steps] = scheduler.timesteps.tolist()
    return grids


def draw_matching(args, grids, shape, num_timesteps, global_step, micro_step, process_index, device):
    common = make_generator(args.seed, global_step, micro_step)  # the same on all processes
    grid = grids[args.student_steps[torch.randint(len(args.student_steps), (), generator=common)]]
    timesteps = grid[: 1 + torch.randint(len(grid), (), generator=common)]
    generator = make_generator(args.seed, global_step, micro_step, process_index)
    torch.manual_seed(generator.initial_seed())  # for LoRA dropout
    batch, num_taus = shape[0], 1 + args.fake_updates
    low, high = round(TAU_MIN * num_timesteps), round(TAU_END * num_timesteps)
    noise = send(torch.randn(len(timesteps) + num_taus, *shape, generator=generator), device)
    tau = torch.randint(num_timesteps, (num_taus, batch), generator=generator)
    tau[0] = torch.randint(low, high, (batch,), generator=generator)
    w = args.w_min + (args.w_max - args.w_min) * torch.rand(batch, 1, 1, 1, generator=generator)
    empty = torch.rand(batch, generator=generator) < args.proportion_empty_prompts
    tau, w = send(tau, device), send(w, device)
    return MatchingDraws(timesteps, noise[:-num_taus], tau, noise[-num_taus:], w, empty)


def roll_out(unet, schedule, timesteps, noise, eta, conditioning, dtype):
    """Return z at the last of the timesteps [len,B], drawn from pure noise; the share eta of later noise is fresh.

    Eta 1 is LCMScheduler, less is near to DDIM of that eta (arXiv:2010.02502, eq. 16).
    """
    z_t = noise[0]
    for t, next_t, fresh in zip(timesteps, timesteps[1:], noise[1:], strict=False):
        x = consistency(unet, schedule, z_t, t, conditioning, dtype)
        alpha, sigma = schedule.at(t)
        eps = (z_t - alpha * x) / sigma  # that x implies
        z_t = add_noise(schedule, x, math.sqrt(1 - eta**2) * eps + eta * fresh, next_t)
    return z_t


def two_estimates(teacher, fake, schedule, x, tau, eps, conditioning, uncond, w, dtype):
    """Return (the guided teacher's, the fake's) clean estimate of x [B,4,h,w] noised to tau."""
    z_tau = add_noise(schedule, x, eps, tau)
    teacher_z0, _ = guided_estimate(teacher, schedule, z_tau, tau, conditioning, uncond, w, dtype)
    fake_z0, _ = clean_estimate(schedule, predict(fake, z_tau, tau, conditioning, dtype), z_tau, tau)
    return teacher_z0, fake_z0


def matching_loss(x, teacher_z0, fake_z0):
    """Return a loss whose gradient moves x from the fake's estimate towards the teacher's (DMD, eq. 7 and 8)."""
    error = (x - teacher_z0).abs().mean((1, 2, 3), keepdim=True).clamp(min=MIN_ERROR)
    target = (x + (teacher_z0 - fake_z0) / error).detach()
    return (x - target).square().mean() / 2


def fake_loss(fake, schedule, x, tau, eps, conditioning, dtype):
    """Return the fake's denoising loss on what the student drew, without guidance, and its error of the noise.

    The loss is the error of its own output, from which it learns as much at every tau.
    """
    (alpha, sigma), z_tau = schedule.at(tau), add_noise(schedule, x, eps, tau)
    target = {"epsilon": eps, "v_prediction": alpha * eps - sigma * x, "sample": x}[schedule.prediction_type]
    output = predict(fake, z_tau, tau, conditioning, dtype)
    _, fake_eps = clean_estimate(schedule, output.detach(), z_tau, tau)
    return (output - target).square().mean(), (fake_eps - eps).square().mean()


@torch.no_grad()
def matching_inputs(job, batch, micro_step):
    """Return (z_t drawn by the student, its timestep [B], conditioning, uncond, draws) for captions of a batch."""
    args, accelerator, unet = job.args, job.accelerator, job.student_unet
    batch = send_to_device(batch, accelerator.device, non_blocking=accelerator.device.type == "cuda")
    if "moments" in batch:
        sides, (_, embeds) = batch["moments"].shape[2:], encode(job, batch)
    else:
        sides, embeds = [args.resolution // job.pipe.vae_scale_factor] * 2, encode_ids(job.pipe, batch["ids"])
    shape = (len(batch["caption"]), unet.config.in_channels, *sides)
    key = job.state.global_step, micro_step, accelerator.process_index
    draws = draw_matching(args, job.fake.grids, shape, len(job.schedule.alphas), *key, accelerator.device)
    conditioning, uncond = condition(job.uncond_embeds, embeds, batch, draws.empty)
    timesteps = send(torch.tensor(draws.timesteps), accelerator.device)[:, None].expand(-1, len(batch["caption"]))
    if args.lora_dropout:  # switching modes walks the whole UNet
        unet.eval()
    z_t = roll_out(unet, job.schedule, timesteps, draws.noise, args.student_eta, conditioning, job.dtype)
    if args.lora_dropout:
        unet.train()
    return z_t, timesteps[-1], conditioning, uncond, draws


def student_loss(job, x, conditioning, uncond, draws):
    """Return the matching loss of the student's clean latents x, noting what tells a fake that lags."""
    with torch.no_grad():
        unets, noise = (job.teacher_unet, job.fake.unet), (draws.tau[0], draws.tau_eps[0])
        teacher_z0, fake_z0 = two_estimates(*unets, job.schedule, x, *noise, conditioning, uncond, draws.w, job.dtype)
        cosine = functional.cosine_similarity(teacher_z0.flatten(1), fake_z0.flatten(1)).mean()
        ratio = fake_z0.norm() / teacher_z0.norm()
        job.fake.watched = {"fake_norm_ratio": ratio, "fake_cosine": cosine, "x_std": x.std()}
    return matching_loss(x, teacher_z0, fake_z0)


def update_matching(job, batches):
    """Make one update of the student's LoRA, then those of the fake's; return (loss, gradient norm).

    In the first updates the fake alone learns, and loss and norm are its own.
    """
    args, fake, positions = job.args, job.fake, {}
    losses, drawn, watched, fake_losses, fake_norms = [], [], [], [], []
    is_trained = job.state.global_step >= args.fake_warmup_steps
    for micro_step in range(args.gradient_accumulation_steps):
        inputs = matching_inputs(job, next_batch(job, batches, positions), micro_step)
        z_t, timesteps, conditioning, uncond, draws = inputs
        with job.accelerator.accumulate(job.student), torch.set_grad_enabled(is_trained):
            x = consistency(job.student, job.schedule, z_t, timesteps, conditioning, job.dtype)
            # Cloned, because a view would keep all noise.
            drawn.append((x.detach(), conditioning, draws.tau[1:], draws.tau_eps[1:].clone()))
            if is_trained:
                loss = student_loss(job, x, conditioning, uncond, draws)
                losses.append(loss.detach())
                watched.append(fake.watched)
                grad_norm = descend(job, job.optimizer, loss)
    for number in range(args.fake_updates):
        for x, conditioning, tau, eps in drawn:
            part = slice(number % len(x), None, args.fake_updates)  # where samples are fewer, each serves several
            x, conditioning, tau, eps = slice_tensors((x, conditioning, tau[number], eps[number]), part)
            with job.accelerator.accumulate(fake.model):
                loss, noise_error = fake_loss(fake.model, job.schedule, x, tau, eps, conditioning, job.dtype)
                fake_losses.append(noise_error)
                fake_norm = descend(job, fake.optimizer, loss)
        fake_norms.append(fake_norm)  # `descend` returns one at the last micro step alone
    if is_trained:
        job.lr_schedule.step()
        fake.watched = {name: torch.stack([each[name] for each in watched]).mean() for name in watched[0]}
        fake.watched["fake_loss"] = torch.stack(fake_losses).mean()
        fake.watched["fake_grad_norm"] = torch.stack(fake_norms).max()
    fake.lr_schedule.step()
    job.state.global_step += 1
    job.state.positions |= positions
    return torch.stack(losses or fake_losses).mean(), grad_norm if is_trained else torch.stack(fake_norms).max()


# ---- Files: LoRA weights and checkpoints -----------------------------------------------------------------


def write_atomically(path, data):
    """Write text or bytes so that the file is there whole or not at all."""
    # Not by safetensors' own `save_file`: its files can be read by their owner alone, whatever the umask.
    scratch = path.with_name(f".writing-{path.name}")
    with scratch.open("wb") as file:
        file.write(data.encode() if isinstance(data, str) else data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(scratch, path)


def kohya_weights(state, alpha, layers_per_block):
    """Return a PEFT state dict of the UNet with kohya's keys, in float16, with an alpha for each module."""
    weights = {}
    for name, value in state.items():
        module, _, matrix = name.removesuffix(".weight").rpartition(".")
        key = kohya_name(module, layers_per_block)
        side = {"lora_A": "lora_down", "lora_B": "lora_up"}[matrix]
        weights[f"{key}.{side}.weight"] = value.detach().half().cpu().contiguous()
        weights[f"{key}.alpha"] = torch.tensor(float(alpha), dtype=torch.float16)
    return weights


def kohya_metadata(args, text_width):
    """Return the header fields that user interfaces show; no path, no token."""
    return kohya_model(text_width) | {
        "format": "pt",
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(args.lora_rank),
        "ss_network_alpha": str(args.lora_alpha),
        "ss_resolution": f"({args.resolution}, {args.resolution})",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.implementation": "diffusers",
    }


def save_lora(unet, path, args):
    """Write the LoRA as the released LCM-LoRAs are: diffusers, ComfyUI, A1111 and Forge read every layer."""
    weights = kohya_weights(get_peft_model_state_dict(unet), args.lora_alpha, unet.config.layers_per_block)
    header = kohya_metadata(args, unet.config.cross_attention_dim)
    header["modelspec.title"], sampler = usage_of(args)
    header["modelspec.usage_hint"] = f"sampler {sampler}, 2 to 8 steps, guidance 1 to 2"
    write_atomically(path, tensors_to_bytes(weights, header))


def save_for_peft(unet, folder):
    """Write the LoRA in float32 as `PeftModel.from_pretrained(unet, folder)` reads it; resuming reads it too."""
    unet.peft_config["default"].save_pretrained(folder)
    state = {f"base_model.model.{name}": value for name, value in get_peft_model_state_dict(unet).items()}
    write_atomically(folder / "adapter_model.safetensors", tensors_to_bytes(state))


def located(value):
    """Return the values of a flag with full paths, so that one place has one name."""
    values = value if isinstance(value, list) else [value]
    return [os.path.realpath(each) if each and os.path.exists(each) else each for each in values]


def settings_of(args, accelerator, max_train_steps, shards, workers):
    """Return what must stay the same for a resumed run to go on as an unbroken one would."""
    free = FREE_FLAGS | FLAGS_WITHOUT_EFFECT.keys()
    settings = {name: value for name, value in public_flags(args).items() if name not in free}
    settings["dataloader_num_workers"] = max(1, workers)  # the number in effect; 0 and 1 give the same order
    if args.lr_scheduler not in SCHEDULES_WITHOUT_END:
        settings["max_train_steps"] = max_train_steps  # the schedule's shape depends on it
    settings["number of shards"] = len(shards)  # one more or less would move every position
    settings["files of the data"] = data_checksum(shards)
    parts = "unet*", "vae*", "text_encoder*", "tokenizer*", "scheduler*"
    for name, model in ("teacher", args.pretrained_teacher_model), ("VAE", args.pretrained_vae_model_name_or_path):
        if model and Path(model).exists():
            settings[f"files of the {name}"] = fingerprint(Path(model), parts)
    settings["number of processes"] = accelerator.num_processes
    settings["mixed_precision"] = accelerator.mixed_precision
    return settings


def save_checkpoint(job, settings):
    """Write `checkpoint-<step>`; one that cannot be written is an error on all processes."""
    manifest = {"global_step": job.state.global_step, "script_version": SCRIPT_VERSION, "settings": settings}
    manifest["positions"] = dict(gather_object(list(job.state.positions.items())))
    manifest |= {"skipped": count_skipped(job), "wandb_run": job.state.wandb_run}
    agree(job.accelerator, write_checkpoint, job, manifest)
    job.state.saved_step = job.state.global_step


def write_checkpoint(job, manifest):
    """Write a checkpoint under another name, then rename it: the earlier ones stay whole whatever happens."""
    args, output_dir = job.args, Path(job.args.output_dir)
    final = output_dir / f"checkpoint-{manifest['global_step']}"
    scratch = output_dir / f".writing-{final.name}"
    old = scratch.with_name(f"{scratch.name}-old")
    if job.state.saved_step == manifest["global_step"] and read_manifest(final)[0]:
        return  # as where a signal comes before the next update
    try:
        for leftover in output_dir.glob(f"{scratch.name}*"):
            shutil.rmtree(leftover, ignore_errors=True)
        scratch.mkdir(parents=True)
        save_lora(job.student_unet, scratch / WEIGHTS_NAME, args)
        for folder_name, unet in trained_unets(job).items():
            (scratch / folder_name).mkdir()
            save_for_peft(unet, scratch / folder_name)
        with (scratch / "training_state.pt").open("wb") as file:
            torch.save({name: part.state_dict() for name, part in stateful_parts(job).items()}, file)
        files = [path for path in sorted(scratch.rglob("*")) if path.is_file()]
        for path in files:
            with path.open("rb+") as file:
                os.fsync(file.fileno())
        manifest["sizes"] = {path.relative_to(scratch).as_posix(): path.stat().st_size for path in files}
        write_atomically(scratch / MANIFEST_NAME, json.dumps(manifest, indent=1))
        if final.exists():  # damaged, or of a longer run that was resumed from an earlier checkpoint
            os.replace(final, old)
        os.replace(scratch, final)
        prune_checkpoints(output_dir, args.checkpoints_total_limit, final)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        shutil.rmtree(scratch, ignore_errors=True)
        with suppress(OSError):  # where `final` is there, or never was
            os.rename(old, final)
        is_of_gpu = isinstance(error, torch.AcceleratorError) or OUT_OF_MEMORY.search(str(error))
        if is_of_gpu or str(error).startswith("DataLoader worker"):  # killed meanwhile
            raise
        remedy = "make room or name another --output_dir, then give the same command again"
        cause = f"{final} cannot be written ({one_line(error)})"
        raise UnusableInput(f"{cause}; earlier checkpoints are whole; {remedy}") from error


def trained_unets(job):
    """Return the UNets with a LoRA in training, by their folder in a checkpoint."""
    return {"unet": job.student_unet} | ({"fake": job.fake.unet} if job.fake else {})


def stateful_parts(job):
    parts = {"optimizer": job.optimizer, "lr_schedule": job.lr_schedule, "scaler": job.accelerator.scaler}
    if job.fake:
        parts |= {"fake_optimizer": job.fake.optimizer, "fake_lr_schedule": job.fake.lr_schedule}
    return {name: part for name, part in parts.items() if part is not None}


def load_checkpoint(job, folder, manifest):
    if read_manifest(folder)[0] != manifest:  # which rank 0 has read
        raise UnusableInput(f"{folder} is not that of the first process; put --output_dir where all nodes see it")
    job.state.global_step, job.state.positions = manifest["global_step"], manifest["positions"]
    if is_of_run(folder, job.args):
        job.state.saved_step = manifest["global_step"]
    if job.accelerator.is_main_process:
        job.state.skipped.update(manifest.get("skipped", {}))
    try:
        loras = {name: load_file(folder / name / "adapter_model.safetensors") for name in trained_unets(job)}
        states = torch.load(folder / "training_state.pt", map_location="cpu", weights_only=True)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # each library has errors of its own for a damaged file of the right size
        remedy = "if it is damaged, remove it: 'latest' is then the one before"
        raise UnusableInput(f"{folder} cannot be read ({one_line(error)[:120]}); {remedy}") from error
    for name, unet in trained_unets(job).items():
        set_peft_model_state_dict(unet, loras[name])
    for name, part in stateful_parts(job).items():
        part.load_state_dict(states[name])


def list_checkpoints(output_dir):
    """Return the checkpoint folders in a run's folder, oldest first, complete or not."""
    steps = {path: path.name.partition("-")[2] for path in Path(output_dir).glob("checkpoint-*") if path.is_dir()}
    return sorted((path for path in steps if steps[path].isdecimal()), key=lambda path: int(steps[path]))


def prune_checkpoints(output_dir, limit, newest):
    """Remove the checkpoints written first, over the limit, and what interrupted writes left."""
    others = [folder for folder in list_checkpoints(output_dir) if folder != newest]  # whatever the clock says
    written = {path.parent: path.stat().st_mtime_ns for path in Path(output_dir).glob(f"*/{MANIFEST_NAME}")}
    others.sort(key=lambda folder: written.get(folder, 0))
    spare = others[: 1 - limit or None] if limit else []
    for path in chain(output_dir.glob(".writing-checkpoint-*"), spare):
        try:
            shutil.rmtree(path)
        except OSError as error:  # the new checkpoint is whole all the same
            tqdm.write(f"warning: {path} cannot be removed: {one_line(error)}", file=sys.stderr)


def read_manifest(folder):
    """Return (manifest, ""), or (None, reason) where the checkpoint cannot be resumed from."""
    try:
        manifest = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
        if "seal" in manifest:
            old = f"version {manifest.get('script_version')} of this script, in a form that version {SCRIPT_VERSION}"
            remedy = "finish that run with its own copy of the script (in its output folder)"
            remedy = f"{remedy}, or choose another --output_dir"
            raise UnusableInput(f"{folder} was written by {old} cannot resume; {remedy}")
        damaged = [name for name, size in manifest["sizes"].items() if (folder / name).stat().st_size != size]
        return (None, f"{damaged[0]} is damaged") if damaged else (manifest, "")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        return None, f"{getattr(error, 'filename', None) or MANIFEST_NAME} is missing or cannot be read"


def find_checkpoint(args, say):
    """Return (folder, manifest) to resume from, or (None, None) to start afresh."""
    wanted, existing = args.resume_from_checkpoint, list_checkpoints(args.output_dir)
    for folder in existing:
        if not (folder / MANIFEST_NAME).exists() and any(folder.glob("optimizer.*")):  # it would be removed in time
            raise UnusableInput(f"{folder}: is of another program; move it, or choose another --output_dir")
    if wanted == "none" and existing:
        found = f"{args.output_dir} holds checkpoints of an earlier run"
        raise UnusableInput(f"--resume_from_checkpoint none: {found}; remove them or choose another --output_dir")
    named = [] if wanted in ("none", "latest") else named_checkpoints(args)[:1]
    candidates = existing[::-1] if wanted == "latest" else named
    if named and existing and not is_of_run(named[0], args):
        if masked(wanted) != read_args(args.output_dir).get("resume_from_checkpoint"):
            remedy = "go on from them with 'latest', or name another folder"
            raise UnusableInput(f"--output_dir {args.output_dir}: holds checkpoints of another run; {remedy}")
        candidates = existing[::-1] + named  # the run began at that checkpoint, was stopped, and is requeued
    for folder in candidates:
        manifest, reason = read_manifest(folder)
        if manifest:
            if not is_of_run(folder, args):
                check_unused(args)
            return folder, manifest
        if folder in named:
            raise UnusableInput(f"--resume_from_checkpoint {folder}: {reason}; name a complete checkpoint or 'latest'")
        say(f"passing over {folder}: {reason}")
    check_unused(args)
    return None, None


def is_of_run(folder, args):
    return folder.resolve().parent == Path(args.output_dir).resolve()


def describe_resume(args, folder, step):
    line = f"resuming from {folder}" + "; --init_lora was read when the run began" * bool(args.init_lora)
    whole = filter(lambda path: read_manifest(path)[0], list_checkpoints(args.output_dir))
    later = [path.name for path in whole if int(path.name[11:]) > step]
    if later and is_of_run(folder, args) and args.resume_from_checkpoint != "latest":
        line += f"\nnote: 'latest' would go on from {later[-1]}: remove {', '.join(later)}"
    return line


def read_args(folder):
    """Return the flags of the last run in a folder, as `open_output` wrote them."""
    with suppress(OSError, ValueError, TypeError):
        return dict(json.loads((Path(folder) / "args.json").read_text(encoding="utf-8")))
    return {}


def check_unused(args):
    """Raise UnusableInput where a run that resumes nothing there would replace a LoRA or a README.md."""
    for name in (WEIGHTS_NAME, "README.md"):
        if (path := Path(args.output_dir) / name).exists():
            raise UnusableInput(f"--output_dir {args.output_dir}: the run would replace {path}; name another folder")


def check_resume(folder, manifest, settings, max_train_steps):
    parser = build_parser()
    # A checkpoint written before a flag existed behaved as that flag's default does; before a checksum, as today's.
    old = {name: settings[name] if " " in name else parser.get_default(name) for name in settings}
    old |= {name: value for name, value in manifest["settings"].items() if name in settings or name not in FREE_FLAGS}
    if len(old["teacher_revision"] or "") < 40 == len(settings["teacher_revision"] or ""):
        old["teacher_revision"] = settings["teacher_revision"]  # 0.2.0 noted the branch and not its commit
    for name in PLACES:
        if located(old.get(name)) == located(settings.get(name)):
            old[name] = settings.get(name)
    if changed := differences(old, settings):
        remedy = f"give the same ones, or start from its LoRA in another --output_dir with --init_lora {folder}"
        if not manifest["global_step"]:
            remedy = "it holds no update: remove it, or choose another --output_dir"
        raise UnusableInput(f"{folder} was made with other settings ({changed}); {remedy}")
    done = manifest["global_step"]
    if done > max_train_steps:
        remedy = f"give at least {done}, or name an earlier checkpoint"
        raise UnusableInput(f"--max_train_steps {max_train_steps}: {folder} is beyond it; {remedy}")


# ---- Log, validation pictures, model card, upload --------------------------------------------------------


class Log:
    """Progress bar, `log.jsonl`, trackers; losses stay on the device until `flush`, the only sync point."""

    MAX_SKIPPED_UPDATES = 20  # in a row; the loss scaler of fp16 has then shrunk the scale a million-fold
    FAKE_IS_LOST = 0.9  # a fake that predicts no noise at all has a loss of 1
    MAX_LOST_UPDATES = 20

    def __init__(self, job):
        self.job, self.accelerator = job, job.accelerator
        self.path = Path(job.args.output_dir) / "log.jsonl"
        self.rows = []  # (step, loss, gradient norm, learning rate, more by name) of updates since the last flush
        self.skipped_updates = self.lost_updates = 0
        self.started = time.monotonic()  # the clock of training alone
        last, is_main = job.state.global_step, self.accelerator.is_main_process
        options = {"unit": "update", "desc": "distilling", "mininterval": 1.0, "disable": not is_main}
        self.bar = tqdm(total=job.max_train_steps, initial=last, **options)
        if is_main and self.path.exists():
            # Lines after the update that the run resumes from go, and damaged ones, as a kill leaves.
            lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
            write_atomically(self.path, "".join(line for line in lines if self.step_of(line) <= last))

    @staticmethod
    def step_of(line):
        with suppress(ValueError, LookupError, TypeError):
            return int(json.loads(line)["step"]) if line.endswith("}\n") else math.inf
        return math.inf

    def add(self, step, loss, grad_norm, lr, watched=None):
        self.rows.append((step, loss, grad_norm, lr, watched or {}))
        self.bar.update()

    def flush(self):
        """Average the noted losses over processes, write them everywhere, and raise NonFiniteLoss on a bad one."""
        if not self.rows:
            return
        names = self.rows[-1][4]  # the first updates of a matching run have fewer
        skipped = torch.tensor(float(sum(self.job.state.skipped.values())))
        values = [
            [loss, norm, skipped, *(more.get(n, loss * 0) for n in names)] for _, loss, norm, _, more in self.rows
        ]
        values = torch.stack([torch.stack([value.to(row[0]) for value in row]) for row in values])
        values = self.accelerator.reduce(values, "mean").tolist()  # waits for the device and the other processes
        samples = len(self.rows) * samples_per_update(self.job.args, self.accelerator)
        speed, lines, error = samples / (time.monotonic() - self.started), [], None
        for (step, _, _, lr, more), (loss, norm, skipped, *watched) in zip(self.rows, values, strict=True):
            line = {"step": step, "loss": loss, "lr": lr, "grad_norm": norm, "samples_per_second": speed}
            line |= dict(zip(names, watched, strict=True)) if more else {}
            if skipped:  # a sum over the processes, which was made a mean
                line["skipped_samples"] = round(skipped * self.accelerator.num_processes)
            if torch.cuda.is_available():
                line["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
            if error := self.fault(line):
                break
            lines.append({name: value if math.isfinite(value) else None for name, value in line.items()})
        if self.accelerator.is_main_process:
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)
            for line in lines:
                values = {f"train/{key}": value for key, value in line.items() if key != "step" and value is not None}
                to_trackers(self.accelerator, operator.methodcaller("log", values, step=line["step"]))
        if error:
            raise NonFiniteLoss(error)
        self.bar.set_postfix(loss=f"{lines[-1]['loss']:.4f}", samples_per_s=f"{speed:.2f}")
        self.rows = []

    def fault(self, line):
        """Return why training must end after an update, or None."""
        broken = [f"{name} {value}" for name, value in line.items() if not math.isfinite(value)]
        self.skipped_updates = self.skipped_updates + 1 if broken else 0
        self.lost_updates = self.lost_updates + 1 if line.get("fake_loss", 0.0) > self.FAKE_IS_LOST else 0
        if self.lost_updates == self.MAX_LOST_UPDATES:
            cause = f"the fake score diverged: {self.lost_updates} updates up to {line['step']} have a loss near 1"
            return f"{cause}; take a new --output_dir, and lower --fake_learning_rate and --learning_rate"
        # The loss scaler of fp16 skips updates that overflow; without a scaler they ruin the weights.
        if broken and not (math.isfinite(line["loss"]) and self.accelerator.scaler):
            cause = ", ".join(broken)
        elif self.skipped_updates >= self.MAX_SKIPPED_UPDATES:
            cause = f"the fp16 loss scale collapsed: {self.skipped_updates} updates in a row overflowed"
        else:
            return None
        rates = "--learning_rate" + " or --fake_learning_rate" * (self.job.args.objective == "matching")
        vae = "" if self.job.args.objective == "matching" else "; a VAE may overflow in fp16"
        remedy = f"Lower {rates} or use --mixed_precision bf16 or no{vae}"
        return f"{cause} at update {line['step']}; the last checkpoint is untouched. {remedy}"


UNCLIPPED = {"clip_sample": False, "thresholding": False}  # to [-1, 1], which is for pixels and not for latents
TRAILING = {"timestep_spacing": "trailing", "set_alpha_to_one": True} | UNCLIPPED  # options of DDIM


def sampler_of(args):
    """Return (scheduler class, its options, eta) with which the LoRA is drawn."""
    if args.objective == "matching" or args.phases == 2:
        return DDIMScheduler, dict(TRAILING), args.student_eta if args.objective == "matching" else 0.0
    options = {"timestep_scaling": args.timestep_scaling_factor, "original_inference_steps": args.num_ddim_timesteps}
    return LCMScheduler, options | UNCLIPPED, 0.0


def usage_of(args):
    """Return the LoRA's title, and the name of the sampler that it is for."""
    kind, _, eta = sampler_of(args)
    euler = f"Euler a with eta {eta:g}" if eta else "Euler"
    ddim = f"DDIM with eta {eta:g} in diffusers, elsewhere {euler}, SGM Uniform"
    return ("LCM-LoRA", "LCM") if kind is LCMScheduler else ("LoRA of few steps", ddim)


@torch.no_grad()
def draw_pictures(job, unet, scheduler, step_counts, **settings):
    """Return {steps: [picture of each prompt]}, always from the same noise.

    It is empty where memory or the VAE of a cached run is missing, because the updates are worth more than pictures.
    """
    args, pipe, student_unet, own_scheduler = job.args, job.pipe, job.pipe.unet, job.pipe.scheduler
    options = {"height": args.resolution, "width": args.resolution, "output_type": "latent"} | settings
    uncond = {f"negative_{name}": value for name, value in job.uncond_embeds.items()}
    was_training, drawn = unet.training, {steps: [] for steps in step_counts}
    pictures = list(product(step_counts, range(len(job.prompts))))
    try:
        if not pipe.vae:  # a run on cached latents needs it only here
            parts = {name: getattr(pipe, name) for name in ("unet", "scheduler", *TEXT_PARTS)}
            pipe = load_teacher(args, job.dtype, job.accelerator.device, **parts)
        pipe.unet, pipe.scheduler = unet.eval(), scheduler
        of = "the teacher's pictures" if unet is job.teacher_unet else "validation"
        for steps, number in tqdm(pictures, desc=of, unit="picture", leave=False):
            embeds = uncond | {name: value[[number]] for name, value in job.prompt_embeds.items()}
            generator = torch.Generator().manual_seed(args.seed + number)
            latents = pipe(**embeds, **options, num_inference_steps=steps, generator=generator).images
            # Decoded in the VAE's own dtype, because SDXL's overflows in float16.
            decoded = pipe.vae.decode(latents.to(pipe.vae.dtype) / pipe.vae.config.scaling_factor).sample
            drawn[steps] += pipe.image_processor.postprocess(decoded.float())
    except (RuntimeError, UnusableInput) as error:  # cuDNN and cuBLAS name a lack of memory in their own ways
        tqdm.write(f"no pictures: {one_line(error)[:300]}; --validation_steps -1 leaves them out", file=sys.stderr)
        return {}
    finally:
        job.pipe.unet, job.pipe.scheduler = student_unet, own_scheduler
        unet.train(was_training)
    return drawn


def draw_teacher(job):
    """Return the teacher's picture of each prompt, beside which the student's are shown."""
    scheduler = DDIMScheduler.from_config(job.pipe.scheduler.config, **TRAILING)
    settings = {"guidance_scale": teacher_guidance(job.args)}
    return draw_pictures(job, job.teacher_unet, scheduler, [TEACHER_STEPS], **settings).get(TEACHER_STEPS, [])


def teacher_guidance(args):
    """Return the guidance scale w + 1 with which the teacher is drawn: 7.5, or the nearest that the student learns."""
    return min(max(7.5, args.w_min + 1), args.w_max + 1)


def validate(job):
    """Return {steps: [picture of each prompt]}, after giving them to the trackers and as a grid to `validation/`."""
    args, step, (kind, options, eta) = job.args, job.state.global_step, sampler_of(job.args)
    scheduler = kind.from_config(job.pipe.scheduler.config, **options)
    drawn = draw_pictures(job, job.student_unet, scheduler, VALIDATION_STEPS, guidance_scale=1.0, eta=eta)
    if not drawn:
        return {}
    columns = {f"{steps} step" + "s" * (steps > 1): row for steps, row in drawn.items()}
    if job.teacher_pictures:
        columns["teacher"] = job.teacher_pictures
    place = Path(args.output_dir) / "validation" / f"step-{step:07d}.png"
    place.parent.mkdir(exist_ok=True)
    grid_of(columns).save(place)
    to_trackers(job.accelerator, partial(log_pictures, columns=columns, prompts=job.prompts, global_step=step))
    record = {"prompts": job.prompts}
    if differences := differences_to_teacher(job, drawn):
        record["differences"] = differences
        values = {f"validation/difference_{steps}_steps": value for steps, value in differences.items()}
        to_trackers(job.accelerator, operator.methodcaller("log", values, step=step))
        said = in_words(differences)
        tqdm.write(f"update {step}: mean difference from the teacher's pictures {said}", file=sys.stderr)
    write_atomically(place.with_suffix(".json"), json.dumps(record, indent=1))
    return drawn


def differences_to_teacher(job, drawn):
    """Return {steps: mean difference, of 255, of the pictures from the teacher's of the same noise}.

    It is empty without --phases 2: other LoRAs follow their own path, and come no nearer while they improve.
    """
    if job.args.phases != 2 or not job.teacher_pictures:
        return {}
    teacher = np.stack(job.teacher_pictures).astype(np.float32)
    return {steps: round(float(np.abs(np.stack(row) - teacher).mean()), 3) for steps, row in drawn.items()}


def in_words(differences):
    numbers = ", ".join(f"{value:.1f}" for value in differences.values())
    return f"{numbers} of 255 at {', '.join(map(str, differences))} steps"


def grid_of(columns):
    """Return one picture of {title: [picture of each prompt]}, a column each."""
    cells = list(chain(*zip(*columns.values(), strict=True)))
    grid = make_image_grid(cells, len(cells) // len(columns), len(columns))
    grid = ImageOps.expand(grid, (0, 20, 0, 0), "white")
    for number, title in enumerate(columns):
        place = (number * grid.width // len(columns) + 4, 3)
        ImageDraw.Draw(grid).text(place, title, fill="black", font=ImageFont.load_default(12))
    return grid


def to_trackers(accelerator, log):
    """Call `log` with each tracker; one that fails is named and left, because updates are worth more."""
    for tracker in list(accelerator.trackers):
        try:
            log(tracker)
        except Exception as error:  # each tracker has errors of its own
            accelerator.trackers.remove(tracker)
            message = f"{tracker.name} failed and gets nothing more; log.jsonl has the numbers"
            tqdm.write(f"{message} ({one_line(error)[:200]})", file=sys.stderr)


def log_pictures(tracker, columns, prompts, global_step):
    if tracker.name == "wandb":
        import wandb

        pairs = [(title, *pair) for title, row in columns.items() for pair in zip(prompts, row, strict=True)]
        captioned = [wandb.Image(picture, caption=f"{prompt} ({title})") for title, prompt, picture in pairs]
        tracker.log({"validation": captioned}, step=global_step)
    elif hasattr(tracker, "log_images"):
        options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
        for title, pictures in columns.items():
            values = {f"validation/{title}": np.stack(pictures)}
            if tracker.name in ("aim", "clearml"):  # which take one picture a name
                values = {f"validation/{title}/{n}": np.array(picture) for n, picture in enumerate(pictures)}
            tracker.log_images(values, step=global_step, **options)


def write_card(job, drawn):
    """Write the pictures at 4 steps and the model card `README.md`."""
    args, folder = job.args, Path(job.args.output_dir)
    pictures = drawn.get(4, [])
    for number, picture in enumerate(pictures):
        picture.save(folder / f"image_{number}.png")
    for number in range(len(pictures), 100):  # of an earlier run with more prompts
        (folder / f"image_{number}.png").unlink(missing_ok=True)
    teacher = args.pretrained_teacher_model
    teacher = masked(teacher) if "://" in teacher else teacher
    from_hub = "://" not in teacher and not Path(teacher).exists()
    prompt = json.dumps(job.prompts[0], ensure_ascii=False)
    kind, load = "DiffusionPipeline", f'from_pretrained("{teacher if from_hub else "THE-TEACHER"}"'
    load += f', variant="{args.variant}"' * bool(args.variant)
    if "://" in teacher or Path(teacher).is_file():
        kind, load = type(job.pipe).__name__, 'from_single_file("THE-TEACHER"'
        if args.teacher_config:
            load += f', config="{"ITS-CONFIG" if Path(args.teacher_config).exists() else args.teacher_config}"'
    scheduler = sampler_of(args)[0]
    title, sampler = usage_of(args)
    description = f"""# {title}

Distilled from {teacher if from_hub else "a local teacher"}; draws in 2 to 8 steps.

{"<Gallery />" if drawn else ""}

```python
import torch
from diffusers import {scheduler.__name__}, {kind}
pipe = {kind}.{load}, torch_dtype=torch.float16)
pipe.to("cuda")  # on a CPU: torch.float32 above, and not this line
pipe.scheduler = {scheduler.__name__}.from_config(pipe.scheduler.config{changed_options(job)})
pipe.load_lora_weights("{job.state.repository or args.hub_model_id or NO_REPOSITORY}", adapter_name="lcm")
picture = pipe({prompt}, num_inference_steps=4, guidance_scale=1.0{call_options(args)}).images[0]
```

Use 2 to 8 steps and guidance 1 to 2; a negative prompt acts only above 1. ComfyUI, A1111 and Forge load the same
file, with CFG 1 to 2. Sampler: {sampler}. Pictures: {"4 steps, guidance 1" if drawn else "none"}.
The LoRA inherits the teacher's limits and biases.

| training | value |
|---|---|
{training_table(job, drawn)}
"""
    gallery = [{"text": text, "output": {"url": f"image_{i}.png"}} for i, text in enumerate(job.prompts)]
    origin = {"base_model": teacher if from_hub else None} | license_of(args, from_hub)
    data = ModelCardData(pipeline_tag="text-to-image", widget=gallery if drawn else None, **origin)
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n{description}")
    tags = "text-to-image diffusers diffusers-training lora lcm-lora template:sd-lora".split()
    write_atomically(folder / "README.md", str(populate_model_card(card, [*tags, *CARD_TAGS])))


def call_options(args):
    """Return what else the card's call gives: eta, and the side in px where it is not the family's."""
    eta, side = sampler_of(args)[2], args.resolution
    return f", width={side}, height={side}" * (side != DEFAULT_RESOLUTION_PX) + f", eta={eta:g}" * bool(eta)


def changed_options(job):
    """Return the sampler's options as the card's call of `from_config` needs them: ", NAME=VALUE" of each."""
    (scheduler, options, _), given = sampler_of(job.args), job.pipe.scheduler.config
    # What a single file tells by its keys, which diffusers does not read; False is the usual value.
    options |= {name: given.get(name) for name in ("prediction_type", "rescale_betas_zero_snr") if given.get(name)}
    usual = {"timestep_scaling": 10.0, "original_inference_steps": 50, "thresholding": False}
    usual["clip_sample"] = scheduler is DDIMScheduler
    # Any other option is written out, because `from_config` would take the teacher's value in place of a default.
    changed = {name: value for name, value in options.items() if {usual.get(name), given.get(name, value)} != {value}}
    return "".join(f", {name}={value!r}" for name, value in changed.items())


def training_table(job, drawn):
    """Return the rows of the card's table, without what is private, such as the data's place."""
    flags = "teacher_revision objective resolution train_batch_size gradient_accumulation_steps".split()
    flags += "max_train_steps learning_rate scale_lr lr_scheduler lr_warmup_steps use_8bit_adam lora_rank".split()
    flags += "lora_alpha lora_dropout w_min w_max num_ddim_timesteps seed".split() + READ_BY[job.args.objective]
    values = {flag: getattr(job.args, flag) for flag in flags}
    values |= {"max_train_steps": job.max_train_steps, "mixed_precision": job.accelerator.mixed_precision}
    values["processes"] = job.accelerator.num_processes
    if job.args.init_lora:  # a file that is gone since the run began must not be taken for a Hub id
        is_id = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*(?<!\.safetensors)", job.args.init_lora)
        values["init_lora"] = job.args.init_lora if is_id and not Path(job.args.init_lora).exists() else "a local LoRA"
    if differences := differences_to_teacher(job, drawn):
        compared = f"the teacher's {TEACHER_STEPS} steps, guidance {teacher_guidance(job.args):g}"
        values[f"mean difference of the pictures from {compared}"] = in_words(differences)
    return "\n".join(f"| {flag} | {value} |" for flag, value in values.items() if value is not None)


def license_of(args, from_hub):
    """Return license, license_name and license_link as the teacher's card has them."""
    teacher, place = args.pretrained_teacher_model, {"cache_dir": args.cache_dir, "revision": args.teacher_revision}
    with suppress(Exception):  # no card, or no network
        path = hf_hub_download(teacher, "README.md", **place) if from_hub else Path(teacher) / "README.md"
        return {name: value for name, value in ModelCard.load(path).data.to_dict().items() if "license" in name}
    return {}


def repository_name(args):
    return args.hub_model_id or Path(args.output_dir).resolve().name


def make_repository(args):
    """Make the Hub repository, if it is not there, before any GPU hour is spent; return its name with the owner's.

    A Hub out of reach is reported, and the name returned as it was given.
    """
    try:
        get_session().timeout = COMMAND_STALL_S
        options = {"private": not args.hub_public_repo, "exist_ok": True, "token": args.hub_token}
        name = create_repo(repository_name(args), **options).repo_id
        auth_check(name, token=args.hub_token, write=True)  # `create_repo` lets a token read what exists
        return name
    except (HTTPError, OSError, ValueError, ImportError) as error:  # the last: no package for a proxy of SOCKS
        status = getattr(getattr(error, "response", None), "status_code", 0)
        message = f"--push_to_hub: {repository_name(args)} cannot be made: {one_line(error)}"
        refused = status in range(400, 500) and status not in (408, 429)
        if refused or isinstance(error, (ValueError, ImportError, LocalTokenNotFoundError)):
            remedy = "log in with `hf auth login`"
            if isinstance(error, (ImportError, ValueError)):  # the latter of a name that the Hub does not allow
                remedy = "install it" if isinstance(error, ImportError) else "give --hub_model_id OWNER/NAME"
            raise UnusableInput(f"{message}; {remedy}, or leave the flag out") from error
        tqdm.write(f"{message}; the upload is tried again later", file=sys.stderr)
        return repository_name(args)


def publish(args):
    """Upload a finished run, unless its card was written without --push_to_hub and may show captions of the data."""
    path, shown = Path(args.output_dir) / "README.md", (args.validation_prompts or NEUTRAL_PROMPTS)[0]
    card = path.read_text(encoding="utf-8", errors="replace")
    if NO_REPOSITORY in card or json.dumps(shown, ensure_ascii=False) not in card:
        cause = f"{path} was not written for the Hub and may show captions of the data"
        remedy = "remove it, and the same command draws neutral prompts and writes another, or upload by `hf upload`"
        raise UnusableInput(f"--push_to_hub: {cause}; {remedy}")
    make_repository(args)
    push(args, args.output_dir)


def push(args, folder):
    """Upload a folder's LoRA, pictures and card, twice tried; a failure never costs the run."""
    name, files = repository_name(args), [WEIGHTS_NAME, "README.md", "image_*.png"]
    options = {"commit_message": "LoRA of few steps", "allow_patterns": files, "token": args.hub_token}
    for attempt in range(2):
        try:
            get_session().timeout = COMMAND_STALL_S  # by itself it waits for the Hub without end
            name = create_repo(name, private=not args.hub_public_repo, exist_ok=True, token=args.hub_token).repo_id
            address = upload_folder(repo_id=name, folder_path=folder, **options)
            return tqdm.write(f"uploaded to {address}", file=sys.stderr)
        except Exception as error:  # of HTTP, LFS, Xet or the disk
            tqdm.write(f"upload {attempt + 1} of 2 failed: {one_line(error)}", file=sys.stderr)
            time.sleep(2)
    include = " ".join(f"--include {shlex.quote(pattern)}" for pattern in files)
    private = " --private" * (not args.hub_public_repo)  # of a repository that it makes
    command = f"hf upload {name} {shlex.quote(str(folder))} {include}{private}"
    tqdm.write(f"not uploaded; publish the files later with: {command}", file=sys.stderr)


# ---- The run ---------------------------------------------------------------------------------------------

SCHEDULES_WITHOUT_END = ("constant", "constant_with_warmup")
MEMORY_SAVERS = {  # in the order of what they save for what they cost
    "--mixed_precision fp16": lambda args: (
        (args.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION")) in ("fp16", "bf16")
    ),
    "--gradient_checkpointing": lambda args: args.gradient_checkpointing,
    "--use_8bit_adam": lambda args: args.use_8bit_adam,
    "a smaller --train_batch_size with more --gradient_accumulation_steps": lambda args: args.train_batch_size == 1,
    "--vae_encode_batch_size 1": lambda args: args.vae_encode_batch_size == 1 or args.objective == "matching",
    "shards cached by scripts/cache_latents.py": lambda _args: False,
    "--use_4bit_base": lambda args: args.use_4bit_base,
}


def start(args):
    # DDP warns about the strides of 1x1-convolution gradients. Strides of size-1 dimensions carry no meaning.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    # fp16's loss scaler begins with updates that overflow and are skipped.
    warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    folder = Path(args.output_dir) / args.logging_dir
    trackers = None if args.report_to == "none" else args.report_to
    accelerator = make_accelerator(mixed_precision=args.mixed_precision, project_dir=str(folder), log_with=trackers)
    if accelerator.is_local_main_process:
        enable_progress_bars()  # transformers hides those of downloads too, which may take an hour
    # Not as an argument, over which accelerate's environment variable would win.
    accelerator.gradient_accumulation_steps = args.gradient_accumulation_steps
    if args.report_to not in ("none", "all") and not accelerator.log_with:
        remedy = "its package is not installed; install it or choose another"
        raise UnusableInput(f"--report_to {args.report_to}: {remedy}")
    check_launch(accelerator)
    if args.compile:
        try:
            torch.compile(lambda x: x.sin() + 1)(torch.zeros(8, device=accelerator.device))
        except Exception as error:  # no compiler, no Triton, a GPU that is too old for it
            cause = f"torch.compile does not work here ({one_line(error)[:160]})"
            raise UnusableInput(f"--compile: {cause}; leave it out") from error
    if args.use_8bit_adam and accelerator.device.type == "mps":
        raise UnusableInput("--use_8bit_adam: bitsandbytes has no kernels for MPS; leave it out")
    if args.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    return accelerator


def make_accelerator(wait_hours=6, **options):
    for name in ("DEEPSPEED", "FSDP", "MEGATRON_LM", "PARALLELISM_CONFIG"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "").lower() in ("true", "1"):  # which accelerate may set aside
            raise UnusableInput(f"{name} is not supported; launch with one or several GPUs or CPUs (DDP)")
    patience = InitProcessGroupKwargs(timeout=timedelta(hours=wait_hours))  # rank 0 may upload meanwhile
    try:
        accelerator = Accelerator(**options, kwargs_handlers=[patience])
    except (ValueError, ImportError, RuntimeError) as error:
        raise UnusableInput(f"accelerate cannot start: {one_line(error)}") from error
    if int(os.environ.get("WORLD_SIZE", 1)) != accelerator.num_processes:
        remedy = "on CPUs set ACCELERATE_USE_CPU=true and start them with torchrun"
        raise UnusableInput(f"launched as {os.environ['WORLD_SIZE']} processes, but each would work alone; {remedy}")
    return accelerator


def check_launch(accelerator):
    """Raise UnusableInput where the launch or the device would train something else than the flags describe."""
    kind, precision = accelerator.distributed_type, accelerator.mixed_precision
    if kind not in (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU):
        raise UnusableInput(f"{kind} is not supported; launch with one or several GPUs or CPUs (DDP)")
    here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    # A launcher can show each process a GPU of its own.
    is_own = gpus == 1 and any(f"{maker}_VISIBLE_DEVICES" in os.environ for maker in ("CUDA", "HIP", "ROCR"))
    if kind == DistributedType.MULTI_GPU and here > gpus and not is_own:
        raise UnusableInput(f"{here} processes for {gpus} visible GPUs; start one for each GPU")
    if precision not in DTYPES:
        raise UnusableInput(f"--mixed_precision {precision}: must be no, fp16 or bf16")
    is_cuda, built_for = accelerator.device.type == "cuda", " ".join(torch.cuda.get_arch_list())
    oldest = min(map(int, re.findall(r"(?:sm|compute)_(\d+)", built_for)), default=0)  # 0 on ROCm
    if is_cuda and oldest and int("{}{}".format(*torch.cuda.get_device_capability())) < oldest:
        remedy = "install it for an older CUDA, as from https://download.pytorch.org/whl/cu126"
        name = torch.cuda.get_device_name()
        raise UnusableInput(f"torch {torch.__version__} has no kernels for {name}, which is older; {remedy}")
    if is_cuda and precision == "bf16" and torch.cuda.get_device_capability() < (8, 0):
        cause = "only emulates bfloat16, because its compute capability is below 8.0"
        raise UnusableInput(f"--mixed_precision bf16: {torch.cuda.get_device_name()} {cause}; use fp16")
    if str(accelerator.state.dynamo_plugin.backend).upper().rpartition(".")[2] != "NO":
        raise UnusableInput("accelerate's dynamo settings would rename the LoRA's weights; unset them, use --compile")


def xformers_fault(device):
    """Return why the kernels of xformers do not run on a device, "" where they do."""
    if device.type != "cuda":
        return "it needs a CUDA GPU"
    try:
        import xformers.ops

        # The second is what diffusers itself tries.
        for shape, dtype in ((1, 8, 1, 64), torch.float16), ((1, 2, 40), torch.float32):
            query = torch.zeros(shape, dtype=dtype, device=device)
            xformers.ops.memory_efficient_attention(query, query, query)
    except Exception as error:  # no package, no library of its CUDA, no kernel for this GPU
        return f"xformers does not run with torch {torch.__version__} here ({one_line(error)[:120]})"
    return ""


def describe_device(accelerator):
    device, processes, precision = accelerator.device, accelerator.num_processes, accelerator.mixed_precision
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
    line = f"device: {name}, {processes} process{'es' * (processes > 1)}, mixed precision {precision}"
    if device.type == "cuda" and precision == "no":
        line += "; --mixed_precision fp16 or bf16 would halve the memory"
    if device.type == "cpu" and precision != "no":
        line += ", which most CPUs emulate; --mixed_precision no is faster here"
    has_driver = shutil.which("nvidia-smi") or Path("/proc/driver/nvidia/version").exists()
    if device.type == "cpu" and has_driver and os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("false", "0"):
        line += f"\nwarning: an NVIDIA driver is installed, but torch {torch.__version__} finds no GPU; "
        older = "CUDA 13 needs driver 580 or later: update it, or install torch from https://download.pytorch.org/whl/cu126"
        line += older if torch.version.cuda else "install torch from https://download.pytorch.org/whl/cu130"
    return line


def without_effect(args, device):
    """Return a line for each flag or variable of the user's that changes nothing."""
    lines = [f"--{flag} has no effect: {why}" for flag, why in FLAGS_WITHOUT_EFFECT.items() if getattr(args, flag)]
    flag = "enable_xformers_memory_efficient_attention"
    if getattr(args, flag) and (fault := xformers_fault(device)):
        lines.append(f"--{flag} has no effect: {fault}; PyTorch's SDPA computes the same")
    for flag in chain.from_iterable(READ_BY[objective] for objective in READ_BY.keys() - {args.objective}):
        if getattr(args, flag) != build_parser().get_default(flag):
            lines.append(f"--{flag} has no effect with --objective {args.objective}")
    name, steps = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS", args.gradient_accumulation_steps
    if os.environ.get(name, str(steps)) != str(steps):
        lines.append(f"{name}={os.environ[name]} is ignored: --gradient_accumulation_steps counts")
    return lines


def describe_data(shards, report, args, accelerator, workers):
    lines, total = [f"data: {report}"], count_samples(shards)
    updates, together = count_updates(args, accelerator), samples_per_update(args, accelerator)
    if total:
        epochs = updates * together / total
        epochs = f"{epochs:.2g}" if epochs < 100 else f"{epochs:.0f}"
        lines.append(f"data: {total} samples; {updates} updates of {together} are {epochs} epochs")
    if total and together > total:
        lines.append(f"warning: an update takes {together} samples, more than there are; use smaller batches")
    needed = 4 * workers * int(os.environ.get("LOCAL_WORLD_SIZE", 1)) * args.train_batch_size * 3 * args.resolution**2
    if workers and Path("/dev/shm").is_dir() and shutil.disk_usage("/dev/shm").free < needed:
        remedy = "start the container with --ipc=host or a larger --shm-size, or use --dataloader_num_workers 0"
        lines.append(f"warning: loader processes may need {needed >> 20} MiB in /dev/shm, which has less; {remedy}")
    return "\n".join(lines)


def describe_models(job, samples):
    config, schedule, tokenizer = job.pipe.scheduler.config, job.schedule, job.pipe.tokenizer
    betas = "zero terminal SNR" if schedule.alphas[-1] < 1e-3 else f"{config.beta_start} to {config.beta_end}"
    packed = ((p, getattr(p, "quant_state", None)) for p in job.teacher_unet.parameters())  # 4-bit weights
    number = sum(math.prod(state.shape) if state else p.numel() for p, state in packed)
    teacher = f"{number:,} parameters, {schedule.prediction_type}, {config.beta_schedule}"
    trainable = job.student_unet.num_parameters(only_trainable=True)
    lines = [f"teacher: {teacher} {betas}; LoRA: {trainable:,} trainable parameters"]
    if (kind := type(job.pipe.scheduler).__name__) in ("LCMScheduler", "TCDScheduler"):
        lines.append(f"warning: the teacher has {kind}: if it draws in few steps already, name its base model")
    if tokenizer:
        limit = tokenizer.model_max_length
        cut = sum(len(tokenizer(sample["caption"]).input_ids) > limit for sample in samples)
        lines += [f"captions cut at {limit} tokens: {cut} of the first {len(samples)}"] * bool(cut)
    if (top := int(schedule.ddim_timesteps[-1])) < 0.95 * len(schedule.alphas) - 1:
        cause = f"the noisiest timestep trained is {top}, and drawing begins with pure noise"
        lines.append(f"warning: --num_ddim_timesteps {job.args.num_ddim_timesteps}: {cause}; take a divisor of 1000")
    side = job.student_unet.config.sample_size
    if job.pipe.vae and isinstance(side, int) and side * job.pipe.vae_scale_factor != job.args.resolution:
        made_for = f"the teacher was made for {side * job.pipe.vae_scale_factor} px"
        lines.append(f"warning: --resolution is {job.args.resolution}, {made_for}")
    if job.pipe.vae and job.pipe.vae.dtype != job.dtype:
        remedy = "if it is SDXL's own, --pretrained_vae_model_name_or_path madebyollin/sdxl-vae-fp16-fix is faster"
        lines.append(f"this VAE overflows in fp16, so it computes in float32; {remedy}")
    return "\n".join(lines)


def samples_per_update(args, accelerator):
    return args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes


def count_updates(args, accelerator):
    updates = args.max_train_steps
    if not updates:
        if not args.max_train_samples:
            lack = "the data does not tell how many samples it holds"
            raise UnusableInput(f"--num_train_epochs {args.num_train_epochs}: {lack}; give --max_train_samples, too")
        samples = (args.num_train_epochs or 100) * args.max_train_samples
        updates = math.ceil(samples / samples_per_update(args, accelerator))
    of_lora = updates - args.fake_warmup_steps * (args.objective == "matching")
    if of_lora < 1:
        raise UnusableInput(f"--fake_warmup_steps {args.fake_warmup_steps}: give fewer than the {updates} updates")
    if args.lr_scheduler == "polynomial" and args.lr_warmup_steps >= of_lora:  # it would divide by zero
        raise UnusableInput(f"--lr_warmup_steps {args.lr_warmup_steps}: give fewer than the run's {of_lora} updates")
    return updates


def count_workers(args, accelerator, manifest):
    """Return the loader processes of each training process: the flag's, a checkpoint's, or what fits the machine.

    Processes whose CPUs differ have to agree on it, because the data is divided by it.
    """
    if args.dataloader_num_workers is not None:
        return args.dataloader_num_workers
    if manifest:
        return manifest["settings"]["dataloader_num_workers"]  # the order of samples depends on it
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    fitting = cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - 1
    return max(0, min(4, fitting)) if accelerator.device.type == "cuda" else 0


def agree(accelerator, function, *arguments):
    """Return what `function` returns on the main process, to all; an UnusableInput there is raised on all."""
    result = [None]
    if accelerator.is_main_process:
        try:
            result[0] = function(*arguments)
        except UnusableInput as error:
            error.is_agreed = True
            result[0] = error
    broadcast_object_list(result)
    if isinstance(result[0], UnusableInput):
        raise result[0]
    return result[0]


def wait_for_all():
    # Not by accelerate's barrier: LOCAL_RANK is not the GPU's number where each process sees its own alone, as 0.
    gather_object([None])


def lock_output(folder):
    """Return the lock on a run's folder, which the kernel frees when the process ends, however it does."""
    # A soft lock, which filelock takes where the disk has none, would outlive a run that stops for its requeue.
    lock = filelock.FileLock(folder / ".lock", fallback_to_soft=False)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout as error:
        raise UnusableInput(f"--output_dir {folder}: another run is writing there; wait or choose another") from error
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP):
            raise
        tqdm.write(f"warning: the disk of {folder} has no file locks; start no second run there", file=sys.stderr)
    return lock


def open_output(args, state):
    """Lock the output folder for as long as the process lives; write flags, versions and a copy of the script."""
    folder, script = Path(args.output_dir), Path(__file__)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        state.lock = lock_output(folder)
        if args.validation_steps >= 0:
            (folder / "validation").mkdir(exist_ok=True)  # now, and not once updates would be lost
        write_atomically(folder / "args.json", json.dumps(public_flags(args), indent=1))
        write_atomically(folder / "versions.json", json.dumps(package_versions(), indent=1))
        if not (folder / script.name).exists() or not script.samefile(folder / script.name):
            write_atomically(folder / script.name, script.read_bytes())
    except OSError as error:
        raise UnusableInput(f"--output_dir {folder} cannot be written: {one_line(error)}") from error


def package_versions():
    names = "accelerate bitsandbytes diffusers peft safetensors torch transformers wandb webdataset xformers".split()
    versions = {"script": SCRIPT_VERSION}
    for name in names:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


def start_trackers(args, accelerator, folder=None, manifest=None):
    """Start the trackers with flags and packages' versions as their configuration; return the id of wandb's run."""
    config = public_flags(args) | {f"version/{name}": value for name, value in package_versions().items()}
    config = {name: value if isinstance(value, (int, float, str)) else str(value) for name, value in config.items()}
    # MLflow tries for five minutes, at each end too; SwanLab records the process's own command line, with its secrets.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
    os.environ["SWANLAB_PROBE_RUNTIME"] = "false"
    kept = {"dir": str(Path(args.output_dir) / "dvclive"), "resume": True}  # else DVCLive deletes what was before
    options = {"wandb": {"dir": args.output_dir}, "dvclive": kept}
    has_wandb, others = args.report_to in ("wandb", "all"), {"WANDB_SWEEP_ID", "WANDB_FORK_FROM", "WANDB_RESUME_FROM"}
    wandb_run = manifest.get("wandb_run") if manifest and is_of_run(folder, args) else None
    if has_wandb and not others & os.environ.keys():  # a run that goes on stays one of wandb's
        wandb_run = os.environ.get("WANDB_RUN_ID") or wandb_run or os.urandom(4).hex()
        options["wandb"] |= {"id": wandb_run, "resume": os.environ.get("WANDB_RESUME", "allow")}
    try:
        accelerator.init_trackers(args.tracker_project_name, config, options)
    except Exception as error:  # each tracker has errors of its own
        remedy = "log in (wandb login), set WANDB_MODE=offline or another WANDB_RUN_ID, or "
        remedy = remedy * (has_wandb and not isinstance(error, OSError)) + "choose another tracker or folder"
        raise UnusableInput(f"--report_to {args.report_to} cannot start: {one_line(error)}; {remedy}") from error
    return wandb_run


def listen(state):
    """Handle the signals that ask a run to stop; return the handlers that were there before.

    While the run trains, the first signal is noted, and the loop saves a checkpoint; a second Ctrl-C ends the
    run at once. Before and after, nothing would be lost, and a signal ends the run at once.
    """

    def leave(name):
        print(f"\nstopped by {name}{saved_line(state) if state.is_saved else ''}", file=sys.stderr, flush=True)
        kill_children()
        os._exit(3 if state.is_saved else 128 + signal.Signals[name])

    def watch(*_):
        """End the run where it waits 10 s for an update's data: the other processes cannot be asked meanwhile."""
        if state.waits_at is not None and state.waits_at == state.watched_at:
            leave(state.stop_signal)
        state.watched_at = state.waits_at
        signal.alarm(10)

    def note(number, _frame):
        name = signal.Signals(number).name
        if not state.is_training or (name == "SIGINT" and state.is_interrupted):
            leave(name)
        is_first = not state.stop_signal
        if is_first and own_rank() == 0:
            # Not by `print`, which may not be entered twice.
            when = "after this update" if state.is_alone else "within --logging_steps updates"
            with suppress(OSError):
                os.write(2, f"\n{name}: a checkpoint is saved {when}; a second Ctrl-C does not wait\n".encode())
        state.stop_signal, state.is_interrupted = state.stop_signal or name, state.is_interrupted or name == "SIGINT"
        if hasattr(signal, "SIGCHLD"):
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # a loader process that ends must not raise while one saves
        if state.waits_at is not None and state.is_alone:
            state.waits_at = None
            raise StopWaiting
        if is_first and not state.is_alone and hasattr(signal, "alarm"):
            signal.signal(signal.SIGALRM, watch)
            watch()

    return {number: signal.signal(number, note) for number in STOP_SIGNALS}


def saved_line(state):
    return f"; checkpoint-{state.global_step} is saved, --resume_from_checkpoint latest (the default) goes on from it"


def kill_children():
    """End loader processes and the commands that they read from; wandb's and Python's services end by themselves."""
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler raises when a loader process dies
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error, OSError):  # it has ended
            if "wandb" in child.name():
                continue
            if os.name == "posix" and os.getpgid(child.pid) == child.pid:  # a command's group, which no fork escapes
                os.killpg(child.pid, signal.SIGKILL)
            if "multiprocessing.resource_tracker" not in " ".join(child.cmdline()):
                child.kill()


def train(job, loader, save):
    args, accelerator, state = job.args, job.accelerator, job.state
    batches, log = iter(loader), Log(job)
    state.is_training, state.is_alone = True, accelerator.num_processes == 1
    with log.bar:  # closed before an error is told, below which it would be drawn once more
        while state.global_step < job.max_train_steps:
            lr = job.lr_schedule.get_last_lr()[0]
            with suppress(StopWaiting):  # stopped while waiting for data: nothing is updated, the lines below save
                loss, grad_norm = update(job, batches)
                log.add(state.global_step, loss, grad_norm, lr, job.fake.watched if job.fake else {})
            last = state.global_step == job.max_train_steps
            is_due = last or state.global_step % args.checkpointing_steps == 0
            if is_due or state.global_step % args.logging_steps == 0 or (state.is_alone and state.stop_signal):
                log.flush()  # also the check that the loss is finite, before anything is saved
                if is_due:
                    save()
                asked = torch.tensor(float(state.stop_signal is not None), device=accelerator.device)
                if accelerator.reduce(asked, "sum").item():  # one of the processes had a signal
                    if not is_due:
                        save()
                    state.is_saved = True
                    tell_skipped(job)
                    raise StoppedBySignal(f"{state.stop_signal or 'a signal to another process'}{saved_line(state)}")
            if is_due and not last and args.push_checkpoints_to_hub and accelerator.is_main_process:
                push(args, Path(args.output_dir) / f"checkpoint-{state.global_step}")
            if args.validation_steps > 0 and state.global_step % args.validation_steps == 0 and not last:
                log.flush()  # trackers take steps in order
                if accelerator.is_main_process:
                    validate(job)
                wait_for_all()
            if not log.rows:
                log.started = time.monotonic()  # what was done since the last flush was not training
        state.is_training, state.is_saved = False, True


def count_skipped(job):
    return sum((Counter(part) for part in gather_object([dict(job.state.skipped)])), Counter())


def tell_skipped(job):
    total = count_skipped(job)
    if job.accelerator.is_main_process:
        tqdm.write(f"skipped samples: {describe(total) or 'none'}", file=sys.stderr)


def finish(job):
    args, accelerator, path = job.args, job.accelerator, Path(job.args.output_dir) / WEIGHTS_NAME
    tell_skipped(job)
    if accelerator.is_main_process:
        save_lora(job.student_unet, path, args)
        if args.validation_steps == 0:
            job.teacher_pictures = draw_teacher(job)
        write_card(job, validate(job) if args.validation_steps >= 0 else {})
        tqdm.write(f"the LoRA is {path}", file=sys.stderr)
        if args.push_to_hub:
            push(args, args.output_dir)
    wait_for_all()


def load_models(args, dtype, device, samples, cache):
    distinct = list({sample["caption"]: sample for sample in samples}.values())
    chosen = distinct[:: max(1, len(distinct) // 4)][:4]  # spread over what the audit read
    given = args.validation_prompts or (NEUTRAL_PROMPTS if args.push_to_hub else ())  # captions may be private
    prompts = list(given) or [sample["caption"] for sample in chosen]
    with torch.no_grad():
        if not cache:
            pipe = load_teacher(args, dtype, device)
            uncond_embeds, prompt_embeds = (encode_prompts(pipe, texts, device) for texts in ([""], prompts))
            scaling_factor = pipe.vae.config.scaling_factor
        else:  # VAE and text encoders stay away; prompts to draw need the encoders for a moment
            uncond_embeds = load_tensors(cache["safetensors"])
            scaling_factor = json.loads(cache["json"])["scaling_factor"]
            prompt_embeds = {name: torch.stack([sample[name] for sample in chosen]) for name in uncond_embeds}
            if given:
                prompt_embeds = encode_prompts(load_teacher(args, dtype, device, unet=None, vae=None), prompts, device)
            pipe = load_teacher(args, dtype, device, **dict.fromkeys(("vae", *TEXT_PARTS)))
    loaded = {"pipe": pipe, "scaling_factor": scaling_factor, "prompts": prompts}
    loaded["uncond_embeds"] = {name: value.to(device, dtype) for name, value in uncond_embeds.items()}
    loaded["prompt_embeds"] = {name: value.to(device, dtype) for name, value in prompt_embeds.items()}
    return loaded


def make_job(args, accelerator, samples, cache, state, is_resumed=False):
    dtype, max_train_steps = DTYPES[accelerator.mixed_precision], count_updates(args, accelerator)
    loaded = load_models(args, dtype, accelerator.device, samples, cache)
    student_unet = loaded["pipe"].unet
    schedule = make_schedule(loaded["pipe"].scheduler.config, args, accelerator.device)
    teacher_unet, fake = make_twin(student_unet), None
    prepare_unet(teacher_unet, args)
    if args.objective == "matching":
        fake = make_fake(student_unet, args, accelerator, loaded["pipe"].scheduler.config, max_train_steps)
    init_lora = init_lora_file(args) if args.init_lora and not is_resumed else None
    updates = max_train_steps - (args.fake_warmup_steps if fake else 0)  # of the student
    student, optimizer, lr_schedule = make_trainable(student_unet, args, accelerator, updates, init_lora)
    return Job(
        args=args, accelerator=accelerator, dtype=dtype, teacher_unet=teacher_unet, student_unet=student_unet,
        student=student, schedule=schedule, optimizer=optimizer, lr_schedule=lr_schedule,
        max_train_steps=max_train_steps, state=state, fake=fake, **loaded,
    )  # fmt: skip


def make_stream(job, shards, workers, cache):
    """Return the ShardStream of this process, at its start or where a checkpoint left it."""
    accelerator, state, consumers_here = job.accelerator, job.state, max(1, workers)
    tokenizers = [getattr(job.pipe, name) for name in TEXT_PARTS if name.startswith("tokenizer") and not cache]
    consumers, first = accelerator.num_processes * consumers_here, accelerator.process_index * consumers_here
    stream = ShardStream(shards, job.args, consumers, first, consumers_here, tokenizers, cache)
    mine = range(first, first + consumers_here)  # each process saves the positions of its own consumers
    state.positions = {name: place for name, place in state.positions.items() if int(name) in mine}
    stream.start_batch = state.global_step * job.args.gradient_accumulation_steps
    stream.start_positions = dict(state.positions)
    return stream


def is_finished(args, manifest, max_train_steps):
    """Return whether a run has done all its updates and written its last files after its last checkpoint."""
    files = [Path(args.output_dir) / name for name in ("README.md", WEIGHTS_NAME)]
    newest = max((folder.stat().st_mtime for folder in list_checkpoints(args.output_dir)), default=0)
    is_written = all(path.exists() and path.stat().st_mtime >= newest for path in files)
    is_written = is_written and files[1].stat().st_size == manifest["sizes"][WEIGHTS_NAME]
    return manifest["global_step"] == max_train_steps and is_written


@contextmanager
def trackers_ended(accelerator, state):
    """End the trackers whatever happens: they lose what they have not sent."""
    code = 0
    try:
        yield
    except BaseException as error:
        state.waits_at, code = None, int(not isinstance(error, StoppedBySignal))
        if any(tracker.name != "tensorboard" for tracker in accelerator.trackers):
            # Their end may take long, and this error is printed after it.
            tqdm.write(f"finishing the trackers after {type(error).__name__}: {one_line(error)}", file=sys.stderr)
        raise
    finally:
        state.is_training = False  # a signal ends the run at once, because a tracker may wait for its server
        to_trackers(accelerator, partial(end_tracker, code))


def end_tracker(code, tracker):
    if tracker.name == "wandb":  # accelerate's own way records a success whatever happened
        tracker.tracker.finish(exit_code=code)
    else:
        tracker.finish()


def distil(job, loader, save):
    if job.args.validation_steps > 0 and job.accelerator.is_main_process:
        job.teacher_pictures = draw_teacher(job)  # now, when a signal costs nothing
        if job.args.init_lora and not job.state.global_step:
            validate(job)  # what the run has to better
    wait_for_all()
    train(job, loader, save)
    finish(job)


def main(args, state):
    accelerator = start(args)
    say = partial(tqdm.write, file=sys.stderr) if accelerator.is_main_process else lambda _message: None
    say("\n".join([describe_device(accelerator), *without_effect(args, accelerator.device)]))
    args.teacher_revision = agree(accelerator, check_teacher, args)  # a branch may have moved when the run goes on
    say("reading the first samples" if args.max_train_steps or args.max_train_samples else "counting the samples")
    shards = agree(accelerator, list_shards, args.train_shards_path_or_url)
    if not (args.max_train_steps or args.max_train_samples):
        args.max_train_samples = agree(accelerator, count_samples, shards, True)
    samples, report, cache = agree(accelerator, audit, shards, args)
    folder, manifest = agree(accelerator, find_checkpoint, args, say)
    workers = agree(accelerator, count_workers, args, accelerator, manifest)
    max_train_steps = agree(accelerator, count_updates, args, accelerator)
    settings = agree(accelerator, settings_of, args, accelerator, max_train_steps, shards, workers)
    say(agree(accelerator, describe_data, shards, report, args, accelerator, workers))  # it reads files beside shards
    if manifest:
        agree(accelerator, check_resume, folder, manifest, settings, max_train_steps)
        if agree(accelerator, is_finished, args, manifest, max_train_steps):
            way_on = f"to go on, name another --output_dir with --init_lora {folder}"
            if args.lr_scheduler in SCHEDULES_WITHOUT_END:
                way_on = "a greater --max_train_steps goes on"
            say(f"this run is finished: {Path(args.output_dir) / WEIGHTS_NAME}; {way_on}")
            if args.push_to_hub and not args.dry_run:
                agree(accelerator, publish, args)
            return
        say(agree(accelerator, describe_resume, args, folder, manifest["global_step"]))
    elif args.resume_from_checkpoint == "latest":
        say(f"no complete checkpoint in {args.output_dir}: starting from update 0")
    if args.init_lora and not manifest:
        agree(accelerator, lambda: bool(read_lora(init_lora_file(args))))  # a wrong one is told before models load
    if args.dry_run:
        say(json.dumps(public_flags(args)))
        say("dry run: flags and data are in order, as far as it can be told without loading models or writing")
        return
    agree(accelerator, open_output, args, state)
    state.repository = agree(accelerator, make_repository, args) if args.push_to_hub else ""
    state.wandb_run = agree(accelerator, start_trackers, args, accelerator, folder, manifest)
    listen(state)  # again, because ClearML and SwanLab put handlers that end their record in place
    with trackers_ended(accelerator, state):
        say("loading the models")
        job = make_job(args, accelerator, samples, cache, state, is_resumed=bool(manifest))
        say(describe_models(job, samples))
        if manifest:
            load_checkpoint(job, folder, manifest)
        loader = make_loader(make_stream(job, shards, workers, cache), workers, accelerator.device)
        distil(job, loader, partial(save_checkpoint, job, settings))
    # Delete the DDP wrapper before destroying the process group: as the group's last owner its destructor would
    # wait for a gloo thread that waits for the GIL, and the run would hang at exit.
    del job
    accelerator.free_memory()


class Unbroken:
    """A stream that drops what it cannot write: `tee` ends at the Ctrl-C that a run still has to save at."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        with suppress(OSError):
            self.stream.write(text)

    def flush(self):
        with suppress(OSError):
            self.stream.flush()


def run(args):
    """Return the exit code of a run; every way out prints its reason and ends every process of the run."""
    if not (sys.stdout and sys.stderr):  # closed by `>&-`
        nowhere = open(os.devnull, "w", encoding="utf-8", errors="replace")
        sys.stdout, sys.stderr = sys.stdout or nowhere, sys.stderr or nowhere
    state, sys.stderr = RunState(), Unbroken(sys.stderr)
    handlers, code, is_agreed, printed = listen(state), 1, False, ""
    try:
        try:
            main(args, state)
        finally:
            kill_children()  # before the loader is deleted: it waits 5 s for each process that a stalled shard holds
        code, is_agreed = 0, True
    except (UnusableInput, NonFiniteLoss, StoppedBySignal) as error:
        code, is_agreed = error.exit_code, error.is_agreed
        printed = f"{'stopped' if code == 3 else 'error'}: {error}"
    except BaseException as error:
        if isinstance(error, RuntimeError) and OUT_OF_MEMORY.search(str(error)):
            missing = "; ".join(name for name, is_used in MEMORY_SAVERS.items() if not is_used(args))
            printed = f"error: out of GPU memory ({one_line(error)[:160]}); in this order, try {missing}"
        elif getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EACCES):
            place = error.errno == errno.EACCES and error.filename or f"--output_dir {args.output_dir}"
            remedy = "give this user the right" if error.errno == errno.EACCES else "make room"
            code, printed = 2, f"error: {place}: {error.strerror}; {remedy}, then give the command again"
        elif isinstance(error, RuntimeError) and re.search(r"gloo.*Connection (closed|reset) by peer", str(error)):
            cause = "another process has ended or is out of reach; its own lines say why, unless it was killed"
            printed = f"error: {cause} ({one_line(error)[:160]})"
        elif isinstance(error, RuntimeError) and re.search("^DataLoader worker|unable to allocate shared", str(error)):
            remedy = "use fewer --dataloader_num_workers or less --shuffle_buffer_samples, in a container --ipc=host"
            printed = f"error: a loader process failed; memory or /dev/shm may be short: {remedy}"
        else:
            tqdm.write(traceback.format_exc(), file=sys.stderr)
    if printed and (own_rank() == 0 or not is_agreed):
        tqdm.write("\n" * (own_rank() > 0) + printed, file=sys.stderr)  # below the bar, which is rank 0's
    for number, handler in handlers.items():
        signal.signal(number, handler)
    # A rank that fails alone must not wait here for ranks that are in another collective.
    if torch.distributed.is_initialized() and is_agreed:
        with suppress(RuntimeError, KeyboardInterrupt):  # another rank may be gone
            wait_for_all()  # torchrun ends rank 0 and its trackers once another has left
            torch.distributed.destroy_process_group()
    return code


# <<< shared: training

if __name__ == "__main__":
    EXIT_CODE = run(ARGS)
    sys.stdout.flush()
    sys.stderr.flush()
    if EXIT_CODE:
        os._exit(EXIT_CODE)  # the interpreter's own way out joins threads and processes, any of which may hang
