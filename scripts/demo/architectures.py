# SPDX-License-Identifier: Apache-2.0
"""The demo teachers, untrained: the architectures of Stable Diffusion 1.5 and SDXL in small."""

import json

import torch
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from landscapes import vocabulary
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

TOKENS = 24
NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
BLOCKS = {
    "block_out_channels": (32, 64, 128), "layers_per_block": 1, "norm_num_groups": 8,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
}  # fmt: skip


def build_tokenizer(folder):
    """Return a CLIP tokenizer: every caption word is one token, any other text splits into letters."""
    folder.mkdir(parents=True, exist_ok=True)
    # CLIP's byte-level alphabet: printable bytes are themselves, the others code points from 256.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(b) for b in printable] + [chr(256 + n) for n in range(256 - len(printable))]
    merges = []
    for word in vocabulary():
        pieces = [*word[:-1], word[-1] + "</w>"]
        for pair in merges:
            pieces = merge_pair(pieces, pair)
        while len(pieces) > 1:
            merges.append(tuple(pieces[:2]))
            pieces = merge_pair(pieces, merges[-1])
    tokens = [*letters, *(c + "</w>" for c in letters), *("".join(p) for p in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(p) for p in merges) + "\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=TOKENS)


def merge_pair(pieces, pair):
    """Return pieces with every neighbouring occurrence of pair joined, as one BPE merge does."""
    result = []
    for piece in pieces:
        if result and (result[-1], piece) == pair:
            result[-1] += piece
        else:
            result.append(piece)
    return result


def text_config(tokenizer, width, layers, activation):
    return CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=4 * width,
        num_hidden_layers=layers, num_attention_heads=4, max_position_embeddings=TOKENS,
        hidden_act=activation, projection_dim=width, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip


def build_sd15(folder, vae, latent_side):
    """Return a StableDiffusionPipeline with SD 1.5's noise schedule; `folder` gets the tokenizer's files."""
    torch.manual_seed(1)
    tokenizer = build_tokenizer(folder)
    text_encoder = CLIPTextModel(text_config(tokenizer, 96, 2, "quick_gelu"))
    unet = UNet2DConditionModel(sample_size=latent_side, cross_attention_dim=96, attention_head_dim=4, **BLOCKS)
    return StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet,
        scheduler=DDIMScheduler(**NOISE, clip_sample=False, set_alpha_to_one=False),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def build_sdxl(folder, vae, latent_side):
    """Return a StableDiffusionXLPipeline: two text encoders, and a UNet told of pooled text, size and crop.

    As in SDXL, attention reads the layer before the last of both encoders, side by side.
    """
    torch.manual_seed(1)
    tokenizer = build_tokenizer(folder)
    width, time_width = 64, 32
    unet = UNet2DConditionModel(
        sample_size=latent_side, cross_attention_dim=2 * width, attention_head_dim=(2, 4, 8),
        transformer_layers_per_block=(1, 1, 2), use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=time_width, projection_class_embeddings_input_dim=6 * time_width + width,
        **BLOCKS,
    )  # fmt: skip
    return StableDiffusionXLPipeline(
        vae=vae, unet=unet, tokenizer=tokenizer, tokenizer_2=tokenizer,
        text_encoder=CLIPTextModel(text_config(tokenizer, width, 3, "quick_gelu")),
        text_encoder_2=CLIPTextModelWithProjection(text_config(tokenizer, width, 3, "gelu")),
        scheduler=EulerDiscreteScheduler(**NOISE, timestep_spacing="leading"),
        force_zeros_for_empty_prompt=True, add_watermarker=False,
    )  # fmt: skip


BUILDERS = {"sd15": build_sd15, "sdxl": build_sdxl}
