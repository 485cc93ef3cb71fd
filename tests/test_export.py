"""export_lora.py: names that ComfyUI, A1111 and diffusers know, equal UNets after every conversion and merge."""

import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ENVIRONMENT, ROOT, flags, load_script, tiny_text
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    LCMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.utils import convert_unet_state_dict_to_peft
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(ROOT / "scripts"))
from lib.original_layout import unet_key
from lib.trainers import INPUT_ERRORS

BLOCKS = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",), ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
XL = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "use_linear_projection": True, "addition_embed_type": "text_time",
}  # fmt: skip
REAL = {
    "sd15": {
        "block_out_channels": (320, 640, 1280, 1280), "down_block_types": BLOCKS[0],
        "up_block_types": BLOCKS[1], "cross_attention_dim": 768, "attention_head_dim": 8,
    },
    "sdxl": {
        "block_out_channels": (320, 640, 1280), "cross_attention_dim": 2048,
        "attention_head_dim": (5, 10, 20), "transformer_layers_per_block": (1, 2, 10),
        "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816, **XL,
    },
}  # fmt: skip
REAL["ssd-1b"] = REAL["sdxl"] | {
    "transformer_layers_per_block": [1, [2, 2], [4, 4]],
    "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1], "mid_block_type": "UNetMidBlock2D",
}  # fmt: skip
FEW = {"cross_attention_dim": 16, "attention_head_dim": 2}
FEW_XL = {"addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 32, **FEW}
TINY = {  # one layer a block, where the released models have two
    "sd15": {
        "block_out_channels": (8, 16), "down_block_types": BLOCKS[0][2:], "up_block_types": BLOCKS[1][:2],
        "layers_per_block": 1, **FEW,
    },
    "sdxl": {"block_out_channels": (8, 8, 8), "layers_per_block": 1, **XL, **FEW_XL},
}  # fmt: skip
NARROW = {  # the released models' blocks with few channels
    "sd15": REAL["sd15"] | {"block_out_channels": (8, 16, 24, 24), **FEW},
    "sdxl": REAL["sdxl"] | {"block_out_channels": (8, 16, 24), **FEW_XL},
    "ssd-1b": REAL["ssd-1b"] | {"block_out_channels": (8, 16, 24), **FEW_XL},
}
PIPELINES = {"sd": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}
one_model = pytest.mark.parametrize("trained", ["sd15"], indirect=True)  # where the family changes nothing
one_merge = pytest.mark.parametrize("merging", ["sd"], indirect=True)
SOURCES = {"diffusers": "", "kohya": "kohya.safetensors", "peft": "unet"}


@pytest.fixture(scope="module")
def tool():
    return load_script("scripts/export_lora.py")


def trainer_of(model):
    return load_script(f"train_lcm_lora_{'sd15' if model == 'sd15' else 'sdxl'}.py")


def family_of(model):
    return "sd" if model == "sd15" else "sdxl"


def build_unet(config):
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, **({"norm_num_groups": 4} if 320 not in config["block_out_channels"] else {}), **config
    )


def with_lora(unet, trainer, **changes):
    """Add a LoRA with random weights, as training leaves it."""
    args = trainer.parse_args(flags("owner/name", "pipe:", "x", **changes))
    generator = torch.Generator().manual_seed(1)
    for parameter in trainer.add_lora(unet, args):
        if parameter.device.type != "meta":
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return args


def output(unet):
    """Return a UNet's output at fixed inputs."""
    generator = torch.Generator().manual_seed(0)
    z_t, text = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 5, 16, generator=generator)
    added = {"text_embeds": torch.ones(1, 8), "time_ids": torch.full((1, 6), 8.0)}
    with torch.no_grad():
        return unet.eval()(z_t, torch.tensor([499]), text, added_cond_kwargs=added).sample


def load_into(unet, path, family):
    """Return the UNet's output after diffusers loaded a file into it, as load_lora_weights does."""
    pipeline = PIPELINES[family]
    state, alphas, metadata = pipeline.lora_state_dict(str(path), unet_config=unet.config, return_lora_metadata=True)
    pipeline.load_lora_into_unet(state, alphas, unet, metadata=metadata)
    return output(unet)


def close(got, expected, tolerance):
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def run(tool, *words):
    """Run the tool's main as its command line would."""
    tool.main(tool.parse_args([str(word) for word in words]))


def write_sources(unet, trainer, folder, args):
    """Write a UNet's LoRA with diffusers' keys (and alpha in the header), kohya's and PEFT's."""
    state = {name: value.detach() for name, value in get_peft_model_state_dict(unet).items()}
    config = unet.peft_config["default"].to_dict()
    config |= {"target_modules": sorted(config["target_modules"])}
    header = {"lora_adapter_metadata": json.dumps({f"unet.{name}": value for name, value in config.items()})}
    save_file({f"unet.{n}": v for n, v in state.items()}, folder / trainer.WEIGHTS_NAME, metadata=header)
    kohya = trainer.kohya_weights(state, args.lora_alpha, unet.config.layers_per_block)
    args.phases = 2
    save_file(kohya, folder / SOURCES["kohya"], metadata={"modelspec.usage_hint": trainer.usage_of(args)[1]})
    unet.peft_config["default"].save_pretrained(folder / "unet")
    peft = {f"base_model.model.{name}": value for name, value in state.items()}
    save_file(peft, folder / "unet" / "adapter_model.safetensors")


