#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Estimate the GPU memory of a training run, on any machine: will it fit on this card?

    python scripts/estimate_memory.py --model sdxl --train_batch_size 1 --mixed_precision bf16 \\
        --gradient_checkpointing --use_8bit_adam --cached

The training script's own step runs on PyTorch's meta device, whose tensors have shapes and no values, and
what is alive at each moment is added up. Flags that are not listed here are the training script's.

Not counted: CUDA's context (about half a GiB), workspaces of cuDNN and cuBLAS, fragmentation, and with
several GPUs DDP's buckets (4 bytes a parameter of the LoRA). Attention counts as flash attention; --compile
and xformers are left out. Exit codes: 0 done; 2 wrong usage; 1 anything else.
"""

import argparse
import logging
import os
import sys
import weakref
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE / "benchmark")]
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
for package in ("xformers", "bitsandbytes"):
    logging.getLogger(package).setLevel(logging.ERROR)  # on import they warn of CUDA code not needed here

import torch
from diffusers.utils import logging as diffusers_logging
from real_models import REAL_MODELS, build_teacher
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

import train_lcm_lora_sd15
import train_lcm_lora_sdxl

GIB = 2**30
META = torch.device("meta")
DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
ADAMW_BYTES, ADAMW_8BIT_BYTES = 8, 2 + 8 / 256  # two moments; in 8 bits with a float32 scale for 256 values
PARTS = {"encode_moments": "VAE", "encode_prompts": "text", "teacher_step": "teacher", "consistency": None}


class LiveMemory(TorchDispatchMode):
    """Adds up the meta storages that are alive; `peaks` has the most bytes in each part of a step."""

    def __init__(self, fixed):
        """Start with nothing alive; storages of the tensors `fixed` never count."""
        super().__init__()
        self.live, self.part, self.peaks = 0, "other", {}
        self.known = WeakIdKeyDictionary({tensor.untyped_storage(): True for tensor in fixed})

    def __torch_dispatch__(self, function, _types, args=(), kwargs=None):
        """Run an operation and count the storages that it makes."""
        output = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor) and tensor.is_meta:
                self.count(tensor.untyped_storage())
        return output

    def count(self, storage):
        """Count a storage from now until nothing refers to it."""
        if storage not in self.known:
            self.known[storage] = True
            self.live += storage.nbytes()
            weakref.finalize(storage, self.free, storage.nbytes())
        self.peaks[self.part] = max(self.peaks.get(self.part, 0), self.live)

    def free(self, num_bytes):
        """Count a storage no more."""
        self.live -= num_bytes

    @contextmanager
    def within(self, part):
        """Let what is counted in a block belong to a part."""
        outer, self.part = self.part, part
        yield
        self.part = outer

    def wrap(self, owner, function, part):
        """Let every call of `owner.function` be a part."""
        plain = getattr(owner, function)

        def counted(*args, **kwargs):
            with self.within(part or ("student forward" if torch.is_grad_enabled() else "target")):
                return plain(*args, **kwargs)

        setattr(owner, function, counted)


def flash_attention(query, key, value, *_, **__):
    """Return a tensor like attention [B,H,L,D], by CUDA's operation: on meta SDPA makes the L x L matrix."""
    return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]


def parse_args(argv=None):
    """Return (this tool's flags, the training script, its flags); wrong ones exit with 2."""
    cli = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    cli.add_argument("--model", choices=REAL_MODELS, required=True)
    cli.add_argument("--cached", action="store_true", help="train from cached latents and text")
    own, words = cli.parse_known_args(argv)
    trainer = train_lcm_lora_sd15 if own.model == "sd15" else train_lcm_lora_sdxl
    args = trainer.parse_args([
        *words, "--pretrained_teacher_model", f"random/{own.model}", "--train_shards_path_or_url", "pipe:",
        "--max_train_steps", "1", "--output_dir", os.devnull + "/none",
    ])  # fmt: skip
    args.compile = args.enable_xformers_memory_efficient_attention = False
    return own, trainer, args


