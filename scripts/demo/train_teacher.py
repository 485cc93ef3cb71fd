# SPDX-License-Identifier: Apache-2.0
"""Train a demo teacher: judge, VAE, then text encoders and UNet, on landscapes drawn here.

    bash scripts/demo/make_teacher.sh sd15
    bash scripts/demo/make_teacher.sh sdxl

run this file in two processes; the second takes judge and VAE from the first one's result. Each stage leaves its
result in --work_dir and is skipped when that is there. Output: a complete `StableDiffusionPipeline` or
`StableDiffusionXLPipeline` in float16, and with a new judge that judge.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from architectures import BUILDERS, TOKENS
from diffusers import AutoencoderKL, DDPMScheduler
from diffusers.training_utils import EMAModel, compute_snr
from judge import Judge
from landscapes import caption_of, draw_dataset
from PIL import Image
from torch import nn

RESOLUTION = 64
EMPTY_CAPTIONS = 0.1
MIN_SNR_GAMMA = 5.0


def load_pictures(accelerator, args):
    """Return (pictures uint8 [N,H,W,3] memory-mapped, labels [N,4], time ids [N,6]); SDXL's vary in size."""
    path = args.work_dir / f"pictures-{args.num_samples}.npy"
    if accelerator.is_main_process and not path.exists():
        drawn, labels = draw_dataset(args.num_samples, 0, RESOLUTION, varied=args.family == "sdxl")
        rng = np.random.default_rng(0)
        pictures, time_ids = zip(*(random_crop(picture, rng) for picture in drawn), strict=True)
        np.save(path.with_name("labels.npy"), labels)
        np.save(path.with_name("time_ids.npy"), np.array(time_ids))
        np.save(path, np.stack(pictures))
    accelerator.wait_for_everyone()
    labels, time_ids = (torch.as_tensor(np.load(path.with_name(f"{n}.npy"))) for n in ("labels", "time_ids"))
    return np.load(path, mmap_mode="r"), labels, time_ids


def random_crop(picture, rng):
    """Return (a square of RESOLUTION of a picture resized to hold it, its time ids)."""
    height, width = picture.shape[:2]
    scale = RESOLUTION / min(height, width)
    resized = Image.fromarray(picture).resize((round(width * scale), round(height * scale)))
    top, left = (int(rng.integers(length - RESOLUTION + 1)) for length in (resized.height, resized.width))
    square = resized.crop((left, top, left + RESOLUTION, top + RESOLUTION))
    return np.asarray(square), (height, width, top, left, RESOLUTION, RESOLUTION)