# ----------------------------------------------------------------------------------------------------------
# Names, on the released models' configurations
# ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=REAL)
def real(request):
    """Return (name, UNet without weights, names of the layers with a LoRA, kohya's tensors of rank 1)."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, **REAL[request.param])
        trainer = trainer_of(request.param)
        with_lora(unet, trainer, lora_rank=1)
    state = {n: torch.zeros(v.shape) for n, v in get_peft_model_state_dict(unet).items()}
    modules = {name.rpartition(".lora_")[0] for name in state}
    return request.param, unet, modules, trainer.kohya_weights(state, 1.0, unet.config.layers_per_block)


def test_diffusers_reads_each_kohya_name_as_the_layer_it_means(tool, real, tmp_path):
    model, unet, modules, state = real
    assert len(modules) == {"sd15": 278, "sdxl": 788, "ssd-1b": 423}[model] and len(state) == 3 * len(modules)
    read, alphas = PIPELINES[family_of(model)].lora_state_dict(dict(state), unet_config=unet.config)
    read = convert_unet_state_dict_to_peft(read)
    assert {name.rpartition(".lora_")[0] for name in read} == {f"unet.{name}" for name in modules}
    assert len(alphas) == len(modules)
    for name, value in read.items():
        layer = unet.get_submodule(name.removeprefix("unet.").rpartition(".lora_")[0])
        expected = layer.lora_A if ".lora_A." in name else layer.lora_B
        assert value.shape == expected["default"].weight.shape, name
    save_file(state, tmp_path / "kohya.safetensors")
    loras = tool.sd15.read_lora(tmp_path / "kohya.safetensors")
    assert loras.keys() == modules
    wide = SimpleNamespace(up=torch.empty(640, 4))  # of a LoRA of some layers alone; of one with a layer a block
    assert tool.layers_of_a_block({"up_blocks.1.attentions.0.proj_in": wide}) == 2
    names = (
        "down_blocks.1.attentions.0",
        "down_blocks.2.attentions.0",
        "up_blocks.0.attentions.1",
        "up_blocks.1.resnets.1",
    )
    assert tool.layers_of_a_block(dict.fromkeys(names, wide)) == 1


def ldm_modules(unet):
    """Return the names of the original UNet's layers by walking diffusers' blocks in the order they run.

    ComfyUI and A1111 hold that UNet: input_blocks of [resnet, attention] or [op], output_blocks of
    [resnet, attention, upsampler], one for each; what a block lacks is not counted.
    """
    resnet = {"conv1": "in_layers_2", "time_emb_proj": "emb_layers_1", "conv2": "out_layers_3",
              "conv_shortcut": "skip_connection"}  # fmt: skip
    names = {}

    def note(place, name):
        module = unet.get_submodule(name)
        for inner, layer in module.named_modules():
            if hasattr(layer, "lora_A"):
                names[f"{name}.{inner}".strip(".")] = f"{place}_{resnet.get(inner, inner).replace('.', '_')}".strip(
                    "_"
                )

    def walk(side, blocks, path, first):
        number = first
        for i, block in enumerate(blocks):
            attentions = getattr(block, "attentions", ())
            for j in range(len(block.resnets)):
                parts = [f"{path}.{i}.resnets.{j}"] + [f"{path}.{i}.attentions.{j}"] * (j < len(attentions))
                last = j == len(block.resnets) - 1
                if side == "output" and last and block.upsamplers:
                    parts.append(f"{path}.{i}.upsamplers.0")
                for place, part in enumerate(parts):
                    note(f"{side}_blocks_{number}_{place}", part)
                number += 1
            if side == "input" and block.downsamplers:
                names[f"{path}.{i}.downsamplers.0.conv"] = f"input_blocks_{number}_0_op"
                number += 1

    walk("input", unet.down_blocks, "down_blocks", 1)
    walk("output", unet.up_blocks, "up_blocks", 0)
    middle = ["mid_block.resnets.0"]
    if getattr(unet.mid_block, "attentions", None):
        middle += ["mid_block.attentions.0", "mid_block.resnets.1"]
    for place, part in enumerate(middle):
        note(f"middle_block_{place}", part)
    return {name: f"lora_unet_{ldm}" for name, ldm in names.items()}


def a1111_name(name):
    """Return where A1111 looks for a diffusers-style kohya name, by its rules for SD 1.x.

    Source: AUTOMATIC1111/stable-diffusion-webui, extensions-builtin/Lora/networks.py,
    convert_diffusers_name_to_compvis, which has one rule for the upsamplers of all models: the first lies at
    place 1 of its block. In SDXL that place is an attention layer.
    """
    found = re.fullmatch(r"lora_unet_up_blocks_(\d+)_upsamplers_0_conv", name)
    if not found:
        return None
    block = int(found[1])
    return f"lora_unet_output_blocks_{2 + 3 * block}_{2 if block else 1}_conv"


def test_kohya_names_are_those_that_comfyui_and_a1111_map(real):
    model, unet, modules, state = real
    written = {name.partition(".")[0] for name in state}
    original = ldm_modules(unet)
    assert original.keys() == modules
    if model == "sd15":  # both map diffusers' names; sd-scripts writes these
        assert written == {"lora_unet_" + name.replace(".", "_") for name in modules}
        for name in filter(a1111_name, written):
            assert a1111_name(name) in original.values()
    else:  # both know the original UNet's own names; A1111 would lose the first upsampler by diffusers' name
        assert written == set(original.values())
        assert a1111_name("lora_unet_up_blocks_0_upsamplers_0_conv") not in written
        name = trainer_of("sdxl").kohya_name
        assert name("conv_out", 2) == "lora_unet_out_2"
        assert name("add_embedding.linear_2", 2) == "lora_unet_label_emb_0_2"


def test_the_released_sd15_file_to_the_byte(tool, tmp_path):
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, **REAL["sd15"])
        with_lora(unet, trainer_of("sd15"), lora_rank=64, lora_alpha=64)
    state = get_peft_model_state_dict(unet)
    state = {f"unet.{name}": torch.zeros(value.shape, dtype=torch.half) for name, value in state.items()}
    save_file(state, tmp_path / "in.safetensors")
    out = tmp_path / "out.safetensors"
    run(tool, "--input", tmp_path / "in.safetensors", "--format", "kohya", "--output", out)
    save_file(load_file(out), out, metadata={"format": "pt"})  # the released one has no other field
    with out.open("rb") as file:
        assert int.from_bytes(file.read(8), "little") == 116_544
    assert out.stat().st_size == 134_621_556
    with safe_open(out, "pt") as file:
        assert len(file.keys()) == 834


@pytest.mark.parametrize("model", NARROW)
def test_the_kohya_file_gives_the_unet_of_each_model_in_diffusers(model, tmp_path):
    unet = build_unet(NARROW[model])
    args = with_lora(unet, trainer_of(model), lora_rank=4, lora_alpha=7)
    write_sources(unet, trainer_of(model), tmp_path, args)
    base = build_unet(NARROW[model])
    assert (output(base) - output(unet)).abs().max() > 0.05
    close(load_into(base, tmp_path / "kohya.safetensors", family_of(model)), output(unet), 5e-3)
    loaded = sum(name.endswith(".lora_A.default_0.weight") for name in base.state_dict())
    assert loaded == {"sd15": 278, "sdxl": 788, "ssd-1b": 423}[model]


# ----------------------------------------------------------------------------------------------------------
# Weights: every conversion gives the same UNet, alpha != rank
# ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=TINY)
def trained(request, tmp_path_factory):
    """Return (family, function that makes the base UNet, output with its LoRA, folder of its files)."""
    folder, trainer = tmp_path_factory.mktemp("trained"), trainer_of(request.param)
    unet = build_unet(TINY[request.param])
    args = with_lora(unet, trainer, lora_rank=4, lora_alpha=7)
    write_sources(unet, trainer, folder, args)
    return family_of(request.param), lambda: build_unet(TINY[request.param]), output(unet), folder


@pytest.mark.parametrize("source", SOURCES)
def test_every_conversion_gives_the_same_unet(tool, trained, tmp_path, source):
    family, base, expected, folder = trained
    assert (output(base()) - expected).abs().max() > 0.05
    previous = folder / SOURCES[source]
    for number, keys in enumerate(("kohya", "diffusers", "kohya")):
        out = tmp_path / f"{number}.safetensors"
        words = ["--format", keys, "--dtype", "fp32", "--output", out]
        run(tool, "--input", previous, "--family", family, *words)
        close(load_into(base(), out, family), expected, 5e-3 if source == "kohya" else 1e-5)
        previous = out
    assert {path.name for path in tmp_path.iterdir()} == {f"{number}.safetensors" for number in range(3)}


def test_diffusers_keys_need_no_alpha_to_be_right(tool, trained, tmp_path):
    family, base, expected, folder = trained
    out, bare = tmp_path / "out.safetensors", tmp_path / "bare.safetensors"
    run(tool, "--input", folder, "--format", "diffusers", "--output", out)  # needs no family
    save_file(load_file(out), bare)  # a reader that does not look at the header
    for path in (out, bare):
        close(load_into(base(), path, family), expected, 5e-3)
    with safe_open(out, "pt") as file:
        header = json.loads(file.metadata()["lora_adapter_metadata"])
    assert (header["unet.r"], header["unet.lora_alpha"]) == (4, 4)
    kept = {f"unet.{name}" for name in "r lora_alpha rank_pattern alpha_pattern target_modules".split()}
    assert header.keys() == kept, "a reader's PEFT may be older and refuse a field that it does not know"


@one_model
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_dtype(tool, trained, tmp_path, dtype):
    family, *_, folder = trained
    out = tmp_path / "new" / "folder" / "out.safetensors"
    run(tool, "--input", folder, "--family", family, "--format", "kohya", "--dtype", dtype, "--output", out)
    assert {value.dtype for value in load_file(out).values()} == {tool.DTYPES[dtype]}


@one_model
def test_weights_too_large_for_the_dtype_are_refused(tool, trained, tmp_path):
    family, *_, folder = trained
    state = load_file(folder / trainer_of("sd15").WEIGHTS_NAME)
    save_file({name: value * 1e7 for name, value in state.items()}, tmp_path / "in.safetensors")
    words = ["--input", tmp_path / "in.safetensors", "--format", "kohya", "--family", family]
    with pytest.raises(tool.UnusableInput, match="--dtype fp16: .* give bf16 or fp32"):
        run(tool, *words, "--output", tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def deltas(tool, path):
    """Return the change of each layer's weight by a file."""
    loras = tool.sd15.read_lora(path)
    return {n: x.alpha / len(x.down) * (x.up.flatten(1) @ x.down.flatten(1)) for n, x in loras.items()}


