# SPDX-License-Identifier: Apache-2.0
"""A diffusers pipeline's weights with the keys of the original SD and SDXL checkpoints.

ComfyUI, A1111 and Forge read these keys; diffusers has the conversion from them, and none to them.
"""

import re

import torch

UNET = {
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
    "mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}  # fmt: skip
RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
VAE = {
    "mid_block.resnets.0": "mid.block_1", "mid_block.resnets.1": "mid.block_2",
    "mid_block.attentions.0": "mid.attn_1", "group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v",
    "to_out.0": "proj_out", "conv_shortcut": "nin_shortcut", "conv_norm_out": "norm_out",
    "downsamplers.0": "downsample", "upsamplers.0": "upsample", "resnets": "block", "down_blocks": "down",
}  # fmt: skip
OPEN_CLIP = {
    "embeddings.token_embedding": "token_embedding", "final_layer_norm": "ln_final",
    "embeddings.position_embedding.weight": "positional_embedding", "encoder.layers": "transformer.resblocks",
    "layer_norm1": "ln_1", "layer_norm2": "ln_2", "self_attn": "attn", "fc1": "c_fc", "fc2": "c_proj",
    "text_projection.weight": "text_projection",
}  # fmt: skip


def renamed(key, names):
    """Return a key in which whole parts, between dots, have the original code's names."""
    for ours, theirs in names.items():
        key = re.sub(rf"(?<![^.]){re.escape(ours)}(?![^.])", theirs, key)
    return key


def unet_key(key, config):
    """Return the original key: it numbers the layers of all blocks through, each down-sampler with them."""
    found = re.match(r"(down|up)_blocks\.(\d+)\.(resnet|attention|downsampler|upsampler)s\.(\d+)\.(.+)", key)
    if not found:
        return renamed(key, UNET | RESNET if "resnets" in key else UNET)
    side, block, kind, layer, rest = found.groups()
    last = config.layers_per_block  # of an up block; a down block ends with the down-sampler
    number = int(block) * (last + 1) + (last if kind.endswith("sampler") else int(layer)) + (side == "down")
    has_attention = "CrossAttn" in config.up_block_types[int(block)] if side == "up" else False
    place = {"attention": 1, "upsampler": 1 + has_attention}.get(kind, 0)
    rest = renamed(rest, RESNET) if kind == "resnet" else rest
    rest = rest.replace("conv.", "op.") if kind == "downsampler" else rest
    return f"{'input' if side == 'down' else 'output'}_blocks.{number}.{place}.{rest}"


def vae_state(vae):
    """Return {original key: tensor}; the decoder's blocks are counted from the last, attention is 1x1."""
    last, state = len(vae.config.up_block_types) - 1, {}
    for key, value in vae.state_dict().items():
        new = re.sub(r"\bup_blocks\.(\d+)", lambda found: f"up.{last - int(found[1])}", key)
        value = value[:, :, None, None] if ".attentions." in key and value.ndim == 2 else value
        state[renamed(new, VAE)] = value
    return state


def open_clip_state(encoder):
    """Return {OpenCLIP's key: tensor}: one matrix for q, k and v, the projection transposed."""
    ours, state = {k.removeprefix("text_model."): v for k, v in encoder.state_dict().items()}, {}
    for key, value in ours.items():
        if ".q_proj." in key:
            value = torch.cat([ours[key.replace(".q_proj.", f".{name}_proj.")] for name in "qkv"])
            key = key.replace(".q_proj.", ".in_proj_")
        elif re.search(r"\.[kv]_proj\.", key):
            continue
        state[renamed(key, OPEN_CLIP)] = value.T if key == "text_projection.weight" else value
    return state


def original_state(pipe):
    """Return {original key: contiguous tensor} of an SD 1.x, SD 2.x or SDXL pipeline.

    Empty tensors mark what a checkpoint has no other place for: v-prediction and zero terminal SNR.
    """
    unet, schedule = pipe.unet, pipe.scheduler.config
    parts = {"model.diffusion_model.": {unet_key(k, unet.config): v for k, v in unet.state_dict().items()}}
    parts["first_stage_model."] = vae_state(pipe.vae)
    clip = pipe.text_encoder.state_dict()
    clip = {f"text_model.{key.removeprefix('text_model.')}": value for key, value in clip.items()}
    if hasattr(pipe, "text_encoder_2"):
        parts["conditioner.embedders.0.transformer."] = clip
        parts["conditioner.embedders.1.model."] = open_clip_state(pipe.text_encoder_2)
    elif unet.config.cross_attention_dim == 1024:  # SD 2.x
        parts["cond_stage_model.model."] = open_clip_state(pipe.text_encoder)
    else:
        parts["cond_stage_model.transformer."] = clip
    state = {prefix + key: v.contiguous() for prefix, part in parts.items() for key, v in part.items()}
    marks = {"v_pred": schedule.prediction_type == "v_prediction", "ztsnr": schedule.get("rescale_betas_zero_snr")}
    return state | {name: torch.zeros(0) for name, is_so in marks.items() if is_so}
