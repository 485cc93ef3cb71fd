"""export_lora.py: names that ComfyUI, A1111 and diffusers know, equal UNets after every conversion."""

import json
import re
import subprocess
import sys

import pytest
import torch
from conftest import ENVIRONMENT, ROOT, flags, load_script
from diffusers import (
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
TINY = {  # one layer a block, where the released models have two
    "sd15": {
        "block_out_channels": (8, 16), "down_block_types": BLOCKS[0][2:], "up_block_types": BLOCKS[1][:2],
        "cross_attention_dim": 16, "attention_head_dim": 2, "layers_per_block": 1,
    },
    "sdxl": {
        "block_out_channels": (8, 8, 8), "cross_attention_dim": 16, "attention_head_dim": 2,
        "addition_time_embed_dim": 4, "layers_per_block": 1,
        "projection_class_embeddings_input_dim": 32, **XL,
    },
}  # fmt: skip
PIPELINES = {"sd": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}


@pytest.fixture(scope="module")
def teacher(teachers):
    """Return the folder of the tiny SD 1.5 teacher: nothing here depends on the family."""
    return teachers["train_lcm_lora_sd15"]


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
    state, alphas, metadata = pipeline.lora_state_dict(
        str(path), unet_config=unet.config, return_lora_metadata=True
    )
    pipeline.load_lora_into_unet(state, alphas, unet, metadata=metadata)
    return output(unet)


def run(tool, *words):
    """Run the tool's main as its command line would."""
    tool.main(tool.parse_args([str(word) for word in words]))


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


def test_diffusers_reads_each_kohya_name_as_the_layer_it_means(real):
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
                names[f"{name}.{inner}".strip(".")] = (
                    f"{place}_{resnet.get(inner, inner).replace('.', '_')}".strip("_")
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


def test_names_come_back(tool, real):
    _, unet, modules, state = real
    assert tool.take_kohya(dict(state)).keys() == modules
    for name in ("conv_in", "conv_out", "time_embedding.linear_2", "add_embedding.linear_1"):
        for trainer in map(trainer_of, ("sd15", "sdxl")):
            assert tool.diffusers_name(trainer.kohya_name(name, 2), 2) == name


def test_the_released_sd15_file_to_the_byte(tool, tmp_path):
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, **REAL["sd15"])
        with_lora(unet, trainer_of("sd15"), lora_rank=64, lora_alpha=64)
    state = get_peft_model_state_dict(unet)
    state = {f"unet.{name}": torch.zeros(value.shape, dtype=torch.half) for name, value in state.items()}
    save_file(state, tmp_path / "in.safetensors")
    out = tmp_path / "out.safetensors"
    run(tool, "--input", tmp_path / "in.safetensors", "--format", "kohya", "--output", out, "--bare_header")
    with out.open("rb") as file:
        assert int.from_bytes(file.read(8), "little") == 116_544
    assert out.stat().st_size == 134_621_556
    with safe_open(out, "pt") as file:
        assert len(file.keys()) == 834 and file.metadata() == {"format": "pt"}


# ----------------------------------------------------------------------------------------------------------
# Weights: every conversion gives the same UNet, alpha != rank
# ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=TINY)
def trained(request, tmp_path_factory):
    """Return (family, function that makes the base UNet, output with its LoRA, a trainer's folder)."""
    folder, trainer = tmp_path_factory.mktemp("trained"), trainer_of(request.param)
    unet = build_unet(TINY[request.param])
    args = with_lora(unet, trainer, lora_rank=4, lora_alpha=7)
    family = family_of(request.param)
    trainer.save_lora(unet, PIPELINES[family], folder, args)
    trainer.save_for_peft(unet, folder / "unet")
    return family, lambda: build_unet(TINY[request.param]), output(unet), folder


def test_both_files_of_the_trainer_give_its_unet(trained):
    family, base, expected, folder = trained
    assert (output(base()) - expected).abs().max() > 0.05
    for name, tolerance in (("pytorch_lora_weights", 1e-5), ("lcm_lora_kohya", 5e-3)):
        got = load_into(base(), folder / f"{name}.safetensors", family)
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("source", "keys"), [("", "kohya"), ("lcm_lora_kohya.safetensors", "diffusers"), ("unet", "kohya")]
)
def test_every_conversion_gives_the_same_unet(tool, trained, tmp_path, source, keys):
    family, base, expected, folder = trained
    words = ["--input", folder / source, "--family", family]
    first, second = tmp_path / "1.safetensors", tmp_path / "2.safetensors"
    run(tool, *words, "--format", keys, "--dtype", "fp32", "--output", first)
    other = {"diffusers": "kohya", "kohya": "diffusers"}[keys]
    run(tool, "--input", first, "--family", family, "--format", other, "--dtype", "fp32", "--output", second)
    for path in (first, second):
        got = load_into(base(), path, family)
        torch.testing.assert_close(got, expected, rtol=5e-3, atol=5e-3)
    assert {path.name for path in tmp_path.iterdir()} == {"1.safetensors", "2.safetensors"}


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_dtype(tool, trained, tmp_path, dtype):
    family, *_, folder = trained
    out = tmp_path / "out.safetensors"
    run(tool, "--input", folder, "--family", family, "--format", "kohya", "--dtype", dtype, "--output", out)
    assert {str(value.dtype) for value in load_file(out).values()} == {f"torch.{tool.DTYPES[dtype]}"}