@pytest.mark.parametrize("keys", ["diffusers", "kohya"])
def test_a_smaller_rank_is_the_best_approximation(tool, trained, tmp_path, keys):
    family, base, _, folder = trained
    out = tmp_path / "out.safetensors"
    words = ["--input", folder, "--family", family, "--format", keys, "--dtype", "fp32", "--output", out]
    run(tool, *words, "--rank", 2)
    before, after = deltas(tool, folder), deltas(tool, out)
    for name, delta in before.items():
        expected = torch.linalg.svdvals(delta)[2:].norm()
        torch.testing.assert_close((delta - after[name]).norm(), expected, rtol=1e-3, atol=1e-5)
    assert max(len(lora.down) for lora in tool.sd15.read_lora(out).values()) == 2
    load_into(base(), out, family)


@pytest.mark.parametrize("keys", ["diffusers", "kohya"])
def test_layers_of_different_rank_and_alpha_survive(tool, trained, tmp_path, keys):
    """diffusers itself misreads a kohya file in which the alphas of attention layers differ from others."""
    family, base, expected, folder = trained
    state = load_file(folder / SOURCES["kohya"])
    names = [name.removesuffix(".alpha") for name in state if name.endswith(".alpha")]
    for name in [name for name in names if "attn" in name][::2] + names[::3]:
        down, up = state[f"{name}.lora_down.weight"], state[f"{name}.lora_up.weight"]
        scale = float(state[f"{name}.alpha"]) / len(down)
        state[f"{name}.lora_down.weight"] = torch.cat([down, torch.zeros_like(down)])
        state[f"{name}.lora_up.weight"] = torch.cat([up * scale, torch.zeros_like(up)], dim=1)
        state[f"{name}.alpha"] = torch.tensor(2.0 * len(down))
    save_file(state, tmp_path / "in.safetensors")
    out = tmp_path / "out.safetensors"
    words = ["--input", tmp_path / "in.safetensors", "--family", family, "--format", keys]
    run(tool, *words, "--output", out)
    close(load_into(base(), out, family), expected, 5e-3)


