#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Distil an LCM-LoRA from an SDXL teacher (SDXL, SSD-1B, fine-tunes), so that it draws in 1 to 8 steps.

One GPU, several GPUs, and what a run does when the same command is given again:

    accelerate launch train_lcm_lora_sdxl.py \\
        --pretrained_teacher_model stabilityai/stable-diffusion-xl-base-1.0 \\
        --train_shards_path_or_url "/data/laion/{00000..00099}.tar" \\
        --max_train_steps 10000 --output_dir outputs/lcm-lora --mixed_precision fp16
    accelerate launch --multi_gpu --num_processes 8 train_lcm_lora_sdxl.py ...
    (it resumes from the newest complete checkpoint in --output_dir)

Input: webdataset shards of pictures and captions (`KEY.jpg|png|webp`, `KEY.txt`, `KEY.json`).
Output: `pytorch_lora_weights.safetensors` for diffusers, a copy with kohya's keys for ComfyUI and A1111,
checkpoints, pictures at 1, 2, 4 and 8 steps, `log.jsonl`, `args.json`, a model card.
Exit codes: 0 done; 2 wrong usage or unusable input; 3 stopped by SIGTERM or SIGUSR1 with a checkpoint saved;
1 anything else, such as a loss that is not finite. (`accelerate launch` turns each that is not 0 into 1.)

Sources: LCM = Latent Consistency Models, arXiv:2310.04378; LCM-LoRA, arXiv:2311.05556.
"""

import argparse
import gzip
import hashlib
import io
import json
import logging
import math
import operator
import os
import random
import re
import shlex
import shutil
import signal
import sys
import tarfile
import time
import warnings
import zlib
from collections import Counter, deque
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import chain, islice, product
from pathlib import Path

SCRIPT_VERSION = "0.1.0"

# ----------------------------------------------------------------------------------------------------------
# What is particular to this model family
# ----------------------------------------------------------------------------------------------------------

FAMILY = "SDXL"
OTHER_SCRIPT = "train_lcm_lora_sd15.py"
DEFAULT_RESOLUTION_PX = 1024
DEFAULT_W_MIN = 3.0  # range of the released SDXL recipe
TEXT_PARTS = ("tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2")
CARD_TAGS = (
    "text-to-image diffusers diffusers-training lora lcm-lora template:sd-lora "
    "stable-diffusion-xl stable-diffusion-xl-diffusers"
)
FP16_VAE = "madebyollin/sdxl-vae-fp16-fix"  # SDXL's own VAE overflows in float16

# >>> shared: constants
# Shapes: B batch, H and W pixels, h and w latent pixels, R resolution in pixels, T = 1000 training timesteps,
# N solver steps, k = T // N, L tokens, D text width.
LORA_TARGETS = (
    "to_q,to_k,to_v,to_out.0,proj_in,proj_out,ff.net.0.proj,ff.net.2,"
    "conv1,conv2,conv_shortcut,downsamplers.0.conv,upsamplers.0.conv,time_emb_proj"
)
SIGMA_DATA = 0.5  # of the boundary condition; LCMScheduler's value
VALIDATION_STEPS = (1, 2, 4, 8)
WEIGHTS_NAME = "pytorch_lora_weights.safetensors"
KOHYA_NAME = "lcm_lora_kohya.safetensors"
MANIFEST_NAME = "checkpoint.json"
LR_SCHEDULERS = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
SHARD_SUFFIXES = (*IMAGE_SUFFIXES, "txt", "json", "safetensors")  # nothing else in a shard is read
CACHE_KEY = "_cache"  # the sample that heads a shard of cached tensors and says how they were made
PACKAGES = (
    "torch accelerate diffusers peft transformers webdataset bitsandbytes xformers safetensors wandb".split()
)
READ_ATTEMPTS = 3
STALL_S = 30  # a server that sends nothing for so long is left
PUSH_ATTEMPTS = 5  # 1, 2, 4 and 8 s apart; in each the Hub's client tries single requests again by itself
AUDIT_USABLE_SAMPLES, AUDIT_SAMPLES = 32, 1000
# Flags that leave the weights of a run as they are; every other one must stay the same when a run is resumed.
FREE_FLAGS = frozenset(
    "cache_dir cast_teacher_unet checkpointing_steps checkpoints_total_limit dry_run gradient_checkpointing "
    "hub_model_id hub_token vae_encode_batch_size "
    "logging_dir logging_steps num_train_epochs max_train_samples max_train_steps output_dir push_to_hub "
    "push_checkpoints_to_hub report_to resume_from_checkpoint tracker_project_name validation_prompts "
    "validation_steps".split()
)


class UnusableInput(Exception):
    """Something the user must change: one line that names the thing and the remedy; exit code 2."""


class NonFiniteLoss(Exception):
    """The loss is NaN or infinite; exit code 1."""


class UploadFailed(Exception):
    """The Hub did not take the files, which are on disk; never the end of a run."""


class StoppedBySignal(Exception):
    """A signal asked the run to stop and its checkpoint is saved; exit code 3."""


# <<< shared: constants

# ----------------------------------------------------------------------------------------------------------
# Arguments
# ----------------------------------------------------------------------------------------------------------


# >>> shared: arguments
class OneLineParser(argparse.ArgumentParser):
    """Say what is wrong in one line, without the usage of every flag."""

    def error(self, message):
        """End the process with exit code 2."""
        self.exit(2, f"error: {message}; --help lists all flags\n")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keep the docstring's lines and print each default that says something."""

    def _get_help_string(self, action):
        """Return the help with its default."""
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


# fmt: off
def add_model_args(parser):
    """Add the flags that choose the teacher."""
    add = parser.add_argument_group("teacher").add_argument
    add("--pretrained_teacher_model", required=True,
        help="Hub id, diffusers folder, or single .safetensors/.ckpt file")
    add("--teacher_revision", help="Hub branch, tag or commit of the teacher")
    add("--variant", help="variant of the teacher's files, such as fp16")
    add("--teacher_config",
        help="diffusers folder or Hub id that describes a single-file teacher; default: fetched from the Hub")
    add("--pretrained_vae_model_name_or_path",
        help="Hub id or folder of a VAE to use in place of the teacher's own")
    add("--cache_dir", help="where files from the Hub are kept")
    add("--cast_teacher_unet", action="store_true",
        help="accepted and not needed: teacher and student share one UNet's weights")


def add_lora_args(parser):
    """Add the flags that shape the LoRA."""
    add = parser.add_argument_group("LoRA").add_argument
    add("--lora_rank", type=int, default=64, help="rank of every LoRA matrix")
    add("--lora_alpha", type=float, help="scale is alpha / rank; default: the rank, scale 1")
    add("--lora_dropout", type=float, default=0.0,
        help="dropout on the LoRA's input, in [0, 1); not in the target's pass")
    add("--lora_target_modules", default=LORA_TARGETS,
        help="comma-separated suffixes of the modules that get a LoRA")


def add_distillation_args(parser):
    """Add the flags of the consistency loss."""
    add = parser.add_argument_group("distillation").add_argument
    w_help = (
        "guidance w is drawn per sample; cond + w * (cond - uncond), so a pipeline's guidance_scale is w + 1"
    )
    add("--w_min", type=float, default=DEFAULT_W_MIN, help=f"least w: {w_help}")
    add("--w_max", type=float, default=15.0, help="greatest w")
    add("--num_ddim_timesteps", type=int, default=50, help="solver steps N over the T training timesteps")
    add("--loss_type", choices=("huber", "l2"), default="huber", help="distance between student and target")
    add("--huber_c", type=float, default=0.001, help="c of the pseudo-Huber loss sqrt(d^2 + c^2) - c")
    add("--loss_space", choices=("sample", "epsilon"), default="sample",
        help="where student and target are compared: clean latents, or the noise that they imply, which is "
        "alpha_t / sigma_t times that and so gives little noise more weight")
    add("--timestep_scaling_factor", type=float, default=10.0,
        help="timestep scaling of the boundary condition")
    add("--proportion_empty_prompts", type=float, default=0.0,
        help="share of captions replaced by the empty one, in [0, 1]")


def add_data_args(parser):
    """Add the flags of the training data."""
    add = parser.add_argument_group("data").add_argument
    add("--train_shards_path_or_url", nargs="+", required=True, metavar="SHARDS",
        help="webdataset shards: paths, folders, http(s) addresses, 'pipe:' commands; {00000..00099} expands")
    add("--resolution", type=int, default=DEFAULT_RESOLUTION_PX, help="side of the training pictures, px")
    add("--interpolation_type", choices=("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"),
        default="bilinear", help="how pictures are resized")
    add("--center_crop", action="store_true", help="crop the centre in place of a random part")
    add("--random_flip", action="store_true", help="mirror every other picture")
    add("--use_fix_crop_and_size", action="store_true",
        help="tell SDXL's UNet of pictures of the training size, not cropped; SD's UNet is told neither")
    add("--dataloader_num_workers", type=int, default=0,
        help="loader processes for each training process; 0: none")
    add("--shuffle_buffer_samples", type=int, default=1000,
        help="undecoded samples that a loader shuffles among")
    add("--max_train_samples", type=int, help="samples in one epoch, where epochs set the length of the run")
    add("--min_image_side_px", type=int, default=0, help="skip originals whose smaller side is less")
    add("--max_image_pixels", type=int, default=100_000_000, help="skip pictures with more pixels, undecoded")
    add("--max_watermark", type=float, help="skip samples with a greater watermark probability")
    add("--max_unsafe", type=float, help="skip samples with a greater unsafe probability")
    add("--min_aesthetic", type=float, help="skip samples with a smaller aesthetic score")
    add("--require_metadata", action="store_true", help="skip samples that lack a field which a filter needs")


def add_optimizer_args(parser):
    """Add the flags of the optimizer and of the length of the run."""
    add = parser.add_argument_group("optimization").add_argument
    add("--train_batch_size", type=int, default=16, help="samples of one process in one forward pass")
    add("--gradient_accumulation_steps", type=int, default=1, help="forward passes summed into one update")
    add("--max_train_steps", type=int,
        help="updates; default: from --num_train_epochs and --max_train_samples")
    add("--num_train_epochs", type=int, default=100,
        help="passes over --max_train_samples, without --max_train_steps")
    add("--learning_rate", type=float, default=1e-4, help="peak learning rate")
    add("--scale_lr", action="store_true", help="multiply the rate by batch size, accumulation and processes")
    add("--lr_scheduler", default="constant", choices=LR_SCHEDULERS, help="schedule, as in diffusers")
    add("--lr_warmup_steps", type=int, default=0, help="updates of linear warm-up, in every schedule")
    add("--use_8bit_adam", action="store_true", help="AdamW with 8-bit state (bitsandbytes)")
    add("--adam_beta1", type=float, default=0.9, help="decay of the first moment")
    add("--adam_beta2", type=float, default=0.999, help="decay of the second moment")
    add("--adam_weight_decay", type=float, default=0.0, help="decoupled weight decay")
    add("--adam_epsilon", type=float, default=1e-8, help="epsilon of Adam")
    add("--max_grad_norm", type=float, default=1.0, help="gradients are clipped to this norm")


def add_output_args(parser):
    """Add the flags of what a run writes and where."""
    add = parser.add_argument_group("output").add_argument
    add("--output_dir", default="lcm-lora", help="folder for everything the run leaves")
    add("--resume_from_checkpoint", default="latest",
        help="'latest': newest complete checkpoint, if any; a checkpoint's path; 'none': start afresh")
    add("--checkpointing_steps", type=int, default=500, help="updates between checkpoints")
    add("--checkpoints_total_limit", type=int, help="checkpoints kept; older ones are removed")
    add("--validation_steps", type=int, default=200,
        help="updates between validation pictures; 0: only at the end")
    add("--validation_prompts", nargs="+", metavar="PROMPT",
        help="prompts to draw; default: four captions of the data")
    add("--logging_steps", type=int, default=10,
        help="updates between two reads of the loss; also how soon signals act")
    add("--logging_dir", default="logs", help="folder of the TensorBoard files, inside --output_dir")
    add("--report_to", choices=("tensorboard", "wandb", "none"), default="tensorboard", help="tracker")
    add("--tracker_project_name", default="lcm-lora", help="project in the tracker")
    add("--push_to_hub", action="store_true",
        help="upload LoRA, pictures and model card when the run is done")
    add("--push_checkpoints_to_hub", action="store_true",
        help="with --push_to_hub: upload the LoRA of each checkpoint too")
    add("--hub_model_id", help="Hub repository; default: the name of --output_dir")
    add("--hub_token",
        help="Hub token; default: the one `hf auth login` or HF_TOKEN left; never written anywhere")
    add("--dry_run", action="store_true",
        help="check flags and data, print the run, and stop before any model loads")