def make_job(own, trainer, args):
    """Return (what `batch_loss` asks of a job, the LoRA's parameters, bytes of the UNet as it is loaded).

    All of it is on the meta device.
    """
    dtype = DTYPES[args.mixed_precision or "no"]
    pipe = build_teacher(own.model, args, dtype, META)
    uncond_embeds = trainer.encode_prompts(pipe, [""], META)
    if own.cached:
        pipe.text_encoder = pipe.text_encoder_2 = None  # the VAE is loaded at the first validation
    teacher = trainer.twin(pipe.unet)
    loaded = size_of(pipe.unet.parameters())
    if args.use_4bit_base:
        trainer.quantize(pipe.unet, teacher)
    with META:
        parameters = trainer.add_lora(pipe.unet, args)
    for unet in (pipe.unet, teacher):
        trainer.make_fast(unet, args)
    flags = args.num_ddim_timesteps, args.timestep_scaling_factor
    job = SimpleNamespace(
        args=args, pipe=pipe, teacher=teacher, student=pipe.unet, dtype=dtype, scaling_factor=1.0,
        schedule=trainer.make_schedule(pipe.scheduler.config, *flags, META, args.loss_space),
        accelerator=SimpleNamespace(device=META, process_index=0), state=trainer.RunState(),
        uncond_embeds={name: value.detach() for name, value in uncond_embeds.items()},
    )  # fmt: skip
    return job, parameters, loaded


def make_batch(own, args, job):
    """Return a batch of pictures, or of cached tensors, without values."""
    size, side = args.train_batch_size, args.resolution
    batch = {"caption": ["a"] * size, "time_ids": torch.empty(size, 6, device=META)}
    if not own.cached:
        return batch | {"pixels": torch.empty(size, side, side, 3, dtype=torch.uint8, device=META)}
    moments = torch.empty(size, 8, side // 8, side // 8, device=META)
    embeds = {name: value.repeat(size, *[1] * (value.ndim - 1)) for name, value in job.uncond_embeds.items()}
    return batch | embeds | {"moments": moments}


def scales_of(module):
    """Return the scales of weights kept in 4 bits, which are neither parameters nor buffers."""
    return [each.packing.absmax for each in module.modules() if hasattr(each, "packing")]


def size_of(tensors):
    """Return the bytes that tensors take."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def measure(own, trainer, args):
    """Return ({what lies in memory throughout: bytes}, {part of the step: most bytes beside that})."""
    functional.scaled_dot_product_attention = flash_attention
    job, parameters, loaded = make_job(own, trainer, args)
    modules = {name: getattr(job.pipe, name, None) for name in ("unet", "vae", *trainer.TEXT_PARTS)}
    tensors = {
        name: [*module.parameters(), *module.buffers(), *scales_of(module)]
        for name, module in modules.items()
        if isinstance(module, torch.nn.Module)
    }
    memory = LiveMemory([tensor for each in tensors.values() for tensor in each])
    for function, part in PARTS.items():
        memory.wrap(trainer, function, part)
    side = args.resolution // 8
    with memory:
        for micro_step in range(min(2, args.gradient_accumulation_steps)):  # the second with gradients alive
            loss = trainer.batch_loss(job, make_batch(own, args, job), micro_step)
            with memory.within("backward"):
                loss.backward()
            del loss
        for parameter in parameters:
            parameter.grad = None
        with torch.no_grad(), memory.within("validation"):
            job.pipe.vae.decode(torch.empty(1, 4, side, side, dtype=job.dtype, device=META))
    num_parameters = sum(parameter.numel() for parameter in parameters)
    fixed = {name: size_of(each) for name, each in tensors.items()}
    fixed["unet"] -= size_of(parameters)
    fixed["LoRA"] = size_of(parameters)
    fixed["optimizer"] = num_parameters * (ADAMW_8BIT_BYTES if args.use_8bit_adam else ADAMW_BYTES)
    if args.use_4bit_base:  # before the LoRA is there, and a cache's VAE
        later = ("LoRA", "optimizer", "vae") if own.cached else ("LoRA", "optimizer")
        memory.peaks["loading"] = max(0, loaded - fixed["unet"] - sum(fixed[name] for name in later))
    return fixed, memory.peaks


def main(own, trainer, args):
    """Print what a run's memory goes to, and its peak."""
    diffusers_logging.set_verbosity_error()
    fixed, peaks = measure(own, trainer, args)
    peaks = {f"+ {part}": num_bytes for part, num_bytes in peaks.items()}
    precision = args.mixed_precision or "no"
    print(
        f"{own.model}, {args.resolution} px, batch {args.train_batch_size}, mixed precision {precision}: GiB"
    )
    for name, num_bytes in (fixed | peaks | {"peak": sum(fixed.values()) + max(peaks.values())}).items():
        print(f"  {name:20}{num_bytes / GIB:8.2f}")


if __name__ == "__main__":
    try:
        main(*parse_args())
    except (train_lcm_lora_sd15.UnusableInput, train_lcm_lora_sdxl.UnusableInput) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