@one_model
def test_a_kohya_file_without_alpha_has_scale_1(tool, trained, tmp_path):
    *_, folder = trained
    state = load_file(folder / SOURCES["kohya"])
    state = {name: value for name, value in state.items() if not name.endswith(".alpha")}
    save_file(state, tmp_path / "in.safetensors")
    assert {lora.alpha for lora in tool.sd15.read_lora(tmp_path / "in.safetensors").values()} == {4.0}


# ----------------------------------------------------------------------------------------------------------
# Merging
# ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=PIPELINES)
def merging(request, teachers, tmp_path_factory):
    """Return (family, model's folder, LoRA's folder, pipeline with that LoRA fused)."""
    model = {"sd": "sd15"}.get(request.param, request.param)
    folder, trainer = tmp_path_factory.mktemp("merging"), trainer_of(model)
    pipe = PIPELINES[request.param].from_pretrained(teachers[trainer.__name__])
    if request.param == "sdxl":  # diffusers knows the family of a file by the tenth layer
        pipe.text_encoder_2 = tiny_text(pipe.tokenizer_2, type(pipe.text_encoder_2), 24, 10, projection_dim=12)
    pipe.scheduler = type(pipe.scheduler).from_config(
        pipe.scheduler.config, prediction_type="v_prediction", rescale_betas_zero_snr=True
    )
    pipe.save_pretrained(folder / "model")
    args = with_lora(pipe.unet, trainer, lora_rank=4, lora_alpha=7)
    (folder / "lora").mkdir()
    write_sources(pipe.unet, trainer, folder / "lora", args)
    pipe.unet.fuse_lora()
    pipe.unet.unload_lora()
    return request.param, folder / "model", folder / "lora", pipe


def same_weights(pipe, expected, tolerance):
    for name, part in expected.components.items():
        if isinstance(part, torch.nn.Module):
            ours, theirs = getattr(pipe, name).state_dict(), part.state_dict()
            assert ours.keys() == theirs.keys(), name
            for key, value in theirs.items():
                close(ours[key].float(), value.float(), tolerance)