def add_system_args(parser):
    """Add the flags of precision, memory and speed."""
    add = parser.add_argument_group("system").add_argument
    add("--seed", type=int, default=0, help="of sample order, noise, timesteps, w and LoRA weights")
    add("--mixed_precision", choices=("no", "fp16", "bf16"),
        help="compute dtype; default: accelerate's configuration")
    add("--allow_tf32", action="store_true", help="TF32 matrix products on Ampere and later GPUs")
    add("--gradient_checkpointing", action="store_true", help="recompute activations: less memory, slower")
    add("--use_4bit_base", action="store_true",
        help="frozen weights of the attention blocks in 4 bits (NF4, bitsandbytes): less memory, slower")
    add("--enable_xformers_memory_efficient_attention", action="store_true",
        help="xformers in place of SDPA; needs CUDA")
    add("--vae_encode_batch_size", type=int, default=4, help="pictures that the VAE encodes at a time")
    add("--compile", action="store_true",
        help="torch.compile of the transformer blocks; the first updates are slow")
# fmt: on


def build_parser():
    """Return the parser of all flags."""
    parser = OneLineParser(description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False)
    add_model_args(parser)
    add_lora_args(parser)
    add_distillation_args(parser)
    add_data_args(parser)
    add_optimizer_args(parser)
    add_output_args(parser)
    add_system_args(parser)
    return parser


# What is allowed, its check, and the flags it holds for; a flag that is None is not checked.
FLAG_RULES = (
    ("at least 1", lambda value: value >= 1, "lora_rank num_ddim_timesteps resolution train_batch_size "
     "gradient_accumulation_steps max_train_steps num_train_epochs max_train_samples checkpointing_steps "
     "checkpoints_total_limit logging_steps vae_encode_batch_size shuffle_buffer_samples max_image_pixels"),
    ("a multiple of 8", lambda value: value % 8 == 0, "resolution"),
    ("at least 0", lambda value: 0 <= value < math.inf, "dataloader_num_workers lr_warmup_steps "
     "validation_steps min_image_side_px w_min adam_weight_decay"),
    ("in [0, 2^63)", lambda value: 0 <= value < 2**63, "seed"),
    ("a finite number greater than 0", lambda value: 0 < value < math.inf, "lora_alpha learning_rate "
     "adam_epsilon max_grad_norm huber_c timestep_scaling_factor"),
    ("in [0, 1)", lambda value: 0 <= value < 1, "lora_dropout adam_beta1 adam_beta2"),
    ("in [0, 1]", lambda value: 0 <= value <= 1, "proportion_empty_prompts max_watermark max_unsafe"),
    ("a finite number", math.isfinite, "w_max min_aesthetic"),
)  # fmt: skip


def check_args(args, error):
    """Call `error` with the flag, its value and what is allowed, where the flags cannot make a run."""
    for allowed, holds, names in FLAG_RULES:
        for flag in names.split():
            value = getattr(args, flag)
            if value is not None and not holds(value):
                error(f"--{flag} {value}: must be {allowed}")
    if args.w_max < args.w_min:
        error(f"--w_max {args.w_max}: must be at least --w_min {args.w_min}")
    if args.num_ddim_timesteps < max(VALIDATION_STEPS):
        error(f"--num_ddim_timesteps {args.num_ddim_timesteps}: must be at least {max(VALIDATION_STEPS)}")
    if args.lr_scheduler == "polynomial" and args.learning_rate <= 1e-7:
        error(f"--learning_rate {args.learning_rate}: must be over 1e-7, where the polynomial schedule ends")
    if args.max_train_steps is None and args.max_train_samples is None:
        error(
            "--max_train_steps is missing: streamed shards have no known length; or give --max_train_samples"
        )
    if args.push_checkpoints_to_hub and not args.push_to_hub:
        error("--push_checkpoints_to_hub: needs --push_to_hub")
    if not args.lora_target_modules.strip(", "):
        error(f"--lora_target_modules {args.lora_target_modules!r}: must name at least one module suffix")


def check_paths(args, error):
    """Call `error` with the flag and the path where a local path does not lead anywhere."""
    if any(path.is_file() for path in (Path(args.output_dir), *Path(args.output_dir).parents)):
        error(f"--output_dir {args.output_dir}: is a file, or in one; name a folder")
    for flag in ("pretrained_teacher_model", "pretrained_vae_model_name_or_path", "teacher_config"):
        value = getattr(args, flag) or ""
        is_local = value.startswith((".", "/", "~")) or value.endswith((".safetensors", ".ckpt"))
        if (is_local or value.count("/") > 1) and not Path(value).exists():
            error(f"--{flag} {value}: no such file or folder; give an existing path or a Hub id, owner/name")
    for url in args.train_shards_path_or_url:
        if "{" not in url and not is_remote(url) and not Path(url).exists():
            error(f"--train_shards_path_or_url {url}: no such file or folder; check the path")
    resume = args.resume_from_checkpoint
    if resume not in ("latest", "none") and not Path(resume).is_dir():
        error(f"--resume_from_checkpoint {resume}: no such checkpoint; give 'latest', 'none' or its folder")


def is_remote(url):
    """Return whether a shard is read through a command or a network address."""
    return url.startswith("pipe:") or "://" in url


def parse_args(argv=None):
    """Return checked flags; wrong ones end the process with exit code 2 and one line."""
    parser = build_parser()
    args = parser.parse_args(argv)
    check_args(args, parser.error)
    check_paths(args, parser.error)
    if args.lora_alpha is None:
        args.lora_alpha = float(args.lora_rank)
    if argv is None:  # trackers record the command line
        sys.argv = [masked(word.replace(args.hub_token or "\0", "***")) for word in sys.argv]
    return args


def masked(text):
    """Return a text without the secrets that shard addresses may carry."""
    return re.sub(r"((?i:bearer)\s+)[^\s'\"]+|(://)[^/@\s]+(?=@)|hf_\w{8,}", r"\1\2***", text)


def public_flags(args):
    """Return the flags without secrets: what may be written and logged."""
    flags = {name: value for name, value in vars(args).items() if name != "hub_token"}
    flags["train_shards_path_or_url"] = [masked(url) for url in args.train_shards_path_or_url]
    return flags


# <<< shared: arguments

if __name__ == "__main__":
    ARGS = (
        parse_args()
    )  # before the imports below, which take seconds, so that --help and wrong flags answer at once

# >>> shared: imports
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # else imports warn of parts that are not used here
for _package in ("xformers", "bitsandbytes"):
    logging.getLogger(_package).setLevel(logging.ERROR)

import bitsandbytes
import diffusers
import numpy as np
import simplejpeg
import torch
import webdataset as wds
from accelerate import Accelerator
from accelerate.utils import DistributedType, ProjectConfiguration, broadcast_object_list, gather_object
from diffusers import AutoencoderKL, DDPMScheduler, LCMScheduler
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.optimization import get_scheduler
from diffusers.training_utils import _collate_lora_metadata, cast_training_params
from diffusers.utils import logging as diffusers_logging
from huggingface_hub import ModelCard, ModelCardData, create_repo, upload_folder
from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalTokenNotFoundError
from peft import LoraConfig
from peft.tuners import lora
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from PIL import ExifTags, Image, ImageDraw, ImageFont, ImageOps
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import load_file, save_file
from torch.nn import functional
from torch.nn.grad import conv2d_input, conv2d_weight
from tqdm.auto import tqdm
from transformers.utils import logging as transformers_logging
from webdataset.tariterators import group_by_keys

# <<< shared: imports

# ----------------------------------------------------------------------------------------------------------
# Schedule and consistency mathematics: pure functions of float32 tensors
# ----------------------------------------------------------------------------------------------------------


# >>> shared: mathematics
@dataclass(frozen=True)
class Schedule:
    """The teacher's noise schedule and the solver's grid on it."""

    alphas: torch.Tensor  # [T] f32; alphas^2 + sigmas^2 = 1
    sigmas: torch.Tensor  # [T] f32
    ddim_timesteps: torch.Tensor  # [N] int64, ascending: k-1, 2k-1, ..., T-1 (trailing)
    k: int
    prediction_type: str
    timestep_scaling: float

    def at(self, timesteps):
        """Return (alpha_t, sigma_t), each [B,1,1,1], at timesteps [B]."""
        shape = (-1, 1, 1, 1)
        return self.alphas[timesteps].view(shape), self.sigmas[timesteps].view(shape)


def make_schedule(scheduler_config, num_ddim_timesteps, timestep_scaling, device, loss_space="sample"):
    """Return the Schedule of a diffusers scheduler config.

    Raises:
        UnusableInput: the prediction type is unknown, the solver has more steps than the schedule, or the
            schedule ends in pure noise, from which eps gives no clean latent, nor a clean latent eps.
    """
    scheduler = DDPMScheduler.from_config(scheduler_config)
    prediction_type = scheduler.config.prediction_type
    if prediction_type not in ("epsilon", "v_prediction", "sample"):
        raise UnusableInput(
            f"teacher: prediction_type {prediction_type!r} is not epsilon, v_prediction or sample"
        )
    alphas_cumprod = scheduler.alphas_cumprod.to(torch.float32)
    if "epsilon" in (prediction_type, loss_space) and alphas_cumprod[-1] < 1e-6:
        raise UnusableInput(
            "teacher: its schedule ends at zero terminal SNR, where only v_prediction can be distilled, with "
            "--loss_space sample"
        )
    num_timesteps = len(alphas_cumprod)
    if num_ddim_timesteps > num_timesteps:
        raise UnusableInput(f"--num_ddim_timesteps {num_ddim_timesteps}: the teacher has {num_timesteps}")
    k = num_timesteps // num_ddim_timesteps
    return Schedule(
        alphas=alphas_cumprod.sqrt().to(device),
        sigmas=(1 - alphas_cumprod).sqrt().to(device),
        ddim_timesteps=(torch.arange(1, num_ddim_timesteps + 1) * k - 1).to(device),
        k=k,
        prediction_type=prediction_type,
        timestep_scaling=timestep_scaling,
    )


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
    alpha_prev, sigma_prev = schedule.at(prev_timesteps)
    return alpha_prev * z0 + sigma_prev * eps


def boundary_scalings(timesteps, timestep_scaling):
    """Return (c_skip, c_out), each [B,1,1,1]: 1 and 0 at timestep 0 (LCM, sec. 3; LCMScheduler's)."""
    scaled = timesteps.to(torch.float32).view(-1, 1, 1, 1) * timestep_scaling
    c_skip = SIGMA_DATA**2 / (scaled**2 + SIGMA_DATA**2)
    c_out = scaled / (scaled**2 + SIGMA_DATA**2).sqrt()
    return c_skip, c_out


def distance(pred, target, loss_type, huber_c):
    """Return the mean squared difference, or the mean pseudo-Huber one (arXiv:2310.14189), over elements."""
    difference = pred - target
    if loss_type == "l2":
        return difference.square().mean()
    return ((difference.square() + huber_c**2).sqrt() - huber_c).mean()


def loss_between(schedule, pred, target, timesteps, args):
    """Return the distance of clean latents z_0 [B,4,h,w], or of eps = (z_t - alpha z_0) / sigma."""
    if args.loss_space == "epsilon":
        alpha_t, sigma_t = schedule.at(timesteps)
        pred, target = pred * (alpha_t / sigma_t), target * (alpha_t / sigma_t)
    return distance(pred, target, args.loss_type, args.huber_c)


# <<< shared: mathematics

# ----------------------------------------------------------------------------------------------------------
# One training step
# ----------------------------------------------------------------------------------------------------------


# >>> shared: step
@dataclass
class Draws:
    """The random numbers of one forward pass: a function of (seed, update, micro step, process)."""

    posterior_eps: torch.Tensor  # [B,4,h,w], for the VAE's posterior
    eps: torch.Tensor  # [B,4,h,w], the forward process's noise
    index: torch.Tensor  # [B] int64 in 0..N-1, position in the solver's grid
    w: torch.Tensor  # [B,1,1,1] guidance
    empty: list  # [B] bool, captions to drop


def send(tensor, device):
    """Return a CPU tensor on the device, without waiting for the work that is queued there."""
    if torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def draw(args, shape, global_step, micro_step, process_index, device):
    """Return the Draws for latents of `shape` [B,4,h,w]; also seeds torch, for LoRA dropout."""
    key = np.random.SeedSequence([args.seed, global_step, micro_step, process_index])
    seed = int(key.generate_state(1, np.uint64)[0] >> 1)
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)  # on the CPU, so that every device sees the same numbers
    batch = shape[0]
    posterior_eps, eps = send(torch.randn(2, *shape, generator=generator), device)
    index = torch.randint(args.num_ddim_timesteps, (batch,), generator=generator)
    w = args.w_min + (args.w_max - args.w_min) * torch.rand(batch, 1, 1, 1, generator=generator)
    empty = (torch.rand(batch, generator=generator) < args.proportion_empty_prompts).tolist()
    return Draws(posterior_eps, eps, send(index, device), send(w, device), empty)


def predict(unet, z_t, timesteps, conditioning, dtype):
    """Return the UNet's output as float32; the one place where the compute dtype takes effect."""
    return unet(z_t.to(dtype), timesteps, **conditioning, return_dict=False)[0].float()


def join(first, second):
    """Return two conditionings, dicts of tensors or of such dicts, as one batch."""
    return {
        name: join(value, second[name]) if isinstance(value, dict) else torch.cat([value, second[name]])
        for name, value in first.items()
    }


