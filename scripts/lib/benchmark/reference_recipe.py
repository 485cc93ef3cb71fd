# SPDX-License-Identifier: Apache-2.0
"""The recipe in common use, written plainly: what the training scripts are measured against.

A float32 teacher and a float32 student under autocast, a pass for each half of the guidance and one for the
target, PyTorch's AdamW as it comes, the loss read at every update. Data, draws and formulas are the training
script's, so that the losses agree.
"""

import copy
from functools import partial

import torch


def replace_step(trainer):
    """Make a training script, loaded as a module, train as this recipe does."""
    trainer.load_teacher = partial(plain_load, trainer.load_teacher, trainer)
    trainer.make_fast, trainer.make_optimizer = plain_fast, plain_optimizer
    trainer.teacher_step, trainer.predict = plain_teacher_step, plain_predict
    trainer.quantize = lambda _unet, _teacher: None  # its weights are whole, whatever the flags


def plain_load(load, trainer, args, dtype, device, **parts):
    """Return the teacher's pipeline as `load` gives it, but its UNet in float32, and a second such UNet."""
    pipe = load(args, torch.float32, device, **parts)
    for name in ("vae", "text_encoder", "text_encoder_2"):
        if getattr(pipe, name, None):
            getattr(pipe, name).to(dtype)
    teacher = copy.deepcopy(pipe.unet)  # frozen; the pipeline's own becomes the student
    trainer.distillation_loss = partial(plain_loss, trainer, teacher)
    return pipe


def plain_fast(unet, args):
    """Turn on what common recipes have a flag for."""
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if args.enable_xformers_memory_efficient_attention:
        unet.enable_xformers_memory_efficient_attention()


def plain_optimizer(parameters, args, _num_processes):
    """Return (AdamW as PyTorch or bitsandbytes makes it, a constant rate)."""
    kind = torch.optim.AdamW
    if args.use_8bit_adam:
        import bitsandbytes

        kind = bitsandbytes.optim.AdamW8bit
    optimizer = kind(
        parameters, lr=args.learning_rate, betas=(args.adam_beta1, args.adam_beta2), eps=args.adam_epsilon,
        weight_decay=args.adam_weight_decay,
    )  # fmt: skip
    return optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)


def plain_predict(unet, z_t, timesteps, conditioning, dtype):
    """Return the output of a float32 UNet under autocast."""
    with torch.autocast(z_t.device.type, dtype=dtype, enabled=dtype != torch.float32):
        return unet(z_t, timesteps, **conditioning, return_dict=False)[0].float()


def plain_teacher_step(
    unet, trainer, schedule, z_t, timesteps, prev_timesteps, conditioning, uncond, w, dtype
):
    """Return the teacher's guided DDIM step, with one pass for each half of the guidance."""
    cond_output = trainer.predict(unet, z_t, timesteps, conditioning, dtype)
    z0_cond, eps_cond = trainer.clean_estimate(schedule, cond_output, z_t, timesteps)
    uncond_output = trainer.predict(unet, z_t, timesteps, uncond, dtype)
    z0_uncond, eps_uncond = trainer.clean_estimate(schedule, uncond_output, z_t, timesteps)
    z0 = z0_cond + w * (z0_cond - z0_uncond)
    eps = eps_cond + w * (eps_cond - eps_uncond)
    return trainer.ddim_step(schedule, z0, eps, prev_timesteps)


def plain_loss(
    trainer, teacher, student, _unet, _twin, schedule, latents, conditioning, uncond, draws, args, dtype
):
    """Return the loss as common scripts order it: student, teacher twice, target."""
    timesteps = schedule.ddim_timesteps[draws.index]
    prev_timesteps = (timesteps - schedule.k).clamp(min=0)
    z_t = trainer.add_noise(schedule, latents, draws.eps, timesteps)
    pred = trainer.consistency(student, schedule, z_t, timesteps, conditioning, dtype)
    with torch.no_grad():
        z_prev = trainer.teacher_step(
            teacher, trainer, schedule, z_t, timesteps, prev_timesteps, conditioning, uncond, draws.w, dtype
        )
        target = trainer.consistency(student, schedule, z_prev, prev_timesteps, conditioning, dtype)
    return trainer.loss_between(schedule, pred, target, timesteps, args)