@pytest.mark.parametrize("name", ["merged", "merged.safetensors"])
def test_a_merged_model_has_the_weights_of_the_model_with_its_lora(tool, merging, tmp_path, name):
    family, model, lora, expected = merging
    out = tmp_path / name
    words = ["--input", lora, "--family", family, "--dtype", "fp32", "--merge_into", model]
    run(tool, *words, "--output", out)
    if out.is_dir():
        merged = DiffusionPipeline.from_pretrained(out)
        assert isinstance(merged.scheduler, LCMScheduler)
        assert merged.scheduler.config.prediction_type == "v_prediction"
        words[1] = lora / SOURCES["kohya"]  # whose header names DDIM
        run(tool, *words, "--output", tmp_path / "of-phases")
        scheduler = DiffusionPipeline.from_pretrained(tmp_path / "of-phases").scheduler
        assert isinstance(scheduler, DDIMScheduler) and scheduler.config.timestep_spacing == "trailing"
        shutil.rmtree(tmp_path / "of-phases")
    else:
        merged = PIPELINES[family].from_single_file(out, config=str(model), local_files_only=True)
        with safe_open(out, "pt") as file:  # by these a loader knows what the UNet predicts
            assert {"v_pred", "ztsnr"} <= set(file.keys())
    same_weights(merged, expected, 1e-5)
    assert [path.name for path in tmp_path.iterdir()] == [name]  # whole or not at all


def test_a_single_file_is_merged_without_network(tool, merging, tmp_path):
    family, model, lora, expected = merging
    words = ["--input", lora, "--family", family, "--dtype", "fp32", "--merge_into"]
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    run(tool, *words, model, "--output", first)
    base, layer = (load_file(first), next(name for name in load_file(first) if name.endswith("attn2.to_k.weight")))
    run(tool, *words, first, "--output", second, "--teacher_config", model)
    merged = load_file(second)
    assert merged.keys() == base.keys()
    pipe = PIPELINES[family].from_pretrained(model)
    plain = pipe.unet.state_dict()["down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight"]
    key = next(k for k, v in base.items() if k.endswith("attn2.to_k.weight") and v.shape == plain.shape)
    close(merged[key] - base[key], base[key] - plain, 1e-4)
    assert layer in merged


@one_merge
def test_a_single_file_without_its_config_names_the_flag(tool, merging, tmp_path):
    family, model, lora, _ = merging
    large = {key: value.float() * 1e4 for key, value in load_file(lora / SOURCES["kohya"]).items()}
    save_file(large, tmp_path / "large.safetensors")
    words = ["--input", tmp_path / "large.safetensors", "--family", family, "--merge_into", model, "--dtype", "fp16"]
    with pytest.raises(tool.UnusableInput, match="--dtype fp16: the weights are too large for it"):
        run(tool, *words, "--output", tmp_path / "large-merged.safetensors")
    words = ["--input", lora, "--family", family, "--merge_into"]
    run(tool, *words, model, "--output", tmp_path / "first.safetensors")
    with pytest.raises(INPUT_ERRORS, match="--teacher_config"):
        run(tool, *words, tmp_path / "first.safetensors", "--output", tmp_path / "second")


@pytest.mark.parametrize("model", NARROW)
def test_the_original_layout_of_each_model_is_the_one_diffusers_reads(model, tmp_path):
    unet = build_unet(NARROW[model])
    unet.save_config(tmp_path / "unet")
    state = {f"model.diffusion_model.{unet_key(k, unet.config)}": v for k, v in unet.state_dict().items()}
    save_file(state, tmp_path / "unet.safetensors")
    read = UNet2DConditionModel.from_single_file(
        tmp_path / "unet.safetensors", config=str(tmp_path), subfolder="unet", local_files_only=True
    )
    assert len(state) == len(unet.state_dict())
    adapted = build_unet(NARROW[model])
    with_lora(adapted, trainer_of(model), lora_rank=1)
    names = ldm_modules(adapted)  # diffusers alone is no proof: it reads upsamplers at the wrong place too
    assert len(names) == {"sd15": 278, "sdxl": 788, "ssd-1b": 423}[model]
    for name, original in names.items():
        key = unet_key(f"{name}.weight", unet.config).removesuffix(".weight")
        assert f"lora_unet_{key.replace('.', '_')}" == original
    ours = read.state_dict()
    for name, value in unet.state_dict().items():
        assert torch.equal(ours[name], value), name


def test_a_lora_of_another_model_is_not_merged(tool, merging, tmp_path):
    family, model, *_ = merging
    lora, out = tmp_path / "lora.safetensors", tmp_path / "merged"
    words = ["--input", lora, "--family", family, "--merge_into", model, "--output", out]
    for old, new in (("", ""), ("down_blocks_0", "down_blocks_1"), ("down_blocks_0", "down_blocks_5")):
        save_file({name.replace(old, new): value for name, value in wide(32).items()}, lora)
        with pytest.raises(tool.UnusableInput, match="the LoRA's layer down_blocks.* does not fit"):
            run(tool, *words)
        assert list(tmp_path.iterdir()) == [lora]


# ----------------------------------------------------------------------------------------------------------
# Family, header, output and unusable input
# ----------------------------------------------------------------------------------------------------------


def wide(width):
    """Return kohya's tensors of one layer that reads text of this width."""
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    return {f"{name}.lora_down.weight": torch.zeros(2, width), f"{name}.lora_up.weight": torch.zeros(8, 2)}