def consistency(unet, schedule, z_t, timesteps, conditioning, dtype):
    """Return f(z_t, t) = c_skip z_t + c_out z0 (LCM, eq. 8)."""
    c_skip, c_out = boundary_scalings(timesteps, schedule.timestep_scaling)
    z0, _ = clean_estimate(schedule, predict(unet, z_t, timesteps, conditioning, dtype), z_t, timesteps)
    return c_skip * z_t + c_out * z0


def teacher_step(teacher, schedule, z_t, timesteps, prev_timesteps, conditioning, uncond, w, dtype):
    """Return z_prev, the guided DDIM step of the teacher; both halves of the guidance are one batch."""
    double = timesteps.repeat(2)
    output = predict(teacher, z_t.repeat(2, 1, 1, 1), double, join(conditioning, uncond), dtype)
    z0, eps = clean_estimate(schedule, output, z_t.repeat(2, 1, 1, 1), double)
    (z0_cond, z0_uncond), (eps_cond, eps_uncond) = z0.chunk(2), eps.chunk(2)
    z0_cfg = z0_cond + w * (z0_cond - z0_uncond)
    eps_cfg = eps_cond + w * (eps_cond - eps_uncond)
    return ddim_step(schedule, z0_cfg, eps_cfg, prev_timesteps)


def distillation_loss(student, unet, teacher, schedule, latents, conditioning, uncond, draws, args, dtype):
    """Return the consistency distillation loss of clean latents [B,4,h,w] (LCM, Alg. 1, with a LoRA student).

    `unet` is the UNet with its LoRA; `student` is the same module, wrapped for gradient synchronization;
    `teacher` is the UNet without the LoRA.
    """
    # 1. A jump of the solver's grid, from t_{n+k} down to t_n.
    timesteps = schedule.ddim_timesteps[draws.index]
    prev_timesteps = (timesteps - schedule.k).clamp(min=0)
    # 2. The noisy latent at the upper end.
    z_t = add_noise(schedule, latents, draws.eps, timesteps)
    if args.lora_dropout:  # switching walks the whole UNet, which for SDXL's 9,810 modules takes long
        unet.eval()  # the target is computed without dropout
    with torch.no_grad():
        # 3. The teacher's guided step to the lower end.
        z_prev = teacher_step(
            teacher, schedule, z_t, timesteps, prev_timesteps, conditioning, uncond, draws.w, dtype
        )  # fmt: skip
        # 4. Where the student itself, without gradient, sends the lower end.
        target = consistency(unet, schedule, z_prev, prev_timesteps, conditioning, dtype)
    # 5. Where the student sends the upper end: the two should agree.
    if args.lora_dropout:
        unet.train()
    pred = consistency(student, schedule, z_t, timesteps, conditioning, dtype)
    return loss_between(schedule, pred, target, timesteps, args)


# <<< shared: step

# ----------------------------------------------------------------------------------------------------------
# Data
# ----------------------------------------------------------------------------------------------------------


# >>> shared: data
# Spellings of LAION's and img2dataset's metadata, in lower case.
METADATA_KEYS = {
    "width": ("original_width", "width"),
    "height": ("original_height", "height"),
    "watermark": ("pwatermark", "watermark", "watermark_score"),
    "unsafe": ("punsafe", "unsafe", "unsafe_score"),
    "aesthetic": ("aesthetic", "aesthetic_score", "aesthetics", "aesthetic_score_laion_v2"),
}


TAR_BLOCK = 512  # bytes
TAR_FILES = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
TAR_BODILESS = b"123456"  # types of links, devices and folders: whatever size their header says
MAX_TAR_EXTENDED = 2**20  # bytes of a header that says more of a member
TAR_EXTENDED = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
STREAM_ERRORS = (OSError, EOFError, ValueError, tarfile.TarError, zlib.error)  # a shard cannot be read on
Image.MAX_IMAGE_PIXELS = None  # --max_image_pixels is the limit, looked at before a picture is decoded


class SkippedSample(Exception):
    """A sample that is not used; the message is the cause, the same for all samples of that cause."""


def list_shards(values):
    """Return every shard that the values of --train_shards_path_or_url name, checking the local ones.

    Raises:
        UnusableInput: a local shard is missing, empty, truncated or not a tar.
    """
    shards = []
    for value in values:
        if is_remote(value) or not Path(value).is_dir():
            try:
                shards += wds.SimpleShardList(value).urls
            except ValueError as error:
                raise UnusableInput(
                    f"--train_shards_path_or_url {masked(value)}: {error}; mend it"
                ) from error
            continue
        found = sorted(str(path) for path in Path(value).glob("[!.]*.tar"))
        if not found:
            raise UnusableInput(f"--train_shards_path_or_url {value}: holds no .tar file; name one that does")
        shards += found
    for shard in shards:
        if not is_remote(shard):
            check_shard(Path(shard))
    return shards


def check_shard(path):
    """Raise UnusableInput for a local tar that cannot be read to its end; looks at 2 kB of it."""
    remedy = "; write or download it again, or leave it out"
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(512)
            file.seek(max(0, size - 1024))
            tail = file.read()
    except OSError as error:
        raise UnusableInput(f"shard {path}: {error.strerror}; check --train_shards_path_or_url") from error
    if not head.strip(b"\0"):
        raise UnusableInput(f"shard {path}: is empty{remedy}")
    if path.suffix != ".tar":
        return  # compressed: only reading it can tell
    try:
        tarfile.TarInfo.frombuf(head, "utf-8", "replace")
    except tarfile.HeaderError as error:
        raise UnusableInput(f"shard {path}: is not a tar file{remedy}") from error
    if size % 512 or tail.strip(b"\0"):
        raise UnusableInput(f"shard {path}: is truncated, its end mark is missing{remedy}")


def read_shard(shard, skipped, cache=None):
    """Yield a shard's samples, undecoded; a broken stream is read again, then counted and left.

    Where `cache` is the head of the first shard of a cache, those made in another way are counted and left.
    """
    done = 0
    for attempt in range(READ_ATTEMPTS):
        time.sleep(attempt)
        try:
            for sample in islice(group_by_keys(shard_members(shard)), done, None):
                done += 1
                if sample["__key__"] != CACHE_KEY:
                    yield sample
                elif cache and cache["json"] != sample.get("json"):
                    skipped[f"shard {shard} was cached in another way than the first one"] += 1
                    return
            return
        except STREAM_ERRORS as error:
            cause = f"{type(error).__name__}: {error.args[0] if error.args else error}"
    skipped[f"shard {shard} broke off ({cause})"] += 1


def open_shard(shard):
    """Return the stream of a shard; curl, which webdataset takes too, here leaves a server that stalls."""
    if shard.startswith(("http://", "https://")):
        limits = f"--connect-timeout {STALL_S} --speed-limit 1 --speed-time {STALL_S}"
        shard = f"pipe:curl --fail --silent --location {limits} {shlex.quote(shard)}"
    return wds.gopen(shard)


