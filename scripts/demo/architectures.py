# SPDX-License-Identifier: Apache-2.0
"""The demo teachers, untrained: the architectures of Stable Diffusion 1.5 and SDXL in small."""

from pathlib import Path

import diffusers
import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

TOKENS = 24
DEMO_TOKENIZER = Path(__file__).resolve().parents[2] / "assets" / "demo-teacher-sd15" / "tokenizer"
NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
BLOCKS = {
    "block_out_channels": (32, 64, 128), "layers_per_block": 1, "norm_num_groups": 8,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
}  # fmt: skip


def demo_tokenizer():
    """Return the demo's CLIP tokenizer: every caption word is one token, any other text splits into letters."""
    return CLIPTokenizer.from_pretrained(DEMO_TOKENIZER, model_max_length=TOKENS)


def text_config(tokenizer, width, layers, activation):
    return CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=4 * width,
        num_hidden_layers=layers, num_attention_heads=4, max_position_embeddings=TOKENS,
        hidden_act=activation, projection_dim=width, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip


def build_sd15(vae, latent_side):
    torch.manual_seed(1)
    tokenizer = demo_tokenizer()
    text_encoder = CLIPTextModel(text_config(tokenizer, 96, 2, "quick_gelu"))
    unet = diffusers.UNet2DConditionModel(
        sample_size=latent_side, cross_attention_dim=96, attention_head_dim=4, **BLOCKS
    )
    return diffusers.StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet,
        scheduler=diffusers.DDIMScheduler(**NOISE, clip_sample=False, set_alpha_to_one=False),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def build_sdxl(vae, latent_side):
    # As in SDXL, attention reads the layer before the last of both text encoders, side by side.
    torch.manual_seed(1)
    tokenizer = demo_tokenizer()
    width, time_width = 64, 32
    unet = diffusers.UNet2DConditionModel(
        sample_size=latent_side, cross_attention_dim=2 * width, attention_head_dim=(2, 4, 8),
        transformer_layers_per_block=(1, 1, 2), use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=time_width, projection_class_embeddings_input_dim=6 * time_width + width,
        **BLOCKS,
    )  # fmt: skip
    return diffusers.StableDiffusionXLPipeline(
        vae=vae, unet=unet, tokenizer=tokenizer, tokenizer_2=tokenizer,
        text_encoder=CLIPTextModel(text_config(tokenizer, width, 3, "quick_gelu")),
        text_encoder_2=CLIPTextModelWithProjection(text_config(tokenizer, width, 3, "gelu")),
        scheduler=diffusers.EulerDiscreteScheduler(**NOISE, timestep_spacing="leading"),
        force_zeros_for_empty_prompt=True, add_watermarker=False,
    )  # fmt: skip


BUILDERS = {"sd15": build_sd15, "sdxl": build_sdxl}