def deltas(tool, path):
    """Return the change of each layer's weight by a file."""
    loras, _ = tool.read_lora(path)
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
    assert max(len(lora.down) for lora in tool.read_lora(out)[0].values()) == 2
    load_into(base(), out, family)


def test_layers_of_different_rank_and_alpha_survive(tool, trained, tmp_path):
    family, base, expected, folder = trained
    state = load_file(folder / "lcm_lora_kohya.safetensors")
    names = [name.removesuffix(".alpha") for name in state if name.endswith(".alpha")]
    for name in names[::2]:  # the same change, written with another rank and another alpha
        down, up = state[f"{name}.lora_down.weight"], state[f"{name}.lora_up.weight"]
        state[f"{name}.lora_down.weight"] = torch.cat([down, torch.zeros_like(down)])
        state[f"{name}.lora_up.weight"] = torch.cat([up, torch.zeros_like(up)], dim=1)
        state[f"{name}.alpha"] = torch.tensor(14.0)
    save_file(state, tmp_path / "in.safetensors")
    out = tmp_path / "out.safetensors"
    words = ["--input", tmp_path / "in.safetensors", "--family", family, "--format", "diffusers"]
    run(tool, *words, "--output", out)
    torch.testing.assert_close(load_into(base(), out, family), expected, rtol=5e-3, atol=5e-3)


def test_a_kohya_file_without_alpha_has_scale_1(tool, trained, tmp_path):
    family, *_, folder = trained
    state = load_file(folder / "lcm_lora_kohya.safetensors")
    state = {name: value for name, value in state.items() if not name.endswith(".alpha")}
    save_file(state, tmp_path / "in.safetensors")
    assert {lora.alpha for lora in tool.read_lora(tmp_path / "in.safetensors")[0].values()} == {4.0}


# ----------------------------------------------------------------------------------------------------------
# Merging
# ----------------------------------------------------------------------------------------------------------


def test_a_merged_model_draws_as_the_model_with_its_lora(tool, teacher, tmp_path):
    trainer = trainer_of("sd15")
    pipe = StableDiffusionPipeline.from_pretrained(teacher, safety_checker=None)
    args = with_lora(pipe.unet, trainer, lora_rank=4, lora_alpha=7)
    trainer.save_lora(pipe.unet, StableDiffusionPipeline, tmp_path, args)
    out = tmp_path / "merged"
    words = ["--input", tmp_path, "--family", "sd", "--dtype", "fp32", "--merge_into", teacher]
    run(tool, *words, "--output", out)
    merged = DiffusionPipeline.from_pretrained(out, safety_checker=None)
    torch.testing.assert_close(output(merged.unet), output(pipe.unet), rtol=1e-4, atol=1e-4)
    assert isinstance(merged.scheduler, LCMScheduler) and not hasattr(merged.unet, "peft_config")
    # the folder is finished or not there
    assert {path.name for path in tmp_path.iterdir()} == {"merged", trainer.WEIGHTS_NAME, trainer.KOHYA_NAME}


# ----------------------------------------------------------------------------------------------------------
# Header and unusable input
# ----------------------------------------------------------------------------------------------------------