def to_pixels(pictures):
    return torch.as_tensor(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def fit(accelerator, name, model, batch_loss, updates, lr, num_samples, batch_size=64):
    """Train `model` with AdamW and return it with its averaged weights (EMA).

    `batch_loss(model, indices)` gives the loss of samples [B]. The rate decays to zero over the last quarter.
    """
    set_seed(accelerator.process_index)
    ema = EMAModel(model.parameters(), decay=0.999, use_ema_warmup=True, power=0.75)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 100, 4 * (updates - step) / updates)
    )
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    losses = []
    for step in range(1, updates + 1):
        loss = batch_loss(wrapped, torch.randint(num_samples, (batch_size // accelerator.num_processes,)))
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        ema.step(model.parameters())
        losses.append(loss.detach())
        if step % 100 == 0 or step == updates:
            accelerator.print(f"{name} {step}/{updates} loss {torch.stack(losses).mean():.4f}", flush=True)
            losses = []
    ema.copy_to(model.parameters())
    return model.eval()


def train_judge(accelerator, args, pictures, labels):
    """Train the judge, on blurred and noisy pictures too, as a VAE makes them."""
    path = (args.parts_from or args.output_dir) / "judge.safetensors"
    if path.exists():
        return

    def batch_loss(model, indices):
        pixels = to_pixels(pictures[indices.numpy()])
        if torch.rand(()) < 0.5:
            factor = [0.5, 0.625, 0.75][torch.randint(3, ())]
            pixels = nn.functional.interpolate(pixels, scale_factor=factor, mode="area")
            pixels = nn.functional.interpolate(pixels, size=RESOLUTION, mode="bilinear")
        pixels = pixels + 0.08 * torch.rand(()) * torch.randn_like(pixels)
        _, logits = model(pixels)
        return sum(nn.functional.cross_entropy(part, labels[indices, i]) for i, part in enumerate(logits))

    judge = fit(accelerator, "judge", Judge(), batch_loss, args.judge_updates, 2e-3, len(pictures) - 2000)
    if accelerator.is_main_process:
        judge.save(path)


class Reconstruction(nn.Module):
    """The VAE's training step as one module, so that DistributedDataParallel sees one forward."""

    def __init__(self, vae):
        super().__init__()
        self.vae = vae

    def forward(self, pixels):
        """Return L1 + gradient L1 + a small KL of pixels [B,3,H,W]."""
        posterior = self.vae.encode(pixels).latent_dist
        error = self.vae.decode(posterior.sample()).sample.float() - pixels
        edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
        return error.abs().mean() + 0.5 * edges + 1e-6 * posterior.kl().mean() / pixels[0].numel() * 64


def train_vae(accelerator, args, pictures):
    path = (args.parts_from or args.work_dir) / "vae"
    if path.exists():
        return AutoencoderKL.from_pretrained(path, dtype=torch.float32).eval()
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 3, up_block_types=["UpDecoderBlock2D"] * 3,
        block_out_channels=(24, 48, 96), layers_per_block=1, norm_num_groups=8, sample_size=RESOLUTION,
    )  # fmt: skip

    def batch_loss(model, indices):
        # Crops of half the side cost a quarter; every fourth batch is whole pictures, a quarter as many.
        if torch.rand(()) < 0.25:
            pixels = to_pixels(pictures[indices[: len(indices) // 4].numpy()])
        else:
            half = RESOLUTION // 2
            top, left = torch.randint(half + 1, (2,)).tolist()
            pixels = to_pixels(pictures[indices.numpy()][:, top : top + half, left : left + half])
        with torch.autocast("cpu", torch.bfloat16):
            return model(pixels)

    num_samples = len(pictures) - 2000
    fit(accelerator, "vae", Reconstruction(vae), batch_loss, args.vae_updates, 1.5e-3, num_samples, batch_size=32)
    held_out = to_pixels(pictures[-512:])
    with torch.no_grad():
        latents = vae.encode(held_out).latent_dist.sample()
        psnr = 10 * torch.log10(4 / (vae.decode(latents).sample.clamp(-1, 1) - held_out).square().mean())
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    accelerator.print(f"vae: {psnr:.2f} dB, scaling factor {vae.config.scaling_factor}")
    if accelerator.is_main_process:
        vae.save_pretrained(path)
    accelerator.wait_for_everyone()
    return vae


class TextToNoise(nn.Module):
    """Text encoders and UNet as one module, so that DistributedDataParallel sees one forward."""

    def __init__(self, pipe):
        """Wrap a pipeline's; SDXL's first encoder never uses its last layer."""
        super().__init__()
        self.text_encoder, self.unet = pipe.text_encoder, pipe.unet
        self.text_encoder_2 = getattr(pipe, "text_encoder_2", None)
        if self.text_encoder_2:
            body = getattr(self.text_encoder, "text_model", self.text_encoder)
            body.encoder.layers[-1].requires_grad_(False)
            body.final_layer_norm.requires_grad_(False)

    def forward(self, z_t, timesteps, input_ids, empty, time_ids):
        """Return the noise predicted for z_t [B,4,h,w], tokens [B,L], drops [B] and time ids [B,6]."""
        if not self.text_encoder_2:
            return self.unet(z_t, timesteps, self.text_encoder(input_ids).last_hidden_state).sample
        first = self.text_encoder(input_ids, output_hidden_states=True)
        second = self.text_encoder_2(input_ids, output_hidden_states=True)
        prompt_embeds = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
        kept = (~empty).float()[:, None]  # SDXL's embeddings of the empty caption are zeros
        added = {"text_embeds": kept * second.text_embeds, "time_ids": time_ids}
        return self.unet(z_t, timesteps, kept[..., None] * prompt_embeds, added_cond_kwargs=added).sample


def train_unet(accelerator, args, pipe, moments, labels, time_ids):
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    captions = [caption_of(row) for row in labels.tolist()]
    tokenize = {"padding": "max_length", "truncation": True, "max_length": TOKENS, "return_tensors": "pt"}
    ids_of = {text: pipe.tokenizer(text, **tokenize).input_ids[0] for text in {*captions, ""}}

    def batch_loss(model, indices):
        mean, logvar = moments[indices].chunk(2, dim=1)
        latents = mean + (0.5 * logvar.clamp(-30, 20)).exp() * torch.randn_like(mean)
        latents = latents * pipe.vae.config.scaling_factor
        empty = torch.rand(len(indices)) < EMPTY_CAPTIONS
        input_ids = torch.stack([ids_of["" if drop else captions[i]] for i, drop in zip(indices, empty, strict=True)])
        eps, timesteps = torch.randn_like(latents), torch.randint(1000, (len(indices),))
        z_t = scheduler.add_noise(latents, eps, timesteps)
        error = (model(z_t, timesteps, input_ids, empty, time_ids[indices]) - eps).square().mean((1, 2, 3))
        snr = compute_snr(scheduler, timesteps)
        return (error * snr.clamp(max=MIN_SNR_GAMMA) / snr).mean()  # min-SNR weight (arXiv:2303.09556) for eps

    fit(accelerator, "unet", TextToNoise(pipe), batch_loss, args.unet_updates, 1e-3, len(moments))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--family", choices=tuple(BUILDERS), required=True, help="architecture of the teacher")
    add("--parts_from", type=Path, help="folder of a demo teacher whose judge and VAE to use (default: train)")
    add("--output_dir", type=Path, required=True, help="folder for the pipeline and the judge")
    add("--work_dir", type=Path, required=True, help="folder for pictures and stage results")
    add("--num_samples", type=int, default=40000, help="pictures to draw (default: %(default)s)")
    add("--judge_updates", type=int, default=1200, help="updates of the judge (default: %(default)s)")
    add("--vae_updates", type=int, default=5000, help="updates of the VAE (default: %(default)s)")
    add("--unet_updates", type=int, default=5000, help="updates of the UNet (default: %(default)s)")
    args = parser.parse_args()
    accelerator = Accelerator(cpu=True)
    args.work_dir.mkdir(parents=True, exist_ok=True)
    pictures, labels, time_ids = load_pictures(accelerator, args)
    train_judge(accelerator, args, pictures, labels)
    vae = train_vae(accelerator, args, pictures)
    with torch.no_grad():  # posterior parameters [N, 8, h, w]
        batches = (to_pixels(pictures[i : i + 128]) for i in range(0, len(pictures), 128))
        moments = torch.cat([vae.encode(pixels).latent_dist.parameters for pixels in batches])
    pipe = BUILDERS[args.family](vae, RESOLUTION // 4)
    train_unet(accelerator, args, pipe, moments, labels, time_ids)
    if accelerator.is_main_process:
        for part in (part for part in pipe.components.values() if isinstance(part, nn.Module)):
            part.half()
        pipe.save_pretrained(args.output_dir)
    accelerator.end_training()


if __name__ == "__main__":
    main()