def test_family_by_width_header_names_and_args_json(tool, tmp_path):
    config = tmp_path / "teacher" / "unet" / "config.json"
    config.parent.mkdir(parents=True)
    config.write_text(json.dumps({"addition_embed_type": "text_time"}))
    original = {k.replace("down_blocks_0_attentions_0", "input_blocks_1_1"): v for k, v in wide(16).items()}
    folder, sd15, sdxl = tmp_path / "run", trainer_of("sd15"), trainer_of("sdxl")
    with pytest.raises(tool.UnusableInput, match="holds no pytorch_lora_weights.safetensors"):
        sd15.read_lora(tmp_path)
    for state, header, record, expected in (
        (wide(768), {}, None, sd15),
        (wide(1024), {}, None, sd15),
        (wide(2048), {}, None, sdxl),
        (wide(2048), {"ss_base_model_version": "sd_v1"}, None, sdxl),
        (original, {}, None, sdxl),
        (wide(16), {"ss_base_model_version": "sd_v1"}, None, sd15),
        (wide(16), {"ss_base_model_version": "sdxl_base_v1-0"}, None, sdxl),
        (wide(16), {"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}, None, sdxl),
        (wide(16), {"modelspec.architecture": "stable-diffusion-v1/lora"}, None, sd15),
        (wide(16), {}, "stable-diffusion-v1-5/stable-diffusion-v1-5", sd15),
        (wide(16), {}, "stabilityai/stable-diffusion-xl-base-1.0", sdxl),
        (wide(16), {}, str(tmp_path / "teacher"), sdxl),
        (wide(16), {}, "owner/name", None),
        (wide(16), {}, None, None),
    ):
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "checkpoint-2").mkdir(parents=True)
        if record:
            text = json.dumps({"output_dir": "sdxl", "pretrained_teacher_model": record}, indent=1)
            (folder / "args.json").write_text(text)
        for place in (folder, folder / "checkpoint-2"):
            save_file(state, place / sd15.WEIGHTS_NAME, metadata=header)
            words = ["--input", str(place), "--format", "kohya", "--output", "x.safetensors"]
            args, loras = tool.parse_args(words), tool.sd15.read_lora(place)
            if expected:
                found = tool.find_trainer(args, loras)
                assert found.FAMILY == expected.FAMILY, (header, record)
                args.merge_into = "/nowhere"
                with pytest.raises(tool.UnusableInput, match="--merge_into /nowhere cannot be loaded"):
                    tool.merge(args, loras, tmp_path / "merged", torch.float32)
                args.family = "sd" if expected is sdxl else "sdxl"
                with pytest.raises(tool.UnusableInput, match=f"--family {args.family}: the LoRA"):
                    tool.find_trainer(args, loras)
            else:
                with pytest.raises(tool.UnusableInput, match="give sd or sdxl"):
                    tool.find_trainer(args, loras)


@pytest.mark.parametrize(("family", "width"), [("sdxl", 768), ("sdxl", 1024), ("sd", 2048)])
def test_family_against_the_text_width_is_refused(tool, tmp_path, family, width):
    save_file(wide(width), tmp_path / "in.safetensors")
    words = ["--input", tmp_path / "in.safetensors", "--format", "kohya", "--family", family]
    with pytest.raises(tool.UnusableInput, match=f"--family {family}: .*width {width}"):
        run(tool, *words, "--output", tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_every_output_follows_the_umask(tool, merging, tmp_path):
    family, model, lora, _ = merging
    before = os.umask(0o022)
    try:
        words = ["--input", lora, "--family", family]
        for keys in ("kohya", "diffusers"):
            run(tool, *words, "--format", keys, "--output", tmp_path / f"{keys}.safetensors")
        for name in ("folder", "merged.safetensors"):
            run(tool, *words, "--merge_into", model, "--output", tmp_path / name)
    finally:
        os.umask(before)
    for path in tmp_path.rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o755 if path.is_dir() else 0o644), path


@one_model
def test_an_output_that_cannot_be_written_is_named(tool, trained, tmp_path, monkeypatch):
    family, *_, folder = trained
    (tmp_path / "file").write_text("")
    words = ["--input", folder, "--family", family, "--format", "kohya", "--output"]
    with pytest.raises(tool.UnusableInput, match="--output .*: cannot be written"):
        run(tool, *words, tmp_path / "file" / "lora.safetensors")

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tool, "save_file", full)
    with pytest.raises(tool.UnusableInput, match="--output .*No space left on device"):
        run(tool, *words, tmp_path / "lora.safetensors")
    (tmp_path / ".lora.safetensors-killed").mkdir()  # what a killed process left
    (tmp_path / ".lora.safetensors-notes").mkdir()
    (tmp_path / ".lora.safetensors-notes" / "of-the-user").touch()
    monkeypatch.setattr(tool, "save_file", lambda *_args, **_kwargs: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(SystemExit, match="143"):
        run(tool, *words, tmp_path / "lora.safetensors")
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    shutil.rmtree(tmp_path / ".lora.safetensors-notes")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@one_merge
def test_no_model_is_loaded_for_an_output_that_cannot_be_written(tool, merging, tmp_path, monkeypatch):
    family, model, lora, _ = merging
    (tmp_path / "file").write_text("")
    for trainer in (tool.sd15, tool.sdxl):
        monkeypatch.setattr(trainer, "load_teacher", lambda *_args, **_kwargs: pytest.fail("a model was loaded"))
    words = ["--input", lora, "--family", family, "--merge_into", model]
    with pytest.raises(tool.UnusableInput, match="cannot be written"):
        run(tool, *words, "--output", tmp_path / "file" / "merged")


def test_the_header_names_model_and_strength_and_nothing_of_the_input(tool, trained, tmp_path):
    family, *_, folder = trained
    state = load_file(folder / SOURCES["kohya"])
    secrets = {"ss_sd_model_name": "/home/someone/model.safetensors", "note": "hf_secretSECRETsecret"}
    save_file(state, tmp_path / "in.safetensors", metadata=secrets | {"modelspec.usage_hint": "DDIM with eta 0"})
    for keys in ("kohya", "diffusers"):
        out = tmp_path / f"{keys}.safetensors"
        words = ["--input", tmp_path / "in.safetensors", "--family", family, "--format", keys]
        run(tool, *words, "--output", out)
        with safe_open(out, "pt") as file:
            header = file.metadata()
        text = json.dumps(header)
        assert not any(value in text for value in (*secrets.values(), str(tmp_path)))
        assert header["modelspec.usage_hint"] == "DDIM with eta 0"
        if keys == "kohya":
            assert (header["ss_network_dim"], header["ss_network_alpha"]) == ("4", "7.0")
            assert header["ss_base_model_version"].startswith({"sd": "sd_v1", "sdxl": "sdxl_"}[family])
            assert "ss_resolution" not in header
    # A checkpoint's PEFT files have no header; the hint is that of the file beside their folder, through links too.
    unet = tmp_path / "checkpoint-2" / "unet"
    shutil.copytree(folder / SOURCES["peft"], unet)
    shutil.copy(tmp_path / "in.safetensors", unet.parent / "pytorch_lora_weights.safetensors")
    (tmp_path / "link.safetensors").symlink_to(unet / "adapter_model.safetensors")
    for number, source in enumerate((unet, unet / "adapter_model.safetensors", tmp_path / "link.safetensors")):
        out = tmp_path / f"{number}.safetensors"
        run(tool, "--input", source, "--family", family, "--format", "kohya", "--output", out)
        with safe_open(out, "pt") as file:
            assert file.metadata()["modelspec.usage_hint"] == "DDIM with eta 0"
            assert file.metadata()["ss_network_alpha"] == "7.0"


def test_sd2_is_named_to_a1111(tool, tmp_path):
    save_file(wide(1024), tmp_path / "in.safetensors")
    out = tmp_path / "out.safetensors"
    run(tool, "--input", tmp_path / "in.safetensors", "--format", "kohya", "--output", out)
    with safe_open(out, "pt") as file:
        assert file.metadata()["ss_v2"] == "True"


@one_model
def test_unusable_input_is_named(tool, trained, tmp_path):
    path, out = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    good = load_file(trained[-1] / SOURCES["kohya"])
    first = next(name for name in good if name.endswith(".alpha"))
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "lora_alpha": null}')
    for content, named in (
        (good | {"lora_te_text.lora_down.weight": torch.zeros(1)}, "lora_te_text"),
        ({name: value for name, value in good.items() if not name.endswith("up.weight")}, "LoRA of a UNet"),
        (good | {first: torch.full_like(good[first], float("nan"))}, "not finite"),
        (good | {first.replace("alpha", "dora_scale"): torch.ones(1)}, "LoRA of a UNet"),
        ({"conv_in.weight": torch.zeros(1)}, "conv_in.weight"),
        (b"x" * 100, "in.safetensors"),
        (good | {first: torch.zeros(0)}, "not a whole LoRA"),
        (good | {first: torch.zeros(2)}, "not a whole LoRA"),
        (good | {first.replace("alpha", "lora_up.weight"): torch.zeros(8, 4, dtype=torch.int32)}, "LoRA of a UNet"),
        (
            load_file(trained[-1] / SOURCES["peft"] / "adapter_model.safetensors"),
            "adapter_config.json, which has the alpha",
        ),
    ):
        path.write_bytes(content) if isinstance(content, bytes) else save_file(content, path)
        with pytest.raises(tool.UnusableInput, match=re.escape(named)) as error:
            run(tool, "--input", path, "--format", "diffusers", "--output", out)
        assert not out.exists() and "\n" not in str(error.value), named


