#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Estimate the GPU memory of a training run, on any machine: will it fit on this card?

    python scripts/estimate_memory.py --model sdxl @scripts/launch/recipes/sdxl-12gb.txt
    python scripts/estimate_memory.py --model sd15 --train_batch_size 16 --mixed_precision fp16 --cached

The training script's own step runs on PyTorch's meta device. Flags that are not listed here are the training script's.

Not counted: CUDA's context (about 0.5 GiB), workspaces of cuDNN and cuBLAS, fragmentation, NCCL's and DDP's buffers.
So the card should have a tenth more than the peak, and 1 GiB, as the last line says. Attention counts as flash
attention; --compile and xformers are left out.
"""

import os
import sys
import weakref
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]
from lib.benchmark.sweep import REAL_MODELS
from lib.cli import ToolParser, started

GIB = 2**30
ADAMW_BYTES, ADAMW_8BIT_BYTES = 8, 2 + 8 / 256  # two moments; in 8 bits with a float32 scale for 256 values
NF4_BYTES = 0.5 + 4 / 64  # a weight in 4 bits, with a float32 scale for 64 weights


def parse_args(argv=None):
    cli = ToolParser(__doc__)
    cli.add_argument("--model", choices=REAL_MODELS, required=True)
    cli.add_argument("--cached", action="store_true", help="train from cached latents and text")
    return cli.parse_known_args(argv)


if __name__ == "__main__":
    OWN, WORDS = started(parse_args())

import copy

import torch
from lib.benchmark.real_models import build_teacher, trainer_of
from lib.trainers import DTYPES, exit_code
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

META = torch.device("meta")


class LiveMemory(TorchDispatchMode):
    """Adds up the meta storages that are alive; `peaks` holds the most bytes in each part of a step."""

    def __init__(self, fixed):
        super().__init__()
        self.live, self.part, self.peaks = 0, "student", {}
        self.known = WeakIdKeyDictionary({tensor.untyped_storage(): True for tensor in fixed})

    def __torch_dispatch__(self, function, _types, args=(), kwargs=None):
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
        self.live -= num_bytes

    @contextmanager
    def within(self, part):
        outer, self.part = self.part, part
        yield
        self.part = outer

    def parted(self, owner, name, part):
        """Return a patch with which every call of `owner.name` is a part."""
        plain = getattr(owner, name)

        def counted(*args, **kwargs):
            with self.within(part):
                return plain(*args, **kwargs)

        return patch.object(owner, name, counted)


def trainer_flags(own, words, trainer):
    args = trainer.parse_args([
        *words, "--pretrained_teacher_model", f"random/{own.model}", "--train_shards_path_or_url",
        "pipe:", "--max_train_steps", "1", "--output_dir", os.devnull + "/none", "--init_lora", __file__,
    ])  # fmt: skip
    args.compile = args.enable_xformers_memory_efficient_attention = False
    teacher = Path(trainer.build_parser().parse_known_args(words)[0].pretrained_teacher_model or "none")
    is_local = teacher.suffix in (".safetensors", ".ckpt") or (teacher / "vae").is_dir()
    own.has_own_vae = is_local and not args.pretrained_vae_model_name_or_path
    return args


def meta_job(own, trainer, args):
    """Return (what a step needs of a job, the LoRA's parameters, the fake's, bytes that 4-bit packing saves).

    All of it is on the meta device, where nothing can be packed: 4-bit layers stay as they are.
    """
    packed, args.use_4bit_base = args.use_4bit_base, False
    dtype = DTYPES[args.mixed_precision or "no"]
    pipe = build_teacher(own.model, args, dtype, META)
    if own.has_own_vae and own.model != "sd15" and dtype == torch.float16:
        pipe.vae.float()  # SDXL's own overflows in fp16
    uncond_embeds = trainer.encode_prompts(pipe, [""], META)
    if own.cached:
        pipe.text_encoder = pipe.text_encoder_2 = None  # the VAE is loaded at the first validation
    saved = saved_by_packing(trainer, pipe.unet) if packed else 0
    teacher_unet, fake_unet = trainer.make_twin(pipe.unet), trainer.make_twin(pipe.unet)
    with META:
        fake_parameters = trainer.add_lora(fake_unet, args) if args.objective == "matching" else []
        parameters = trainer.add_lora(pipe.unet, args)
    for unet in (pipe.unet, teacher_unet, fake_unet):
        trainer.prepare_unet(unet, args)
    job = SimpleNamespace(
        args=args, pipe=pipe, teacher_unet=teacher_unet, student_unet=pipe.unet, student=pipe.unet, dtype=dtype,
        scaling_factor=1.0, schedule=trainer.make_schedule(pipe.scheduler.config, args, META),
        accelerator=SimpleNamespace(device=META, process_index=0), state=SimpleNamespace(global_step=0),
        uncond_embeds={name: value.detach() for name, value in uncond_embeds.items()},
        fake=SimpleNamespace(unet=fake_unet, grids=trainer.student_grids(pipe.scheduler.config, args)),
    )  # fmt: skip
    return job, parameters, fake_parameters, saved


def losses_of(trainer, job, batch):
    if job.args.objective != "matching":
        yield trainer.batch_loss(job, batch, 0)
        return
    z_t, timesteps, *conditioning, draws = trainer.matching_inputs(job, batch, 0)
    x = trainer.consistency(job.student, job.schedule, z_t, timesteps, conditioning[0], job.dtype)
    yield trainer.student_loss(job, x, *conditioning, draws)
    job.student.zero_grad()
    inputs = x.detach(), draws.tau[1], draws.tau_eps[1], conditioning[0], job.dtype
    yield trainer.fake_loss(job.fake.unet, job.schedule, *inputs)[0]


def saved_by_packing(trainer, unet):
    """Return how many bytes fewer a UNet takes once `quantize_4bit` has packed its layers."""
    before = {name: module.weight for name, module in unet.named_modules() if hasattr(module, "weight")}
    packed = copy.deepcopy(unet)
    trainer.quantize_4bit(packed)
    kinds = {name: type(module) for name, module in packed.named_modules()}
    changed = [weight for name, weight in before.items() if kinds[name] is not type(unet.get_submodule(name))]
    unpacked = max(weight.numel() * weight.element_size() for weight in changed)  # in use, one at a time
    return sum(weight.numel() * (weight.element_size() - NF4_BYTES) for weight in changed) - unpacked


def make_batch(own, args, job):
    size, side = args.train_batch_size, args.resolution
    batch = {"caption": ["a"] * size, "time_ids": torch.empty(size, 6, device=META)}
    if not own.cached:
        tokenizers = [job.pipe.tokenizer, getattr(job.pipe, "tokenizer_2", None)]
        ids = [torch.empty(size, each.model_max_length, dtype=torch.int64, device=META) for each in tokenizers if each]
        return batch | {"ids": ids, "pixels": torch.empty(size, side, side, 3, dtype=torch.uint8, device=META)}
    factor = job.pipe.vae_scale_factor
    moments = torch.empty(size, 8, side // factor, side // factor, device=META)
    embeds = {name: value.repeat(size, *[1] * (value.ndim - 1)) for name, value in job.uncond_embeds.items()}
    return batch | embeds | {"moments": moments}


def bytes_of(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def count_memory(own, words):
    """Return (flags, {what lies in memory throughout: bytes}, {part of the step: most bytes beside that})."""
    trainer = trainer_of(own.model)
    args = trainer_flags(own, words, trainer)
    job, parameters, fake_parameters, saved = meta_job(own, trainer, args)
    parts = {name: getattr(job.pipe, name, None) for name in ("unet", "vae", "text_encoder", "text_encoder_2")}
    if own.cached and args.validation_steps == -1:  # the run loads no VAE
        del parts["vae"]
    tensors = {name: [*part.parameters(), *part.buffers()] for name, part in parts.items() if part is not None}
    memory = LiveMemory([*fake_parameters, *(tensor for each in tensors.values() for tensor in each)])
    side = args.resolution // job.pipe.vae_scale_factor
    with ExitStack() as stack:

        def flash(query, key, value, *_, **__):  # on meta SDPA makes the L x L matrix
            return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]

        stack.enter_context(patch.object(functional, "scaled_dot_product_attention", flash))
        stack.enter_context(memory.parted(trainer, "encode", "VAE, text"))
        stack.enter_context(memory.parted(trainer, "teacher_step", "teacher"))
        stack.enter_context(memory)
        for parameter in parameters if args.gradient_accumulation_steps > 1 else ():
            parameter.grad = torch.zeros_like(parameter)  # of the micro steps before
        for loss in losses_of(trainer, job, make_batch(own, args, job)):
            with memory.within("backward"):
                loss.backward()
        del loss
        for parameter in [*parameters, *fake_parameters]:
            parameter.grad = None
        if args.validation_steps != -1:
            with torch.no_grad(), memory.within("validation"):
                job.pipe.vae.decode(torch.empty(1, 4, side, side, dtype=job.pipe.vae.dtype, device=META))
    fixed = {name: bytes_of(each) for name, each in tensors.items()}
    fixed["unet"] -= bytes_of(parameters) + saved
    fixed["LoRA"] = bytes_of(parameters)
    if fake_parameters:
        fixed["fake's LoRA"] = bytes_of(fake_parameters)
    num_parameters = sum(parameter.numel() for parameter in [*parameters, *fake_parameters])
    fixed["optimizer"] = num_parameters * (ADAMW_8BIT_BYTES if args.use_8bit_adam else ADAMW_BYTES)
    return args, fixed, memory.peaks


def peak_gib_of(fixed, peaks):
    return (sum(fixed.values()) + max(peaks.values())) / GIB


def card_gib(fixed, peaks):
    return 1.1 * peak_gib_of(fixed, peaks) + 1


def main(own):
    args, fixed, peaks = count_memory(own, WORDS)
    setting = f"batch {args.train_batch_size}, mixed precision {args.mixed_precision or 'no'}"
    print(f"{own.model}, {args.resolution} px, {setting}: GiB")
    for name, num_bytes in (fixed | {f"+ {part}": num_bytes for part, num_bytes in peaks.items()}).items():
        print(f"  {name:20}{num_bytes / GIB:8.2f}")
    print(f"  {'peak':20}{peak_gib_of(fixed, peaks):8.2f}\n  {'a card of at least':20}{card_gib(fixed, peaks):8.2f}")


if __name__ == "__main__":
    sys.exit(exit_code(main, OWN))