def test_the_header_names_model_and_strength_and_nothing_of_the_input(tool, trained, tmp_path):
    family, *_, folder = trained
    state = load_file(folder / "lcm_lora_kohya.safetensors")
    secrets = {"ss_sd_model_name": "/home/someone/model.safetensors", "note": "hf_secretSECRETsecret"}
    save_file(state, tmp_path / "in.safetensors", metadata=secrets)
    for keys in ("kohya", "diffusers"):
        out = tmp_path / f"{keys}.safetensors"
        words = ["--input", tmp_path / "in.safetensors", "--family", family, "--format", keys]
        run(tool, *words, "--output", out)
        with safe_open(out, "pt") as file:
            header = file.metadata()
        text = json.dumps(header)
        assert not any(value in text for value in (*secrets.values(), str(tmp_path)))
        if keys == "kohya":
            assert (header["ss_network_dim"], header["ss_network_alpha"]) == ("4", "7.0")
            assert header["ss_base_model_version"].startswith({"sd": "sd_v1", "sdxl": "sdxl_"}[family])
            assert "ss_resolution" not in header


def test_sd2_is_named_to_a1111(tool):
    lora = tool.Lora(torch.zeros(2, 1024), torch.zeros(8, 2), 2.0)
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    assert tool.kohya_file(trainer_of("sd15"), {name: lora}, 2)[1]["ss_v2"] == "True"


def damaged(folder):
    """Return {what is wrong: (tensors or bytes, words that the message has to hold)}."""
    good = load_file(folder / "lcm_lora_kohya.safetensors")
    first = next(name for name in good if name.endswith(".alpha"))
    half = {name: value for name, value in good.items() if not name.endswith("up.weight")}
    return {
        "text encoder": (good | {"lora_te_text.lora_down.weight": torch.zeros(1)}, "lora_te_text"),
        "half": (half, "is no LoRA"),
        "not finite": (good | {first: torch.full_like(good[first], float("nan"))}, "not finite"),
        "a whole model": ({"conv_in.weight": torch.zeros(1)}, "conv_in.weight"),
        "no safetensors": (b"x" * 100, "no whole .safetensors file"),
        "text width tells nothing": (good, "--family auto"),
    }  # fmt: skip


def test_unusable_input_is_named(tool, trained, tmp_path):
    path, out = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    for what, (content, named) in damaged(trained[-1]).items():
        path.write_bytes(content) if isinstance(content, bytes) else save_file(content, path)
        if what == "text width tells nothing" and trained[0] == "sdxl":
            continue  # its names tell
        with pytest.raises(tool.sd15.UnusableInput, match=re.escape(named)):
            run(tool, "--input", path, "--format", "kohya", "--output", out)
        assert not out.exists(), what


def test_a_rank_above_the_loras_own_is_refused(tool, trained, tmp_path):
    family = {"sd15": "sd"}.get(trained[0], trained[0])
    words = ["--input", trained[-1], "--format", "kohya", "--output", tmp_path / "lora.safetensors"]
    with pytest.raises(tool.sd15.UnusableInput, match="--rank 65: must be at most the LoRA's own, "):
        run(tool, *words, "--family", family, "--rank", 65)


def test_wrong_usage_ends_with_one_line_and_2(tool, tmp_path, capsys):
    file = tmp_path / "lora.safetensors"
    file.write_bytes(b"")
    for words, named in (
        (["--input", tmp_path / "none", "--format", "kohya", "--output", "x.safetensors"], "not there"),
        (["--input", file, "--output", "x.safetensors"], "--format or --merge_into"),
        (["--input", file, "--format", "kohya", "--output", "x.bin"], ".safetensors"),
        (["--input", file, "--format", "kohya", "--output", "x.safetensors", "--rank", 0], "--rank 0"),
        (["--input", file, "--merge_into", "a/b", "--output", tmp_path], "is there"),
        (["--input", file, "--format", "diffusers", "--output", "x.safetensors", "--bare_header"], "kohya"),
    ):
        with pytest.raises(SystemExit) as ended:
            tool.parse_args([str(word) for word in words])
        said = capsys.readouterr().err
        assert ended.value.code == 2 and named in said and len(said.splitlines()) == 1


def test_a_real_process_says_what_is_wrong_and_ends_with_2(trained, tmp_path):
    family, *_, folder = trained
    if family == "sdxl":
        pytest.skip("one family is enough for a real process")
    command = [sys.executable, ROOT / "scripts" / "export_lora.py", "--input", folder, "--format", "kohya"]
    command += ["--output", tmp_path / "out.safetensors"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=ENVIRONMENT)
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("error: --family auto")
    assert "Traceback" not in done.stderr