@one_model
def test_a_rank_above_the_loras_own_is_refused(tool, trained, tmp_path):
    words = ["--input", trained[-1], "--format", "diffusers", "--output", tmp_path / "lora.safetensors"]
    with pytest.raises(tool.UnusableInput, match="--rank 65: must be at most the LoRA's own, "):
        run(tool, *words, "--rank", 65)


def test_wrong_usage_ends_with_one_line_and_2(tool, tmp_path, capsys):
    file = tmp_path / "lora.safetensors"
    file.write_bytes(b"")
    kohya = ["--input", file, "--format", "kohya", "--output"]
    for words, named in (
        (["--input", tmp_path / "none", "--format", "kohya", "--output", "x.safetensors"], "not there"),
        (["--input", file, "--output", "x.safetensors"], "--format or --merge_into"),
        ([*kohya, "x.bin"], ".safetensors"),
        ([*kohya, "x.safetensors", "--rank", 0], "--rank: 0"),
        (["--input", file, "--merge_into", "a/b", "--output", tmp_path], "exists"),
        ([*kohya, file], "exists"),
        ([*kohya, "x.safetensors", "--teacher_config", "a/b"], "only with --merge_into"),
        ([*kohya, "x.safetensors", "--network_dim", 8], "--network_dim"),
        (["--format", "kohya"], "--input"),
    ):
        with pytest.raises(SystemExit) as ended:
            tool.parse_args([str(word) for word in words])
        said = capsys.readouterr().err
        assert ended.value.code == 2 and named in said and len(said.splitlines()) == 1, said


