# SPDX-License-Identifier: Apache-2.0
"""Stable Diffusion 1.5, SDXL and SSD-1B in their published configurations, with random weights."""

import json
from functools import partial
from pathlib import Path

import diffusers
import torch
from diffusers import AutoencoderKL, DDIMScheduler, EulerDiscreteScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from lib.benchmark.sweep import REAL_MODELS
from lib.trainers import sd15, sdxl

ASSETS = Path(__file__).resolve().parents[3] / "assets"
# Any CLIP tokenizer will do: the padded length of captions matters, the meaning of tokens does not.
TOKENIZER = ASSETS / "demo-teacher-sd15" / "tokenizer"
DEMO_FOLDERS = {"demo": ASSETS / "demo-teacher-sd15", "demo-sdxl": ASSETS / "demo-teacher-sdxl"}


def trainer_of(model):
    if model in REAL_MODELS:
        return sd15 if model == "sd15" else sdxl
    index = Path(DEMO_FOLDERS.get(model, model)) / "model_index.json"
    return sdxl if "XL" in json.loads(index.read_text())["_class_name"] else sd15


def build_unet(model):
    if model == "sd15":  # the class's other defaults are SD 1.5's
        return UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
    depths, ssd = (1, 2, 10), {}
    if model == "ssd1b":
        depths = [1, [2, 2], [4, 4]]
        ssd = {"reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1], "mid_block_type": "UNetMidBlock2D"}
    return UNet2DConditionModel(
        sample_size=128, block_out_channels=(320, 640, 1280), cross_attention_dim=2048,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=depths, attention_head_dim=(5, 10, 20), use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816, **ssd,
    )  # fmt: skip


def build_text_encoder(tokenizer, kind, width, layers, heads, activation):
    config = CLIPTextConfig(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=heads,
        hidden_act=activation, projection_dim=width, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return kind(config)


def published_parts(model):
    """Return (pipeline class, scheduler, {part: function that makes it}) of a published architecture."""
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER, model_max_length=77)
    noise = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    encoder = partial(build_text_encoder, tokenizer)
    makers = {
        "unet": lambda: build_unet(model),
        "vae": lambda: AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4, layers_per_block=2,
            block_out_channels=(128, 256, 512, 512), sample_size=512, scaling_factor=trainer_of(model).VAE_SCALING,
        ),
        "tokenizer": lambda: tokenizer,
        "text_encoder": lambda: encoder(CLIPTextModel, 768, 12, 12, "quick_gelu"),
    }  # fmt: skip
    if model == "sd15":
        return diffusers.StableDiffusionPipeline, DDIMScheduler(**noise, clip_sample=False), makers
    makers["tokenizer_2"] = lambda: tokenizer
    makers["text_encoder_2"] = lambda: encoder(CLIPTextModelWithProjection, 1280, 32, 20, "gelu")
    return diffusers.StableDiffusionXLPipeline, EulerDiscreteScheduler(**noise), makers


def build_teacher(model, args, dtype, device, check=True, **parts):  # noqa: ARG001 (load_teacher has `check`)
    """Return a pipeline with random weights, frozen; stands in for a training script's `load_teacher`."""
    # Made on the device in the compute dtype, because SDXL in float32 would not fit cards on which it trains.
    torch.manual_seed(args.seed)
    kind, scheduler, makers = published_parts(model)
    usual = torch.get_default_dtype()
    for name, make in makers.items():
        if name in parts:
            continue
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                parts[name] = make()
        finally:
            torch.set_default_dtype(usual)
        if isinstance(parts[name], torch.nn.Module):
            if name == "unet" and getattr(args, "use_4bit_base", False):
                sd15.quantize_4bit(parts[name])
            parts[name].requires_grad_(False).eval().to(device)
    if kind is diffusers.StableDiffusionPipeline:
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return kind(scheduler=scheduler, **parts)