def shard_members(shard):
    """Yield the members of a shard that are read, as group_by_keys of webdataset wants them.

    Raises:
        one of STREAM_ERRORS: the tar cannot be read to its end, or the command that gives it failed.
    """
    stream = open_shard(shard)
    tar = io.BufferedReader(Readable(stream), 2**16)
    head = tar.peek(6)
    if head.startswith(b"\x1f\x8b"):
        tar = gzip.open(tar)
    elif head.startswith((b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")):
        raise tarfile.ReadError("packed with bzip2, xz or zstd; give it as 'pipe:xz -dc FILE' or the like")
    for name, data in tar_members(tar):
        yield {"fname": name, "data": data, "__url__": shard}
    while tar.read(2**20):
        pass  # a command whose output nobody reads would fail
    stream.close()  # raises where the command did


class Readable(io.RawIOBase):
    """A stream of webdataset's, which has `read` alone, as one that can be buffered."""

    def __init__(self, stream):
        """Read from `stream`."""
        self.stream = stream

    def readable(self):
        """Return that it is."""
        return True

    def readinto(self, buffer):
        """Fill the buffer; return how many bytes there were."""
        data = self.stream.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def tar_members(tar):
    """Yield (name, data) of the members of a tar that are read: pax, ustar, and GNU's long names.

    tarfile would take as long for a sample's headers as a third of decoding a picture of 512 px.
    """
    extended = {}  # what headers before a member's own say of it
    while any(header := b"".join(pieces(tar, TAR_BLOCK))):
        name, size, kind = read_header(header)
        if kind in TAR_BODILESS:
            size = 0
        elif kind not in TAR_EXTENDED:
            name, size = extended.get("path", name), int(extended.get("size", size))
        is_wanted = kind in TAR_FILES and is_data(name)
        if (
            kind == tarfile.GNUTYPE_SPARSE
            or is_wanted
            and any(key.startswith("GNU.sparse") for key in extended)
        ):
            raise tarfile.ReadError("sparse files are not read; pack without --sparse")
        if size < 0 or kind in TAR_EXTENDED and size > MAX_TAR_EXTENDED:
            raise tarfile.ReadError(f"damaged header, size {size}")
        data = b"".join(pieces(tar, size if is_wanted or kind in TAR_EXTENDED else 0))
        deque(pieces(tar, size + -size % TAR_BLOCK - len(data)), maxlen=0)  # the rest goes nowhere
        if kind == tarfile.XHDTYPE:
            extended |= pax_records(data)
        elif kind == tarfile.GNUTYPE_LONGNAME:
            extended["path"] = data.partition(b"\0")[0].decode("utf-8", "surrogateescape")
        elif kind not in TAR_EXTENDED:
            extended = {}
            if is_wanted:
                yield name, data
    if extended:
        raise tarfile.ReadError("ends behind an extended header")


def pieces(tar, size):
    """Yield the next `size` bytes of a tar, in pieces; raises ReadError where it ends before."""
    while size > 0:
        piece = tar.read(min(size, 2**20))
        if not piece:
            raise tarfile.ReadError("ends before its end mark")
        yield piece
        size -= len(piece)


def read_header(block):
    """Return (name, size, type) of a tar's member; raises HeaderError for a damaged header."""
    kind, is_posix = block[156:157], block[257:265] == b"ustar\x0000"
    if is_posix and kind in (tarfile.REGTYPE, tarfile.XHDTYPE) and not block[345]:  # the name is whole
        name, size, checksum = (block[a:b].partition(b"\0")[0] for a, b in ((0, 100), (124, 136), (148, 156)))
        # Adler's lower half is the sum of the bytes, mod 65,521; the checksum's own count as spaces.
        total = (zlib.adler32(block, 0) & 0xFFFF) - sum(block[148:156]) + 8 * 32
        with suppress(ValueError):  # raised for a number written in another way
            if (int(checksum, 8) - total) % 65_521 == 0:
                return name.decode("utf-8", "surrogateescape"), int(size, 8), kind
    member = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")  # knows every kind, and is slow
    return member.name, member.size, member.type


def pax_records(data):
    """Return a dict of the records of an extended header: lines "length key=value"; raises ReadError."""
    data, start, records = data.rstrip(b"\0"), 0, {}
    while start < len(data):
        length, _, _ = data[start : start + 20].partition(b" ")
        end = start + int(length) if length.isdigit() else 0
        if not start + len(length) < end <= len(data):
            raise tarfile.ReadError("damaged extended header")
        key, _, value = data[start + len(length) + 1 : end - 1].partition(b"=")
        records[key.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        start = end
    return records


def is_data(name):
    """Return whether a member of a shard is read: pictures, text and json, nothing like a program."""
    return name.rpartition(".")[2].lower() in SHARD_SUFFIXES


def metadata_of(sample):
    """Return the fields of METADATA_KEYS that a sample's json holds as numbers, and its caption."""
    if "json" not in sample:
        return {}
    try:
        record = json.loads(sample["json"])
        record = {str(name).lower(): value for name, value in record.items()}
    except (ValueError, AttributeError, RecursionError) as error:
        raise SkippedSample("json cannot be read") from error
    found = {"caption": record["caption"]} if isinstance(record.get("caption"), str) else {}
    for name, spellings in METADATA_KEYS.items():
        for value in (record.get(spelling) for spelling in spellings):
            if isinstance(value, (int, float)) and abs(value) < 1e18:  # neither NaN nor infinite
                found.setdefault(name, float(value))
    if {"width", "height"} <= found.keys():
        found["side"] = min(found["width"], found["height"])
    return found


def check_metadata(metadata, args):
    """Raise SkippedSample where the filters reject a sample."""
    rules = (
        ("smaller side", metadata.get("side"), args.min_image_side_px or None, operator.ge),
        ("watermark", metadata.get("watermark"), args.max_watermark, operator.le),
        ("unsafe", metadata.get("unsafe"), args.max_unsafe, operator.le),
        ("aesthetic score", metadata.get("aesthetic"), args.min_aesthetic, operator.ge),
    )
    for name, value, limit, passes in rules:
        if limit is None:
            continue
        if value is None and args.require_metadata:
            raise SkippedSample(f"no {name} in the metadata")
        if value is not None and not passes(value, limit):
            raise SkippedSample(f"filtered by {name}")


def check_side(original, metadata, args):
    """Raise SkippedSample for an original of too few pixels a side, where the metadata says nothing of it."""
    if "side" not in metadata and min(original) < args.min_image_side_px:
        raise SkippedSample("filtered by smaller side")


def caption_of(sample, metadata):
    """Return a sample's caption: its text member, else the caption in its json."""
    if "txt" not in sample and "caption" not in metadata:
        raise SkippedSample("no caption")
    try:
        caption = sample["txt"].decode() if "txt" in sample else metadata["caption"]
        caption.encode()  # json can hold half a character
        return caption.strip()
    except UnicodeError as error:
        raise SkippedSample("caption is not UTF-8") from error


def open_picture(data, args):
    """Return (upright RGB picture at no less than the training resolution, original (width, height)).

    A plain JPEG whose smaller side needs no resizing comes as an array uint8 [H,W,3], any other as an Image.
    """
    try:
        picture = Image.open(io.BytesIO(data))
        if picture.width * picture.height > args.max_image_pixels:
            raise SkippedSample("picture over --max_image_pixels")
        original, orientation = picture.size, picture.getexif().get(ExifTags.Base.Orientation, 1)
        if orientation in (5, 6, 7, 8):  # stored on its side
            original = original[::-1]
        is_plain = picture.format == "JPEG" and picture.mode == "RGB" and orientation == 1
        if is_plain and min(original) == args.resolution:
            with suppress(ValueError):  # raised for a damaged one: Pillow has the word
                return simplejpeg.decode_jpeg(data), original  # Pillow's pixels in two thirds of its time
        # JPEG: decode at 1/2, 1/4 or 1/8 of the size where that is enough.
        picture.draft("RGB", (args.resolution, args.resolution))
        ImageOps.exif_transpose(picture, in_place=True)
        return to_rgb(picture), original
    except SkippedSample:
        raise
    except Exception as error:  # Pillow's decoders raise almost anything on damaged files
        raise SkippedSample("picture cannot be decoded") from error


def to_rgb(picture):
    """Return a picture of any mode as RGB: 16-bit scaled to 8, transparency laid on white."""
    if picture.mode.startswith(("I", "F")):
        values = np.asarray(picture, np.float32) / (1 if picture.mode == "F" else 257)
        picture = Image.fromarray(values.round().clip(0, 255).astype(np.uint8))
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
        picture = Image.alpha_composite(white, picture)
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def crop(picture, args, rng):
    """Return (pixels, array uint8 [R,R,3], (top, left) of the crop in the resized picture)."""
    side = args.resolution
    width, height = picture.size if isinstance(picture, Image.Image) else picture.shape[1::-1]
    scale = side / min(width, height)
    size = tuple(max(side, round(length * scale)) for length in (width, height))
    spare = (size[1] - side, size[0] - side)
    top, left = (n // 2 for n in spare) if args.center_crop else (rng.randint(0, n) for n in spare)
    if size == (width, height):
        pixels = np.asarray(picture)
        if size != (side, side):  # a copy: a view would keep the whole picture
            pixels = pixels[top : top + side, left : left + side].copy()
    else:  # only the part that is kept is resized: a strip would grow without bound
        x, y = width / size[0], height / size[1]
        box = (left * x, top * y, min((left + side) * x, width), min((top + side) * y, height))
        method = Image.Resampling[args.interpolation_type.upper()]
        pixels = np.asarray(picture.resize((side, side), method, box))
    if args.random_flip and rng.random() < 0.5:
        pixels, left = pixels[:, ::-1], spare[1] - left
    return pixels, (top, left)


def prepare_sample(sample, args, epoch, cached=False):
    """Return an undecoded sample as a training sample; its crop is a function of (seed, epoch, key).

    Raises:
        SkippedSample: a filter rejects it, or it cannot be read.
    """
    image = next((sample[suffix] for suffix in IMAGE_SUFFIXES if suffix in sample), None)
    if image is None and not cached:
        raise SkippedSample("no picture")
    metadata = metadata_of(sample)
    check_metadata(metadata, args)
    caption = caption_of(sample, metadata)
    if cached:
        tensors = cached_tensors(sample)
        check_side(tensors["time_ids"][:2].tolist(), metadata, args)
        return tensors | {"caption": caption}
    picture, original = open_picture(image, args)
    check_side(original, metadata, args)
    rng = random.Random(f"{args.seed} {epoch} {sample['__url__']} {sample['__key__']}")
    pixels, corner = crop(picture, args, rng)
    size, target = original[::-1], pixels.shape[:2]
    if args.use_fix_crop_and_size:
        size, corner = target, (0, 0)
    # What SDXL's UNet is told: original height and width, crop top and left, target height and width.
    time_ids = torch.tensor([*size, *corner, *target], dtype=torch.float32)
    return {"pixels": pixels, "time_ids": time_ids, "caption": caption}


def cached_tensors(sample):
    """Return a cached sample's tensors: moments [2C,h,w], time ids [6] and the caption's embeddings."""
    if "safetensors" not in sample:
        raise SkippedSample("no cached tensors")
    try:
        tensors = load_tensors(sample["safetensors"])
    except SafetensorError as error:
        raise SkippedSample("cached tensors cannot be read") from error
    if not {"moments", "time_ids", "prompt_embeds"} <= tensors.keys():
        raise SkippedSample("cached tensors lack moments, time ids or embeddings")
    return tensors


class ShardStream(torch.utils.data.IterableDataset):
    """Endless batches of training samples, each sample once an epoch over all processes and workers.

    The stream is divided among `consumers` = processes x workers. The shards of an epoch, in an order drawn
    from (seed, epoch), lie end to end; consumer c reads the c-th of `consumers` equal parts. Where a part
    ends inside a shard, its neighbours share it by turns, sample by sample; so one shard serves any number.
    """

    def __init__(self, shards, args, num_processes, process_index, num_batches=0, positions=None, cache=None):
        """Go on after `num_batches` of this process, each consumer from its (epoch, samples read in it).

        `cache` is the head of shards that hold cached tensors, None for pictures.
        """
        self.shards, self.args, self.cache = shards, args, cache
        self.workers = max(1, args.dataloader_num_workers)
        self.consumers = num_processes * self.workers
        self.first_consumer = process_index * self.workers
        self.num_batches = num_batches  # the next one comes from worker num_batches % workers
        self.positions = positions or {}

    def raw_samples(self, epoch, consumer, skipped):
        """Yield the undecoded samples that a consumer reads in an epoch, in order."""
        order = list(range(len(self.shards)))
        random.Random(f"{self.args.seed} {epoch}").shuffle(order)
        turns = self.consumers // math.gcd(self.consumers, len(order))  # parts that a shard is cut into
        units = len(order) * turns // self.consumers
        first, last = consumer * units, (consumer + 1) * units
        for place in range(first // turns, -(-last // turns)):
            mine = range(max(first - place * turns, 0), min(last - place * turns, turns))
            for number, sample in enumerate(read_shard(self.shards[order[place]], skipped, self.cache)):
                if number % turns in mine:
                    yield sample

    def __iter__(self):
        """Yield batches: pixels uint8 [B,R,R,3] or cached tensors, captions, the position after it, skips."""
        info = torch.utils.data.get_worker_info()
        worker = ((info.id if info else 0) + self.num_batches) % self.workers
        consumer = self.first_consumer + worker
        epoch, start = self.positions.get(str(consumer), (0, 0))
        skipped, batch, usable = Counter(), [], 0
        while True:
            shuffled = wds.shuffle(
                self.args.shuffle_buffer_samples,
                initial=self.args.shuffle_buffer_samples,
                rng=random.Random(f"{self.args.seed} {epoch} {consumer}"),
            )(self.raw_samples(epoch, consumer, skipped))
            for number, raw in enumerate(islice(shuffled, start, None), start + 1):
                try:
                    batch.append(prepare_sample(raw, self.args, epoch, self.cache is not None))
                except SkippedSample as cause:
                    skipped[str(cause)] += 1
                    continue
                usable += 1
                if len(batch) == self.args.train_batch_size:
                    yield collate(batch) | {"position": (consumer, epoch, number), "skipped": dict(skipped)}
                    skipped.clear()
                    batch = []
            if not usable and not start:
                yield {"error": self.nothing_usable(epoch, skipped)}
                return
            epoch, start, usable = epoch + 1, 0, 0

    def nothing_usable(self, epoch, skipped):
        """Return the one line that says why an epoch gave a consumer no sample."""
        causes = describe(skipped) or "fewer samples than processes x loader workers; use fewer of them"
        return f"epoch {epoch} of --train_shards_path_or_url gave no usable sample: {causes}"


def collate(samples):
    """Return samples as one batch: tensors and arrays stacked as tensors, captions as a list."""
    batch = {name: [sample[name] for sample in samples] for name in samples[0]}
    for name, values in batch.items():
        if isinstance(values[0], np.ndarray):
            batch[name] = torch.from_numpy(np.stack(values))
        elif isinstance(values[0], torch.Tensor):
            batch[name] = torch.stack(values)
    return batch


def describe(skipped):
    """Return counts by cause as one line, the most frequent first."""
    return masked(", ".join(f"{cause}: {count}" for cause, count in Counter(skipped).most_common()))


def audit(shards, args):
    """Return (four usable samples, report line, head of the cache or None) after reading the first samples.

    Raises:
        UnusableInput: none of them can be used, with counts by cause; or they are cached for another run.
    """
    skipped, usable, examined = Counter(), [], 0
    cache = find_cache(shards)
    if cache:
        check_cache(cache, args)
    samples = chain.from_iterable(read_shard(shard, skipped, cache) for shard in shards)
    for examined, sample in enumerate(islice(samples, AUDIT_SAMPLES), 1):  # noqa: B007
        try:
            usable.append(prepare_sample(sample, args, epoch=0, cached=cache is not None))
        except SkippedSample as cause:
            skipped[str(cause)] += 1
        if len(usable) == AUDIT_USABLE_SAMPLES:
            break
    causes = describe(skipped)
    if not usable:
        raise UnusableInput(
            f"none of the first {examined} samples of --train_shards_path_or_url can be used "
            f"({causes or 'no samples'}); shards hold KEY.jpg|png|webp with KEY.txt or caption in KEY.json; "
            "loosen the filters or mend the shards"
        )
    kind = "shards of cached tensors" if cache else "shards"
    report = f"{len(shards)} {kind}; of the first {examined} samples {len(usable)} can be used"
    for sample in usable:
        sample.pop("pixels", None)  # other processes need only captions and their embeddings
    return usable[:4], f"{report} ({causes})" if causes else report, cache


def find_cache(shards):
    """Return the head of the first shard that can be read, where it holds cached tensors, else None."""
    for shard in shards:
        try:
            first = next(group_by_keys(shard_members(shard)), None)
        except STREAM_ERRORS:
            continue  # the audit reads it again, and counts it
        return first if first and first["__key__"] == CACHE_KEY else None
    return None


def check_cache(cache, args):
    """Raise UnusableInput where the tensors of a cache were made for another run than the flags describe."""
    remedy = "make it again with scripts/cache_latents.py, or train on the pictures"
    try:
        made, _ = json.loads(cache["json"]), load_tensors(cache["safetensors"])
    except (KeyError, ValueError, SafetensorError) as error:
        raise UnusableInput(f"the cache's head cannot be read ({error}); {remedy}") from error
    changed = [
        f"{name} was {made.get(name)!r}, is {value!r}"
        for name, value in cache_identity(args).items()
        if made.get(name) != value
    ]
    if changed:
        raise UnusableInput(f"the cache was made for another run ({'; '.join(changed)}); {remedy}")


def cache_identity(args):
    """Return what the tensors of a cache depend on, by flag; local models count by their contents."""
    flags = (
        "pretrained_teacher_model teacher_revision pretrained_vae_model_name_or_path resolution "
        "interpolation_type center_crop random_flip use_fix_crop_and_size".split()
    )
    identity = {"family": FAMILY} | {name: getattr(args, name) for name in flags}
    for name, value in identity.items():
        if name.startswith("pretrained") and value and Path(value).exists():
            identity[name] = f"sha256 {contents_digest(Path(value))}"
    return identity


def contents_digest(model):
    """Return the sha256 of a model file, or of a folder's files; of a pipeline only VAE and text encoders."""
    if model.is_file():
        return digest(model)
    parts = [*model.glob("vae*"), *model.glob("text_encoder*"), *model.glob("tokenizer*")] or [model]
    files = sorted(path for part in parts for path in part.rglob("*") if path.is_file())
    whole = "".join(f"{path.relative_to(model)} {digest(path)}\n" for path in files)
    return hashlib.sha256(whole.encode()).hexdigest()


def make_loader(stream, cuda):
    """Return the DataLoader of a ShardStream, which makes its own batches."""
    workers = stream.args.dataloader_num_workers
    return torch.utils.data.DataLoader(
        stream, batch_size=None, num_workers=workers, pin_memory=cuda, worker_init_fn=ignore_signals
    )


def ignore_signals(_worker):
    """Let a loader process outlive the signals that ask the run to save and stop; it ends with the run."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


# <<< shared: data

# ----------------------------------------------------------------------------------------------------------
# Teacher and conditioning: the true difference between the model families
# ----------------------------------------------------------------------------------------------------------


def load_pipeline(args, dtype, **options):
    """Return the teacher's pipeline in the compute dtype, with a VAE that can be computed in."""
    options |= {"add_watermarker": False, "feature_extractor": None, "image_encoder": None}
    options |= {"dtype": dtype, "cache_dir": args.cache_dir}
    if Path(args.pretrained_teacher_model).is_file():
        pipe = diffusers.StableDiffusionXLPipeline.from_single_file(
            args.pretrained_teacher_model, config=args.teacher_config, **options
        )
    else:
        from_hub = not Path(args.pretrained_teacher_model).exists()
        if "vae" not in options and from_hub and dtype != torch.float32:
            options["vae"] = AutoencoderKL.from_pretrained(FP16_VAE, dtype=dtype, cache_dir=args.cache_dir)
        pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(
            args.pretrained_teacher_model, revision=args.teacher_revision, variant=args.variant, **options
        )
    if pipe.vae and dtype == torch.float16 and pipe.vae.config.force_upcast:
        pipe.vae.to(torch.float32)
    return pipe


def check_family(pipe):
    """Raise UnusableInput where the teacher is not of this script's family."""
    if pipe.unet.config.addition_embed_type != "text_time":
        raise UnusableInput(
            f"the teacher is not {FAMILY}: its UNet takes no size and crop; use {OTHER_SCRIPT}"
        )
    if pipe.text_encoder_2 and not pipe.text_encoder:
        raise UnusableInput("the teacher is SDXL's refiner, which draws nothing by itself; name a base model")


def encode_prompts(pipe, captions, device):
    """Return the embeddings [B,L,D] and pooled ones [B,P] of captions, by the pipeline's names.

    "" gives the unconditional ones: zeros where the model says `force_zeros_for_empty_prompt`, as SDXL's.
    """
    prompt_embeds, _, pooled_embeds, _ = pipe.encode_prompt(
        captions, device=device, do_classifier_free_guidance=False
    )
    if pipe.config.force_zeros_for_empty_prompt:
        kept = torch.tensor([caption != "" for caption in captions], device=device)
        prompt_embeds = torch.where(kept[:, None, None], prompt_embeds, 0)
        pooled_embeds = torch.where(kept[:, None], pooled_embeds, 0)
    return {"prompt_embeds": prompt_embeds, "pooled_prompt_embeds": pooled_embeds}


def unet_inputs(embeds, batch):
    """Return what the UNet is given beside z_t and timesteps: embeddings, pooled ones, size and crop."""
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
    """Return kohya's name of a UNet's module: for SDXL the original UNet's: A1111 knows no others for all."""
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
    names = {"ss_base_model_version": "sdxl_base_v1-0"}
    return names | {"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}


# >>> shared: models
def load_teacher(args, dtype, device, **parts):
    """Return the teacher's pipeline, frozen, on the device; its scheduler is its own until validation.

    `parts` take the place of the teacher's own and stay as they are; one that is None is not loaded.

    Raises:
        UnusableInput: it is missing, of another family, or its UNet does not take plain latents.
    """
    given = frozenset(parts)
    try:
        if args.pretrained_vae_model_name_or_path and "vae" not in parts:
            parts["vae"] = AutoencoderKL.from_pretrained(
                args.pretrained_vae_model_name_or_path, dtype=dtype, cache_dir=args.cache_dir
            )
        pipe = load_pipeline(args, dtype, **parts)
        for name, module in pipe.components.items():
            if name in given:  # such as the student at validation, whose LoRA must stay trainable
                continue
            if isinstance(module, torch.nn.Module):  # one whose weights are not all in a file cannot move
                module.requires_grad_(False).eval().to(device)
    except (
        OSError, ValueError, RuntimeError, KeyError, ImportError, SafetensorError,
        diffusers.loaders.single_file_utils.SingleFileComponentError,
    ) as error:  # fmt: skip
        path, reason, remedy = Path(args.pretrained_teacher_model), " ".join(str(error).split()), ""
        where = "" if path.exists() else " (no such path here, so it was taken for a Hub id)"
        if path.is_file():
            remedy = "; the file must hold the UNet, VAE and text encoder that --teacher_config describes"
            if isinstance(error, (FileNotFoundError, HfHubHTTPError)):  # the Hub was asked for a description
                remedy = "; give --teacher_config FOLDER, a local diffusers model of the same architecture"
        raise UnusableInput(
            f"--pretrained_teacher_model {path} cannot be loaded{where}: {reason[:400]}{remedy}"
        ) from error
    check_parts(pipe)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def check_parts(pipe):
    """Raise UnusableInput where a part of the teacher's pipeline is not what distillation needs."""
    config = pipe.unet.config if pipe.unet else None
    if config:
        check_family(pipe)
    if config and config.time_cond_proj_dim is not None:
        raise UnusableInput(
            "the teacher is guidance-distilled already (time_cond_proj_dim); name an undistilled model"
        )
    if config and config.in_channels != config.out_channels:
        raise UnusableInput(
            f"the teacher's UNet takes {config.in_channels} channels and gives {config.out_channels}: "
            "inpainting models cannot be teachers"
        )
    for name in TEXT_PARTS:
        if getattr(getattr(pipe, name), "model_max_length", 0) > 10**6:
            raise UnusableInput(f"the teacher's {name} has no maximum length: its folder is missing or cut")
    if "beta_start" not in pipe.scheduler.config:
        raise UnusableInput(
            f"the teacher's {type(pipe.scheduler).__name__} has no betas; name a diffusion model"
        )


def twin(unet):
    """Return a frozen UNet on the very weights of `unet`: the teacher, whatever is added to `unet` later.

    It takes no memory, and a pass is spared what PEFT does in every layer for a LoRA that is switched off.
    """
    with torch.device("meta"):
        teacher = type(unet).from_config(unet.config)
    teacher.load_state_dict(unet.state_dict(), assign=True)
    return teacher.requires_grad_(False).eval()


class QuantizedLinear(torch.nn.Linear):
    """A frozen linear layer whose weight is kept in 4 bits: NF4, blocks of 64 (QLoRA, arXiv:2305.14314)."""

    def __init__(self, linear):
        """Take the place of `linear`, in whose dtype the weight is unpacked for every use."""
        torch.nn.Module.__init__(self)  # a weight of its own would be made for nothing
        self.in_features, self.out_features = linear.in_features, linear.out_features
        packed, self.packing = bitsandbytes.functional.quantize_4bit(linear.weight, quant_type="nf4")
        self.weight = torch.nn.Parameter(packed, requires_grad=False)
        self.bias = linear.bias

    def forward(self, x):
        """Return the layer's output [...,out] of x [...,in]."""
        return bitsandbytes.matmul_4bit(x, self.weight, self.packing, bias=self.bias)


def quantize(unet, teacher):
    """Keep the weights of the attention blocks, which both UNets share, in 4 bits.

    Raises:
        UnusableInput: none of them can be packed.
    """
    # Where a block of 64 weights spans two rows, bitsandbytes 0.50 unpacks it wrongly on CPUs with AVX-512.
    names = [  # and no modules, which would keep every weight until the end
        name
        for name, module in unet.named_modules()
        if isinstance(module, torch.nn.Linear) and ".attentions." in name and module.in_features % 64 == 0
    ]
    if not names:
        raise UnusableInput(
            "--use_4bit_base: the teacher has no attention layer of a multiple of 64 inputs; leave it out"
        )
    for name in names:
        quantized = QuantizedLinear(unet.get_submodule(name))
        unet.set_submodule(name, quantized)
        teacher.set_submodule(name, quantized)


def add_lora(unet, args):
    """Add the LoRA to the UNet, in float32 whatever the base's dtype, and return its parameters.

    Raises:
        UnusableInput: a suffix of --lora_target_modules matches no module.
    """
    targets = [name.strip() for name in args.lora_target_modules.split(",") if name.strip()]
    layers = (torch.nn.Linear, torch.nn.Conv2d)
    names = [f".{name}" for name, module in unet.named_modules() if isinstance(module, layers)]
    for target in targets:
        if not any(name.endswith(f".{target}") for name in names):
            raise UnusableInput(f"--lora_target_modules: the teacher has no layer {target!r}; leave it out")
    torch.manual_seed(args.seed)
    unet.add_adapter(
        LoraConfig(
            r=args.lora_rank,
            lora_alpha=args.lora_alpha,
            lora_dropout=args.lora_dropout,
            target_modules=targets,
        )
    )
    cast_training_params(unet, dtype=torch.float32)
    return [parameter for parameter in unet.parameters() if parameter.requires_grad]


def factors(layer, dtype):
    """Return (A, scaling B) of a LoRA layer in a dtype; their float32 parameters get the gradients."""
    down, up, scaling = (part["default"] for part in (layer.lora_A, layer.lora_B, layer.scaling))
    return down.weight.to(dtype), (up.weight if scaling == 1 else up.weight * scaling).to(dtype)


def merging_pays(layer, rows, down, up):
    """Return whether adding B A to the weight is less work than taking `rows` inputs through A and B.

    With gradients it is added twice: the backward pass needs the sum too.
    """
    has_dropout = not isinstance(layer.lora_dropout["default"], torch.nn.Identity)
    inputs, outputs, sums = down[0].numel(), len(up), 2 if torch.is_grad_enabled() else 1
    return not has_dropout and rows * (inputs + outputs) > sums * inputs * outputs


def merged(weight, down, up, packing=None):
    """Return W + B A in the shape of W [out,in] or [out,in,k,k]; A [r,in] or [r,in,k,k], B [out,r,...]."""
    if packing:
        weight = bitsandbytes.functional.dequantize_4bit(weight, packing)
    return torch.addmm(weight.flatten(1), up.flatten(1), down.flatten(1)).view(len(up), *down.shape[1:])


def whole_gradient_pays(rows, down, up):
    """Return whether W's whole gradient is the shorter way to those of A and B from `rows` outputs."""
    inputs, outputs = down[0].numel(), len(up)
    return (rows + 2 * len(down)) * inputs * outputs < 2 * rows * (down.numel() + up.numel())


def factor_gradients(grad, down, up):
    """Return the gradients of A and B, in their shapes, from that of W + B A."""
    grad = grad.flatten(1)
    return (up.flatten(1).T @ grad).view_as(down), (grad @ down.flatten(1).T).view_as(up)


class MergedLinear(torch.autograd.Function):
    """x (W + B A)^T + b of x [rows,in], where W and b are frozen; it keeps x, and not the sum."""

    @staticmethod
    def forward(ctx, x, weight, bias, down, up, packing):
        """Return the output [rows,out]; `packing` is a QuantizedLinear's, else None."""
        ctx.save_for_backward(x, weight, down, up)
        ctx.packing = packing
        return functional.linear(x, merged(weight, down, up, packing), bias)

    @staticmethod
    def backward(ctx, grad):
        """Return the gradients in the order of forward's arguments."""
        x, weight, down, up = ctx.saved_tensors
        grad_x = grad @ merged(weight, down, up, ctx.packing) if ctx.needs_input_grad[0] else None
        if whole_gradient_pays(len(grad), down, up):
            return grad_x, None, None, *factor_gradients(grad.T @ x, down, up), None
        return grad_x, None, None, (grad @ up).T @ x, grad.T @ functional.linear(x, down), None


class MergedConv2d(torch.autograd.Function):
    """The same of a convolution of x [B,in,h,w]."""

    @staticmethod
    def forward(ctx, x, weight, bias, down, up, stride, padding):
        """Return the output [B,out,h',w']."""
        ctx.save_for_backward(x, weight, down, up)
        ctx.options = stride, padding
        return functional.conv2d(x, merged(weight, down, up), bias, stride, padding)

    @staticmethod
    def backward(ctx, grad):
        """Return the gradients in the order of forward's arguments."""
        (x, weight, down, up), options, grad_x = ctx.saved_tensors, ctx.options, None
        if ctx.needs_input_grad[0]:
            grad_x = conv2d_input(x.shape, merged(weight, down, up), grad, *options)
        if whole_gradient_pays(grad[:, 0].numel(), down, up):
            grads = factor_gradients(conv2d_weight(x, weight.shape, grad, *options), down, up)
        else:
            hidden = functional.conv2d(x, down, None, *options)
            grad_hidden = functional.conv2d(grad, up.transpose(0, 1))
            grads = (
                conv2d_weight(x, down.shape, grad_hidden, *options),
                conv2d_weight(hidden, up.shape, grad),
            )
        return grad_x, None, None, *grads, None, None


class LoraLinear(lora.Linear):
    """PEFT's LoRA layer, x W^T + b + scaling dropout(x) A^T B^T, with float32 A, B, in the dtype of x.

    PEFT's own forward pass computes in float32 unless there is autocast, and reads or writes the layer's
    output six times where this one does it twice; or once, with W + scaling B A where that is less work, in
    the dtype of x like a LoRA that a pipeline has fused.
    """

    def forward(self, x):
        """Return the layer's output [...,out] of x [...,in]."""
        if self.disable_adapters:
            return super().forward(x)
        base, rows = self.base_layer, x.flatten(0, -2)
        down, up = factors(self, x.dtype)
        if merging_pays(self, len(rows), down, up):
            packing = getattr(base, "packing", None)
            output = MergedLinear.apply(rows, base.weight, base.bias, down, up, packing)
        else:
            hidden = functional.linear(self.lora_dropout["default"](rows), down)
            output = base(rows).addmm_(hidden, up.T)
        return output.unflatten(0, x.shape[:-1])


class LoraConv2d(lora.Conv2d):
    """The same of a convolution: A has its kernel, B a kernel of one pixel."""

    def forward(self, x):
        """Return the layer's output [B,out,h',w'] of x [B,in,h,w]."""
        if self.disable_adapters:
            return super().forward(x)
        base, options = self.base_layer, (self.base_layer.stride, self.base_layer.padding)
        down, up = factors(self, x.dtype)
        pixels = x[:, 0].numel() // (base.stride[0] * base.stride[1])  # of the output
        if merging_pays(self, pixels, down, up):
            return MergedConv2d.apply(x, base.weight, base.bias, down, up, *options)
        hidden = functional.conv2d(self.lora_dropout["default"](x), down, None, *options)
        return base(x).add_(functional.conv2d(hidden, up))


def make_fast(unet, args):
    """Turn on what saves memory or time, always or where the flags ask for it."""
    for module in unet.modules():
        if isinstance(module, lora.Linear):
            module.__class__ = LoraLinear
        elif isinstance(module, lora.Conv2d):
            module.__class__ = LoraConv2d
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if args.enable_xformers_memory_efficient_attention:
        unet.enable_xformers_memory_efficient_attention()
    if args.compile:
        # A graph for each width of the blocks in each of teacher's, target's and student's pass: more than
        # the 8 of one function after which torch stops compiling.
        torch._dynamo.config.recompile_limit = 64
        unet.compile_repeated_blocks()


def encode_moments(vae, pixels, args):
    """Return the VAE posterior's mean and log variance [B,2C,h,w] f32 of pixels uint8 [B,R,R,3]."""
    pixels = pixels.permute(0, 3, 1, 2)  # only another view: convolutions are at home in this memory order
    parts = (part.float() / 127.5 - 1 for part in pixels.split(args.vae_encode_batch_size))
    return torch.cat([vae.encode(part.to(vae.dtype)).latent_dist.parameters.float() for part in parts])


def sample_latents(moments, posterior_eps, scaling_factor):
    """Return scaled latents [B,C,h,w] f32, sampled from moments [B,2C,h,w] with the given noise [B,C,h,w]."""
    posterior = DiagonalGaussianDistribution(moments.float())
    return (posterior.mean + posterior.std * posterior_eps) * scaling_factor


def condition(uncond_embeds, batch, empty):
    """Return the UNet's (conditioning, uncond) of a batch, each with B rows.

    `uncond_embeds` are those of the empty caption, one row; captions that are empty or marked by `empty` [B]
    get the same.
    """
    empty = [drop or not caption for drop, caption in zip(empty, batch["caption"], strict=True)]
    uncond, embeds = {}, {}
    for name, value in uncond_embeds.items():
        uncond[name] = value.expand(batch[name].shape)
        is_empty = send(torch.tensor(empty), value.device).view(-1, *[1] * (value.ndim - 1))
        embeds[name] = torch.where(is_empty, value, batch[name].to(value.dtype))
    return unet_inputs(embeds, batch), unet_inputs(uncond, batch)


def make_optimizer(parameters, args, num_processes):
    """Return (AdamW or its 8-bit form, learning-rate schedule stepped once an update)."""
    if args.use_8bit_adam:
        adamw = bitsandbytes.optim.AdamW8bit
    else:
        adamw = partial(torch.optim.AdamW, fused=True)
    lr = args.learning_rate
    if args.scale_lr:
        lr *= args.train_batch_size * args.gradient_accumulation_steps * num_processes
    optimizer = adamw(
        parameters, lr=lr, betas=(args.adam_beta1, args.adam_beta2), weight_decay=args.adam_weight_decay,
        eps=args.adam_epsilon,
    )  # fmt: skip
    name = args.lr_scheduler
    if name == "constant" and args.lr_warmup_steps:
        name = "constant_with_warmup"
    return optimizer, get_scheduler(
        name, optimizer, num_warmup_steps=args.lr_warmup_steps, num_training_steps=args.max_train_steps
    )


# <<< shared: models

# ----------------------------------------------------------------------------------------------------------
# Files: LoRA weights and checkpoints
# ----------------------------------------------------------------------------------------------------------


# >>> shared: files
@dataclass
class RunState:
    """Where a run stands."""

    global_step: int = 0  # updates done
    positions: dict = field(default_factory=dict)  # consumer -> (epoch, samples read in it)
    skipped: Counter = field(default_factory=Counter)  # samples of this process by cause
    stop_signal: str | None = None


def save_lora(unet, pipeline_class, folder, args):
    """Write the LoRA for diffusers (float32) and with kohya's keys (float16), whole or not at all."""
    folder = Path(folder)
    scratch = folder / ".writing"
    state = get_peft_model_state_dict(unet)
    metadata = _collate_lora_metadata({"unet": unet})
    # Dropout is for training: diffusers would load these layers with it, and leave it on.
    config = metadata["unet_lora_adapter_metadata"]
    config |= {"lora_dropout": 0.0, "target_modules": sorted(config["target_modules"])}
    pipeline_class.save_lora_weights(scratch, unet_lora_layers=state, **metadata)
    weights = kohya_weights(state, args.lora_alpha, unet.config.layers_per_block)
    save_file(weights, scratch / KOHYA_NAME, metadata=kohya_metadata(args, unet.config.cross_attention_dim))
    for name in (WEIGHTS_NAME, KOHYA_NAME):
        os.replace(scratch / name, folder / name)
    scratch.rmdir()


def kohya_weights(state, alpha, layers_per_block):
    """Return a PEFT state dict of the UNet with the keys that ComfyUI and A1111 read, alpha included."""
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
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(args.lora_rank),
        "ss_network_alpha": str(args.lora_alpha),
        "ss_resolution": f"({args.resolution}, {args.resolution})",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.implementation": "diffusers",
        "modelspec.title": "LCM-LoRA",
        "modelspec.usage_hint": "LCM sampler, 2 to 8 steps, guidance 1 to 2",
    }


def save_for_peft(unet, folder):
    """Write the LoRA as `PeftModel.from_pretrained(unet, folder)` reads it."""
    unet.peft_config["default"].save_pretrained(folder)
    state = get_peft_model_state_dict(unet)
    save_file(
        {f"base_model.model.{name}": value.detach().cpu().contiguous() for name, value in state.items()},
        Path(folder) / "adapter_model.safetensors",
    )


def register_hooks(accelerator, unet, pipeline_class, args):
    """Let accelerate's checkpoints hold the LoRA alone in place of the whole UNet."""

    def save_hook(_models, weights, output_dir):
        weights.clear()
        if accelerator.is_main_process:
            save_lora(unet, pipeline_class, output_dir, args)
            save_for_peft(unet, Path(output_dir) / "unet")

    def load_hook(models, input_dir):
        models.clear()
        state = load_file(Path(input_dir) / "unet" / "adapter_model.safetensors")
        state = {name.removeprefix("base_model.model."): value for name, value in state.items()}
        set_peft_model_state_dict(unet, state)
        cast_training_params(unet, dtype=torch.float32)

    accelerator.register_save_state_pre_hook(save_hook)
    accelerator.register_load_state_pre_hook(load_hook)


def settings_of(args, accelerator):
    """Return what must stay the same for a resumed run to go on as an unbroken one would."""
    settings = {name: value for name, value in public_flags(args).items() if name not in FREE_FLAGS}
    if args.lr_scheduler not in ("constant", "constant_with_warmup"):
        settings["max_train_steps"] = args.max_train_steps  # the schedule's shape depends on it
    settings |= {
        "number of processes": accelerator.num_processes,
        "mixed_precision": accelerator.mixed_precision,
    }
    return json.loads(json.dumps(settings))


def digest(path):
    """Return the sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def seal(manifest):
    """Return a manifest with the sha256 of its own contents."""
    text = json.dumps({name: value for name, value in manifest.items() if name != "seal"}, sort_keys=True)
    return manifest | {"seal": hashlib.sha256(text.encode()).hexdigest()}


def save_checkpoint(accelerator, state, args):
    """Write `checkpoint-<step>`: under another name first, then renamed, then old ones are removed."""
    output_dir = Path(args.output_dir)
    final = output_dir / f"checkpoint-{state.global_step}"
    scratch = output_dir / f".writing-{final.name}"
    if accelerator.is_main_process and scratch.exists():
        shutil.rmtree(scratch)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(scratch))
    accelerator.wait_for_everyone()
    positions = dict(item for part in gather_object([list(state.positions.items())]) for item in part)
    if accelerator.is_main_process:
        files = [path for path in sorted(scratch.rglob("*")) if path.is_file()]
        for path in files:
            with path.open("rb") as file:
                os.fsync(file.fileno())
        manifest = {
            "global_step": state.global_step,
            "script_version": SCRIPT_VERSION,
            "settings": settings_of(args, accelerator),
            "positions": positions,
            "files": {str(path.relative_to(scratch)): digest(path) for path in files},
        }
        write_atomically(scratch / MANIFEST_NAME, json.dumps(seal(manifest), indent=1))
        if final.exists():  # damaged, or of a longer run that was resumed from an earlier checkpoint
            os.replace(final, scratch.with_name(f"{scratch.name}-old"))
        os.replace(scratch, final)
        prune_checkpoints(output_dir, args.checkpoints_total_limit)
    accelerator.wait_for_everyone()


def write_atomically(path, text):
    """Write a text file so that it is there whole or not at all."""
    scratch = path.with_name(f".writing-{path.name}")
    with scratch.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(scratch, path)


def list_checkpoints(output_dir):
    """Return the checkpoint folders in a run's folder, oldest first, complete or not."""
    named = (path for path in Path(output_dir).glob("checkpoint-*") if path.is_dir())
    found = [path for path in named if path.name.partition("-")[2].isdecimal()]
    return sorted(found, key=lambda path: int(path.name.partition("-")[2]))


def prune_checkpoints(output_dir, limit):
    """Remove the checkpoints written first, over the limit, and what interrupted writes left."""

    def written(folder):
        manifest = folder / MANIFEST_NAME
        return manifest.stat().st_mtime_ns if manifest.exists() else 0

    for path in Path(output_dir).glob(".writing-checkpoint-*"):
        shutil.rmtree(path)
    for path in sorted(list_checkpoints(output_dir), key=written)[:-limit] if limit else []:
        shutil.rmtree(path)


def read_manifest(folder):
    """Return a checkpoint's manifest, or None and why it cannot be resumed from, as a pair."""
    try:
        manifest = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
        if manifest != seal(manifest):
            return None, f"{MANIFEST_NAME} is damaged"
        for name, expected in manifest["files"].items():
            if digest(folder / name) != expected:
                return None, f"{name} is damaged"
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        return None, f"{getattr(error, 'filename', None) or MANIFEST_NAME} is missing or cannot be read"
    return manifest, ""


def find_checkpoint(args, say):
    """Return (folder, manifest) to resume from, or (None, None) to start afresh.

    Raises:
        UnusableInput: the named one is incomplete, or 'none' would overwrite an earlier run's checkpoints.
    """
    wanted, existing = args.resume_from_checkpoint, list_checkpoints(args.output_dir)
    if wanted == "none" and existing:
        raise UnusableInput(
            f"--resume_from_checkpoint none: {args.output_dir} holds checkpoints of an earlier run; "
            "remove them or choose another --output_dir"
        )
    candidates = {"none": [], "latest": existing[::-1]}.get(wanted, [Path(wanted)])
    for folder in candidates:
        manifest, reason = read_manifest(folder)
        if manifest:
            return folder, manifest
        if wanted != "latest":
            raise UnusableInput(
                f"--resume_from_checkpoint {folder}: {reason}; name a complete checkpoint or 'latest'"
            )
        say(f"passing over {folder}: {reason}")
    return None, None


def check_same_settings(manifest, args, accelerator):
    """Raise UnusableInput where flags that change the result differ from the checkpoint's."""
    new, parser = settings_of(args, accelerator), build_parser()
    # Before a flag was there, runs did what its default does.
    old = {name: parser.get_default(name) for name in new} | manifest["settings"]
    changed = [
        f"{name} was {old.get(name)!r}, is {new.get(name)!r}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]
    if changed:
        raise UnusableInput(
            f"the checkpoint in {args.output_dir} was made with other settings ({'; '.join(changed)}); "
            "give the same ones or another --output_dir"
        )


# <<< shared: files

# ----------------------------------------------------------------------------------------------------------
# Log, validation pictures, model card
# ----------------------------------------------------------------------------------------------------------


# >>> shared: log
class Log:
    """Progress bar, `log.jsonl`, trackers; losses stay on the device until `flush`, the only sync point."""

    def __init__(self, accelerator, args, first_step):
        """Open the log of a run that stands at update `first_step`."""
        self.accelerator, self.args = accelerator, args
        self.path = Path(args.output_dir) / "log.jsonl"
        self.rows = []  # (step, loss, gradient norm, learning rate) of updates since the last flush
        self.started = time.monotonic()
        self.bar = tqdm(
            total=args.max_train_steps, initial=first_step, unit="update", desc="distilling", mininterval=1.0,
            disable=not accelerator.is_main_process,
        )  # fmt: skip
        if accelerator.is_main_process:
            self.cut(first_step)

    def cut(self, last_step):
        """Drop lines after the step that the run resumes from, and one that a kill cut short."""
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True) if self.path.exists() else []
        kept = [line for line in lines if line.endswith("}\n") and json.loads(line)["step"] <= last_step]
        write_atomically(self.path, "".join(kept))

    def add(self, step, loss, grad_norm, lr):
        """Note one update; tensors are kept as they are."""
        self.rows.append((step, loss.detach(), grad_norm, lr))
        self.bar.update()

    def flush(self):
        """Average the noted losses over processes, check them, and write them everywhere.

        Raises:
            NonFiniteLoss: a loss or a gradient is NaN or infinite.
        """
        if not self.rows:
            return
        values = torch.stack([torch.stack([loss, norm.to(loss)]) for _, loss, norm, _ in self.rows])
        values = self.accelerator.reduce(values, "mean").tolist()
        elapsed = time.monotonic() - self.started
        speed = len(self.rows) * samples_per_update(self.args, self.accelerator) / elapsed
        lines = [
            {
                "step": step,
                "loss": loss,
                "lr": lr,
                "grad_norm": norm if math.isfinite(norm) else None,
                "samples_per_second": speed,
            }
            for (step, _, _, lr), (loss, norm) in zip(self.rows, values, strict=True)
        ]
        # The loss scaler of fp16 leaves out updates that overflow; elsewhere they ruin the weights.
        may_skip = self.accelerator.scaler is not None
        bad = next(
            (x for x in lines if not math.isfinite(x["loss"]) or (x["grad_norm"] is None and not may_skip)),
            None,
        )
        if bad:
            lines = lines[: lines.index(bad)]
        if self.accelerator.is_main_process:
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)
            for line in lines:
                values = {
                    f"train/{name}": line[name] for name in line if name != "step" and line[name] is not None
                }
                self.accelerator.log(values, step=line["step"])
        if bad:
            raise NonFiniteLoss(
                f"loss {bad['loss']} at update {bad['step']}, gradient norm {bad['grad_norm'] or 'inf'}; "
                "the last checkpoint is untouched. Lower "
                "--learning_rate or use --mixed_precision bf16 or no; a VAE may overflow in fp16"
            )
        if torch.cuda.is_available():
            peak_gib = torch.cuda.max_memory_allocated() / 2**30
            self.accelerator.log({"train/peak_memory_gib": peak_gib}, step=lines[-1]["step"])
        self.bar.set_postfix(loss=f"{lines[-1]['loss']:.4f}", samples_per_s=f"{speed:.2f}")
        self.rows = []

    def restart_clock(self):
        """Measure speed from now on: what was done since the last flush was not training."""
        self.started = time.monotonic()


def validate(job):
    """Draw every prompt at 1, 2, 4 and 8 steps with the LoRA, and give the pictures to every tracker.

    Returns the pictures as {steps: [picture of each prompt]}; they are also in `validation/` as one grid.
    """
    args, device = job.args, job.accelerator.device
    if not job.pipe.vae:  # a run on cached latents needs it only here
        parts = {name: getattr(job.pipe, name) for name in ("unet", "scheduler", *TEXT_PARTS)}
        job.pipe = load_teacher(args, job.dtype, device, **parts)
    pipe, scheduler = job.pipe, job.pipe.scheduler
    pipe.scheduler = LCMScheduler.from_config(
        scheduler.config,
        original_inference_steps=args.num_ddim_timesteps,
        timestep_scaling=args.timestep_scaling_factor,
    )
    pipe.unet.eval()
    drawn = {steps: [] for steps in VALIDATION_STEPS}
    for steps, number in product(VALIDATION_STEPS, range(len(job.prompts))):
        embeds = {name: value[[number]] for name, value in job.prompt_embeds.items()}
        generator = torch.Generator().manual_seed(args.seed + number)
        latents = pipe(
            **embeds, num_inference_steps=steps, guidance_scale=1.0, generator=generator,
            height=args.resolution, width=args.resolution, output_type="latent",
        ).images  # fmt: skip
        drawn[steps] += decode(pipe, latents)
    pipe.scheduler = scheduler
    folder = Path(args.output_dir) / "validation"
    folder.mkdir(exist_ok=True)
    grid_of(drawn).save(folder / f"step-{job.state.global_step:07d}.png")
    for tracker in job.accelerator.trackers:
        log_pictures(tracker, drawn, job.prompts, job.state.global_step)
    return drawn


@torch.no_grad()
def decode(pipe, latents):
    """Return latents [B,C,h,w] as pictures, decoded in the VAE's own dtype: SDXL's overflows in float16."""
    latents = latents.to(pipe.vae.dtype) / pipe.vae.config.scaling_factor
    return pipe.image_processor.postprocess(pipe.vae.decode(latents).sample.float())


def log_pictures(tracker, drawn, prompts, global_step):
    """Give validation pictures to one tracker, with caption and step."""
    if tracker.name == "tensorboard":
        for steps, pictures in drawn.items():
            tracker.log_images(
                {f"validation/{steps} steps": np.stack(pictures)}, step=global_step, dataformats="NHWC"
            )
    elif tracker.name == "wandb":
        import wandb

        captioned = [
            wandb.Image(picture, caption=f"{prompt} ({steps} steps)")
            for steps, pictures in drawn.items()
            for prompt, picture in zip(prompts, pictures, strict=True)
        ]
        tracker.log({"validation": captioned}, step=global_step)


def grid_of(drawn):
    """Return pictures {steps: [picture of each prompt]} as one: a column a step count, a row a prompt."""
    side, head = next(iter(drawn.values()))[0].width, 20
    rows = max(len(pictures) for pictures in drawn.values())
    sheet = Image.new("RGB", (len(drawn) * side, head + rows * side), "white")
    pen = ImageDraw.Draw(sheet)
    for column, (steps, pictures) in enumerate(drawn.items()):
        pen.text((column * side + 4, 3), f"{steps} steps", fill="black", font=ImageFont.load_default(12))
        for row, picture in enumerate(pictures):
            sheet.paste(picture, (column * side, head + row * side))
    return sheet


def write_card(args, drawn, prompts, num_processes):
    """Write the pictures at 4 steps as `image_<i>.png` and the model card `README.md`."""
    folder = Path(args.output_dir)
    for number, picture in enumerate(drawn[4]):
        picture.save(folder / f"image_{number}.png")
    teacher = args.pretrained_teacher_model
    from_hub = not Path(teacher).exists()
    name, prompt = repository_name(args), json.dumps(prompts[0], ensure_ascii=False)
    training = "\n".join(
        f"| {flag} | {getattr(args, flag)} |"
        for flag in "resolution train_batch_size gradient_accumulation_steps max_train_steps learning_rate "
        "lora_rank lora_alpha w_min w_max num_ddim_timesteps loss_type huber_c loss_space seed".split()
    )
    base = teacher if from_hub else "THE-TEACHER"
    description = f"""# LCM-LoRA

Distilled from {teacher if from_hub else "a local teacher"}; draws in 2 to 8 steps.

<Gallery />

```python
import torch
from diffusers import DiffusionPipeline, LCMScheduler
pipe = DiffusionPipeline.from_pretrained("{base}", torch_dtype=torch.float16)
pipe.to("cuda")  # on a CPU: torch.float32 above, and not this line
pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
pipe.load_lora_weights("{name}", adapter_name="lcm")
picture = pipe({prompt}, num_inference_steps=4, guidance_scale=1.0).images[0]
```

Use 2 to 8 steps and guidance 1 to 2; a negative prompt acts only above 1. `{KOHYA_NAME}` is the same LoRA for
ComfyUI and A1111. Pictures above: 4 steps, guidance 1. The LoRA inherits the teacher's limits and biases.

| training | value |
|---|---|
{training}
| processes | {num_processes} |
"""
    data = ModelCardData(
        base_model=teacher if from_hub else None,
        library_name="diffusers",
        license=teacher_license(args, from_hub),
        pipeline_tag="text-to-image",
        tags=CARD_TAGS.split(),
        widget=[{"text": text, "output": {"url": f"image_{i}.png"}} for i, text in enumerate(prompts)],
    )
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{description}").save(folder / "README.md")


def teacher_license(args, from_hub):
    """Return the license in the teacher's own card; the Hub is asked only when the run pushes to it."""
    teacher = args.pretrained_teacher_model
    card = Path(teacher) / "README.md"
    if not card.is_file() and not (from_hub and args.push_to_hub):
        return None
    try:
        return ModelCard.load(card if card.is_file() else teacher, token=args.hub_token).data.get("license")
    except (
        Exception
    ) as error:  # a card can be missing or malformed in any way; the run is done and must end well
        reason = " ".join(str(error).split())[:200]
        tqdm.write(
            f"no license for the model card: {teacher} has no readable card ({reason})", file=sys.stderr
        )
        return None


def repository_name(args):
    """Return the Hub repository of a run."""
    return args.hub_model_id or Path(args.output_dir).resolve().name


def make_repository(args):
    """Make the Hub repository, if it is not there, before any GPU hour is spent.

    Raises:
        UnusableInput: the Hub refuses. One that cannot be reached now is said, and asked again at the end.
    """
    try:
        create_repo(repository_name(args), exist_ok=True, token=args.hub_token)
    except (HTTPError, OSError, ValueError) as error:
        status = getattr(getattr(error, "response", None), "status_code", 0)
        message = f"--push_to_hub: {repository_name(args)} cannot be made: {one_line(error)}"
        refused = status in range(400, 500) and status not in (408, 429)
        if refused or isinstance(error, (ValueError, LocalTokenNotFoundError)):
            raise UnusableInput(f"{message}; log in with `hf auth login`, or leave the flag out") from error
        tqdm.write(f"{message}; training goes on, the upload is tried again later", file=sys.stderr)


def one_line(error):
    """Return an error's text as one line without secrets."""
    return masked(" ".join(str(error).split())[:300]) or type(error).__name__


def push(args, folder=None, attempts=PUSH_ATTEMPTS):
    """Upload a folder's LoRA files, pictures and card, nothing else, and return the repository's address.

    Raises:
        UploadFailed: the last attempt failed too.
    """
    for attempt in range(attempts):
        time.sleep(2 ** (attempt - 1) if attempt else 0)
        try:
            return upload_folder(
                repo_id=create_repo(repository_name(args), exist_ok=True, token=args.hub_token).repo_id,
                folder_path=folder or args.output_dir,
                token=args.hub_token,
                commit_message="LCM-LoRA",
                allow_patterns=[WEIGHTS_NAME, KOHYA_NAME, "README.md", "image_*.png"],
            )
        except Exception as error:  # of HTTP, LFS, Xet or the disk: none may cost a run
            cause = error
            tqdm.write(f"upload {attempt + 1} of {attempts} failed: {one_line(error)}", file=sys.stderr)
    raise UploadFailed(one_line(cause)) from cause


def push_or_say(args, folder=None, attempts=PUSH_ATTEMPTS):
    """Upload a folder's files, or say how to do it later."""
    try:
        tqdm.write(f"uploaded to {push(args, folder, attempts)}", file=sys.stderr)
    except UploadFailed:
        tqdm.write(
            f"not uploaded; the files are in {folder or args.output_dir}. To publish them later: "
            f"python scripts/push_to_hub.py --folder {folder or args.output_dir} "
            f"--hub_model_id {repository_name(args)}",
            file=sys.stderr,
        )


# <<< shared: log

# ----------------------------------------------------------------------------------------------------------
# The run
# ----------------------------------------------------------------------------------------------------------


# >>> shared: run
def start(args):
    """Return the Accelerator, after checking that this suite supports how it was launched."""
    # Of 1x1 convolutions' gradients, whose strides of size-1 dimensions mean nothing.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    diffusers_logging.set_verbosity_error()  # encode_prompt would say of every long caption that it is cut
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    trackers = None if args.report_to == "none" else args.report_to
    project = ProjectConfiguration(args.output_dir, str(Path(args.output_dir) / args.logging_dir))
    try:
        accelerator = Accelerator(
            mixed_precision=args.mixed_precision,
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            log_with=trackers,
            project_config=project,
        )
    except (ValueError, ImportError) as error:
        raise UnusableInput(f"accelerate cannot start: {error}") from error
    if accelerator.distributed_type not in (
        DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU
    ):  # fmt: skip
        raise UnusableInput(
            f"{accelerator.distributed_type} is not supported; launch with one or several GPUs or CPUs (DDP)"
        )
    if int(os.environ.get("WORLD_SIZE", 1)) != accelerator.num_processes:
        raise UnusableInput(
            f"launched as {os.environ['WORLD_SIZE']} processes, but each would train alone; on CPUs set "
            "ACCELERATE_USE_CPU=true and start them with torchrun"
        )
    if accelerator.mixed_precision not in ("no", "fp16", "bf16"):
        raise UnusableInput(f"--mixed_precision {accelerator.mixed_precision}: must be no, fp16 or bf16")
    if args.enable_xformers_memory_efficient_attention and accelerator.device.type != "cuda":
        raise UnusableInput(
            "--enable_xformers_memory_efficient_attention needs a CUDA GPU; leave it out to use SDPA"
        )
    if args.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    if args.max_train_steps is None:
        num_samples = args.num_train_epochs * args.max_train_samples
        args.max_train_steps = math.ceil(num_samples / samples_per_update(args, accelerator))
    return accelerator


def samples_per_update(args, accelerator):
    """Return how many samples all processes together put into one update."""
    return args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes


def agree(accelerator, function, *arguments):
    """Return what `function` returns on the main process, to all; an UnusableInput there is raised on all."""
    result = [None, None]
    if accelerator.is_main_process:
        try:
            result[0] = function(*arguments)
        except UnusableInput as error:
            result[1] = str(error)
    broadcast_object_list(result)
    if result[1]:
        raise UnusableInput(result[1])
    return result[0]


def write_record(args, accelerator):
    """Write flags (less the token), package versions and a copy of this script; start the trackers."""
    flags = public_flags(args)
    folder = Path(args.output_dir)
    packages = {}
    for name in PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = None
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "args.json", json.dumps(flags, indent=1))
        write_atomically(
            folder / "versions.json", json.dumps({"script": SCRIPT_VERSION, **packages}, indent=1)
        )
        copy = folder / Path(__file__).name
        if not copy.exists() or not copy.samefile(__file__):
            shutil.copyfile(__file__, copy)
    plain = {
        name: value if isinstance(value, (int, float, str, bool)) else str(value)
        for name, value in flags.items()
    }
    versions = {f"version/{name}": str(value) for name, value in packages.items()}
    options = {"wandb": {"dir": args.output_dir}}
    accelerator.init_trackers(args.tracker_project_name, config=plain | versions, init_kwargs=options)


def listen(state):
    """Note SIGTERM and SIGUSR1 in the state; the training loop acts on them."""

    def note(number, _frame):
        state.stop_signal = signal.Signals(number).name

    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, note)


def stop_if_asked(accelerator, state, args):
    """Save a checkpoint and raise StoppedBySignal, on all processes, once one of them had a signal."""
    asked = accelerator.reduce(
        torch.tensor(float(state.stop_signal is not None), device=accelerator.device), "sum"
    )
    if asked.item():
        save_checkpoint(accelerator, state, args)
        raise StoppedBySignal(
            f"stopped by {state.stop_signal or 'a signal to another process'}; "
            f"checkpoint-{state.global_step} is saved, the same command goes on from it"
        )


def next_batch(batches, state):
    """Return the next batch, noting how far the data has been read and what was skipped.

    Raises:
        UnusableInput: nothing usable is left.
    """
    batch = next(batches)
    if "error" in batch:
        error = UnusableInput(batch["error"])
        error.only_here = True  # other processes may have data left and say nothing
        raise error
    consumer, epoch, number = batch["position"]
    state.positions[str(consumer)] = (epoch, number)
    state.skipped.update(batch["skipped"])
    return batch


@dataclass
class Job:
    """Everything that a run works with."""

    args: argparse.Namespace
    accelerator: Accelerator
    dtype: torch.dtype  # of the UNet's, VAE's and text encoder's arithmetic
    pipe: object  # the teacher's pipeline; its UNet carries the LoRA
    teacher: torch.nn.Module  # a UNet without the LoRA, on the same weights
    schedule: Schedule
    student: torch.nn.Module  # the same UNet, wrapped for several processes
    optimizer: torch.optim.Optimizer
    lr_schedule: torch.optim.lr_scheduler.LRScheduler
    scaling_factor: float  # of the latents
    uncond_embeds: dict  # of the empty caption, one row
    prompts: list  # to draw at validation
    prompt_embeds: dict  # of the prompts
    state: RunState


def batch_loss(job, batch, micro_step):
    """Return the distillation loss of one batch from the loader, of pictures or of cached tensors."""
    args, pipe, device = job.args, job.pipe, job.accelerator.device
    batch = {
        name: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
        for name, value in batch.items()
    }
    with torch.no_grad():
        if "pixels" in batch:
            batch["moments"] = encode_moments(pipe.vae, batch["pixels"], args)
            batch |= encode_prompts(pipe, batch["caption"], device)
        moments = batch["moments"]
        shape = (len(moments), moments.shape[1] // 2, *moments.shape[2:])
        draws = draw(args, shape, job.state.global_step, micro_step, job.accelerator.process_index, device)
        latents = sample_latents(moments, draws.posterior_eps, job.scaling_factor)
        conditioning, uncond = condition(job.uncond_embeds, batch, draws.empty)
    models = job.student, pipe.unet, job.teacher
    return distillation_loss(*models, job.schedule, latents, conditioning, uncond, draws, args, job.dtype)


def update(job, batches, parameters):
    """Make one update of the LoRA and return (loss, gradient norm), both on the device."""
    losses = []
    for micro_step in range(job.args.gradient_accumulation_steps):
        batch = next_batch(batches, job.state)
        with job.accelerator.accumulate(job.student):
            loss = batch_loss(job, batch, micro_step)
            job.accelerator.backward(loss)
            losses.append(loss.detach())
            if job.accelerator.sync_gradients:
                grad_norm = job.accelerator.clip_grad_norm_(parameters, job.args.max_grad_norm)
            job.optimizer.step()
            job.optimizer.zero_grad()
    job.lr_schedule.step()
    job.state.global_step += 1
    return torch.stack(losses).mean(), grad_norm


def train(job, loader, log):
    """Update the LoRA until --max_train_steps, logging, saving and drawing on the way."""
    args, accelerator, state = job.args, job.accelerator, job.state
    batches = iter(loader)
    parameters = [parameter for parameter in job.pipe.unet.parameters() if parameter.requires_grad]
    while state.global_step < args.max_train_steps:
        lr = job.lr_schedule.get_last_lr()[0]
        loss, grad_norm = update(job, batches, parameters)
        log.add(state.global_step, loss, grad_norm, lr)
        last = state.global_step == args.max_train_steps
        save = last or state.global_step % args.checkpointing_steps == 0
        if save or state.global_step % args.logging_steps == 0:
            log.flush()  # also the check that the loss is finite, before anything is saved
            if not last:
                stop_if_asked(accelerator, state, args)
        if save:
            save_checkpoint(accelerator, state, args)
            if args.push_checkpoints_to_hub and accelerator.is_main_process and not last:
                push_or_say(args, Path(args.output_dir) / f"checkpoint-{state.global_step}", attempts=2)
        if args.validation_steps and state.global_step % args.validation_steps == 0 and not last:
            log.flush()  # trackers want steps in order
            if accelerator.is_main_process:
                validate(job)
            accelerator.wait_for_everyone()
        if not log.rows:
            log.restart_clock()


def finish(job):
    """Write the LoRA, the last pictures and the model card, and upload them where asked."""
    args, accelerator, pipe = job.args, job.accelerator, job.pipe
    total = sum((Counter(part) for part in gather_object([dict(job.state.skipped)])), Counter())
    if accelerator.is_main_process:
        save_lora(pipe.unet, type(pipe), args.output_dir, args)
        drawn = validate(job)
        write_card(args, drawn, job.prompts, accelerator.num_processes)
        tqdm.write(f"skipped samples: {describe(total) or 'none'}", file=sys.stderr)
        tqdm.write(f"the LoRA is {Path(args.output_dir) / WEIGHTS_NAME}", file=sys.stderr)
        if args.push_to_hub:
            push_or_say(args)
    accelerator.wait_for_everyone()


def load_models(args, dtype, device, samples, cache):
    """Return (teacher's pipeline, scaling factor, embeddings of "", prompts to draw, their embeddings).

    From a cache, VAE and text encoders stay away; --validation_prompts alone needs the encoders for a moment.
    """
    prompts = args.validation_prompts or [sample["caption"] for sample in samples]
    with torch.no_grad():
        if not cache:
            pipe = load_teacher(args, dtype, device)
            uncond_embeds, prompt_embeds = (encode_prompts(pipe, texts, device) for texts in ([""], prompts))
            return pipe, pipe.vae.config.scaling_factor, uncond_embeds, prompts, prompt_embeds
        uncond_embeds = load_tensors(cache["safetensors"])
        if args.validation_prompts:
            prompt_embeds = encode_prompts(
                load_teacher(args, dtype, device, unet=None, vae=None), prompts, device
            )
        else:
            prompt_embeds = {
                name: torch.stack([sample[name] for sample in samples]) for name in uncond_embeds
            }
    pipe = load_teacher(args, dtype, device, **dict.fromkeys(("vae", *TEXT_PARTS)))
    uncond_embeds, prompt_embeds = (
        {name: value.to(device, dtype) for name, value in embeds.items()}
        for embeds in (uncond_embeds, prompt_embeds)
    )
    return pipe, json.loads(cache["json"])["scaling_factor"], uncond_embeds, prompts, prompt_embeds


def make_job(args, accelerator, samples, cache):
    """Return the Job of a run from its start: models, LoRA, optimizer."""
    dtype = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[accelerator.mixed_precision]
    pipe, *rest = load_models(args, dtype, accelerator.device, samples, cache)
    flags = args.num_ddim_timesteps, args.timestep_scaling_factor
    schedule = make_schedule(pipe.scheduler.config, *flags, accelerator.device, args.loss_space)
    teacher = twin(pipe.unet)
    if args.use_4bit_base:
        quantize(pipe.unet, teacher)
    parameters = add_lora(pipe.unet, args)
    for unet in (pipe.unet, teacher):
        make_fast(unet, args)
    optimizer, lr_schedule = make_optimizer(parameters, args, accelerator.num_processes)
    register_hooks(accelerator, pipe.unet, type(pipe), args)
    # Not moved again: where "cpu" becomes "cpu:0" that copies, and parts student and teacher.
    student, optimizer = accelerator.prepare(pipe.unet, optimizer, device_placement=[False, True])
    # Autocast would compute every norm in float32, and cast its output for each layer that takes it.
    accelerator.unwrap_model(student, keep_fp32_wrapper=False)
    accelerator.register_for_checkpointing(lr_schedule)
    models = pipe, teacher, schedule, student
    return Job(args, accelerator, dtype, *models, optimizer, lr_schedule, *rest, RunState())


def make_stream(job, shards, cache, manifest):
    """Return the ShardStream of this process, at its start or where a checkpoint's manifest left it."""
    args, accelerator, state = job.args, job.accelerator, job.state
    stream = ShardStream(shards, args, accelerator.num_processes, accelerator.process_index, cache=cache)
    if manifest:
        state.global_step = manifest["global_step"]
        state.positions = {
            consumer: position
            for consumer, position in manifest["positions"].items()
            if int(consumer) in range(stream.first_consumer, stream.first_consumer + stream.workers)
        }
        stream.num_batches = state.global_step * args.gradient_accumulation_steps
        stream.positions = dict(state.positions)
    return stream


def main(args):
    """Distil the LoRA that the flags describe."""
    accelerator = start(args)

    def say(message):
        if accelerator.is_main_process:
            tqdm.write(message, file=sys.stderr)

    # What cannot be trained on is said before any model loads.
    shards = agree(accelerator, list_shards, args.train_shards_path_or_url)
    args.num_shards = len(shards)  # one more or less would move every position of a resumed run
    samples, report, cache = agree(accelerator, audit, shards, args)
    say(f"data: {report}")
    folder, manifest = agree(accelerator, find_checkpoint, args, say)
    if manifest:
        check_same_settings(manifest, args, accelerator)
        say(f"resuming from {folder}")
    elif args.resume_from_checkpoint == "latest":
        say(f"no complete checkpoint in {args.output_dir}: starting from update 0")
    if args.dry_run:
        say(json.dumps(public_flags(args), indent=1))
        return
    if args.push_to_hub:
        agree(accelerator, make_repository, args)
    write_record(args, accelerator)

    job = make_job(args, accelerator, samples, cache)
    say(f"LoRA: {job.pipe.unet.num_parameters(only_trainable=True):,} trainable parameters")
    listen(job.state)
    if manifest:
        accelerator.load_state(str(folder))
    loader = make_loader(make_stream(job, shards, cache, manifest), accelerator.device.type == "cuda")
    log = Log(accelerator, args, job.state.global_step)
    try:
        train(job, loader, log)
    finally:
        log.bar.close()  # so that an error has a line of its own
    finish(job)
    # DDP has to go before its process group: as the last to hold it, it would wait for gloo's thread, and
    # that for the interpreter.
    del job
    accelerator.free_memory()
    accelerator.end_training()


def run(args):
    """Return the exit code of a run, its error printed as one line."""
    codes = {UnusableInput: 2, StoppedBySignal: 3, NonFiniteLoss: 1}
    try:
        main(args)
    except tuple(codes) as error:
        if int(os.environ.get("RANK", 0)) == 0 or hasattr(error, "only_here"):
            print(f"{'stopped' if isinstance(error, StoppedBySignal) else 'error'}: {error}", file=sys.stderr)
        return codes[type(error)]
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return 0


# <<< shared: run

if __name__ == "__main__":
    sys.exit(run(ARGS))