def test_a_real_process_names_what_is_wrong_and_ends_with_2(tmp_path):
    save_file(wide(16), tmp_path / "in.safetensors")
    command = [sys.executable, ROOT / "scripts" / "export_lora.py", "--format", "kohya"]
    command += ["--input", tmp_path / "in.safetensors", "--output", tmp_path / "out.safetensors"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=ENVIRONMENT)
    first, *_, last = done.stderr.splitlines()
    assert done.returncode == 2 and first == "loading libraries" and last.startswith("error: --family auto")
    assert "Traceback" not in done.stderr
    # Windows writes cp1252 to a pipe, which cannot hold every path.
    command = [sys.executable, "-c", "import lib; print('山')"]
    variables = ENVIRONMENT | {"PYTHONIOENCODING": "cp1252", "PYTHONPATH": str(ROOT / "scripts")}
    assert subprocess.run(command, capture_output=True, env=variables).returncode == 0
    # Ctrl-C while libraries load; in the background, as some CI runs its tests, it would be ignored.
    command[-1] = "import signal as s; s.signal(s.SIGINT, s.default_int_handler); import lib; s.raise_signal(s.SIGINT)"
    done = subprocess.run(command, capture_output=True, env=variables)
    assert done.returncode == -signal.SIGINT and not done.stderr
    command[-1] = "import lib; raise PermissionError(13, 'Permission denied', 'locked/a.png')"
    done = subprocess.run(command, capture_output=True, env=variables)
    assert done.returncode == 2 and done.stderr.startswith(b"error: locked/a.png") and done.stderr.count(b"\n") == 1


# ----------------------------------------------------------------------------------------------------------
# docs/using.md
# ----------------------------------------------------------------------------------------------------------

# ComfyUI's nodes: {input: type of the output that it takes, or type of the value}, types of the outputs.
NODES = {
    "CheckpointLoaderSimple": ({"ckpt_name": str}, ["MODEL", "CLIP", "VAE"]),
    "LoraLoaderModelOnly": ({"model": "MODEL", "lora_name": str, "strength_model": float}, ["MODEL"]),
    "ModelSamplingDiscrete": ({"model": "MODEL", "sampling": str, "zsnr": bool}, ["MODEL"]),
    "CLIPTextEncode": ({"clip": "CLIP", "text": str}, ["CONDITIONING"]),
    "EmptyLatentImage": ({"width": int, "height": int, "batch_size": int}, ["LATENT"]),
    "KSampler": (
        {
            "model": "MODEL", "positive": "CONDITIONING", "negative": "CONDITIONING", "latent_image": "LATENT",
            "seed": int, "steps": int, "cfg": float, "sampler_name": str, "scheduler": str, "denoise": float,
        },
        ["LATENT"],
    ),
    "VAEDecode": ({"samples": "LATENT", "vae": "VAE"}, ["IMAGE"]),
    "SaveImage": ({"images": "IMAGE", "filename_prefix": str}, []),
}  # fmt: skip


def test_the_comfyui_workflow_is_whole():
    nodes = json.loads((ROOT / "docs" / "comfyui-lcm-workflow.json").read_text("utf-8"))
    used = set()
    for number, node in nodes.items():
        inputs, _ = NODES[node["class_type"]]
        assert node["inputs"].keys() == inputs.keys(), number
        for name, kind in inputs.items():
            value = node["inputs"][name]
            if isinstance(kind, str):
                source, output_number = value
                assert NODES[nodes[source]["class_type"]][1][output_number] == kind, (number, name)
                used.add((source, output_number))
            else:
                assert type(value) is kind, (number, name)
    made = {(number, i) for number, node in nodes.items() for i in range(len(NODES[node["class_type"]][1]))}
    assert used == made  # no node is left out of the picture
    sampler = next(node["inputs"] for node in nodes.values() if node["class_type"] == "KSampler")
    assert (sampler["sampler_name"], sampler["scheduler"], sampler["denoise"]) == ("lcm", "sgm_uniform", 1.0)
    assert 4 <= sampler["steps"] <= 8 and 1 <= sampler["cfg"] <= 2
    order, source = [], "9"
    while source != "1":  # from the picture back to the base model
        order.append(nodes[source]["class_type"])
        source = next(value[0] for name, value in nodes[source]["inputs"].items() if isinstance(value, list))
    assert order == ["SaveImage", "VAEDecode", "KSampler", "ModelSamplingDiscrete", "LoraLoaderModelOnly"]


def test_the_commands_of_the_documents_parse(tool, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs" / "lcm-lora").mkdir(parents=True)
    lines = re.findall(r"python scripts/export_lora\.py (.*)", (ROOT / "docs" / "using.md").read_text("utf-8"))
    assert len(lines) == 4
    for line in lines:
        tool.parse_args(line.split())
    sources = re.findall(r"    python scripts/export_lora\.py ((?:.*\\\n)*.*)", tool.__doc__)
    assert sources
    for source in sources:
        tool.parse_args(source.replace("\\\n", " ").split())
