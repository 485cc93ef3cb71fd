# SPDX-License-Identifier: Apache-2.0
"""The recipe in common use, written plainly: what the training scripts are measured against.

A float32 teacher and a float32 student under autocast, a pass for each half of the guidance and one for the
target, PEFT's own LoRA layers, PyTorch's AdamW as it comes, the loss read at every update. Data, draws and formulas
are the training script's, so that the losses agree.
"""

import copy
from functools import partial

import torch
from peft.tuners import lora


def replace_step(trainer):
    """Make a training script, loaded as a module, train as this recipe does, by five of its names."""
    recipe = PlainRecipe(trainer)
    trainer.load_teacher = partial(recipe.load, trainer.load_teacher)
    trainer.make_optimizer = plain_optimizer
    trainer.training_loss = recipe.loss
    trainer.LoraLinear, trainer.LoraConv2d = lora.Linear, lora.Conv2d


def plain_optimizer(parameters, args, _num_processes, _max_train_steps):
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


class PlainRecipe:
    """Loads two UNets in float32 and computes the loss with them."""

    def __init__(self, trainer):
        self.trainer, self.teacher = trainer, None

    def load(self, load, args, dtype, device, **options):
        """Return the pipeline that `load` gives with its UNet in float32, and keep a second such UNet."""
        pipe = load(args, dtype, device, **options)
        if pipe.unet and "unet" not in options:
            pipe.unet.to(torch.float32)
            self.teacher = copy.deepcopy(pipe.unet)  # frozen; the pipeline's own becomes the student
        return pipe

    def teacher_step(self, schedule, z_t, timesteps, prev_timesteps, conditioning, uncond, w):
        """Return the teacher's guided DDIM step, with one pass for each half of the guidance."""
        trainer = self.trainer
        cond_output = trainer.predict(self.teacher, z_t, timesteps, conditioning, torch.float32)
        z0_cond, eps_cond = trainer.clean_estimate(schedule, cond_output, z_t, timesteps)
        uncond_output = trainer.predict(self.teacher, z_t, timesteps, uncond, torch.float32)
        z0_uncond, eps_uncond = trainer.clean_estimate(schedule, uncond_output, z_t, timesteps)
        z0 = z0_cond + w * (z0_cond - z0_uncond)
        eps = eps_cond + w * (eps_cond - eps_uncond)
        return trainer.ddim_step(schedule, z0, eps, prev_timesteps)

    def loss(self, job, latents, conditioning, uncond, draws):
        """Return the loss as common scripts order it: student, teacher twice, target."""
        trainer, schedule, device = self.trainer, job.schedule, latents.device.type
        timesteps = schedule.ddim_timesteps[trainer.send(draws.index, latents.device)]
        prev_timesteps = (timesteps - schedule.k).clamp(min=0)
        z_t = trainer.add_noise(schedule, latents, draws.eps, timesteps)
        with torch.autocast(device, dtype=job.dtype, enabled=job.dtype != torch.float32):
            pred = trainer.consistency(job.student, schedule, z_t, timesteps, conditioning, torch.float32)
            with torch.no_grad():
                z_prev = self.teacher_step(schedule, z_t, timesteps, prev_timesteps, conditioning, uncond, draws.w)
                inputs = (z_prev, prev_timesteps, conditioning, torch.float32)
                target = trainer.consistency(job.student, schedule, *inputs)
        return trainer.loss_between(schedule, pred, target, timesteps, job.args)
