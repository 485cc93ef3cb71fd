"""A teacher in one .safetensors file with the keys of the original LDM code: trainer and sampler load it."""

import copy
import json
import re
import shutil
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from conftest import flags, load_script, tiny_text
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file, save_file

UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer.text_model."
XL_KEY = "conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias"
UNET_ENDS = {
    "conv_in.": "input_blocks.0.0.", "conv_norm_out.": "out.0.", "conv_out.": "out.2.",
    "time_embedding.linear_1.": "time_embed.0.", "time_embedding.linear_2.": "time_embed.2.",
    "mid_block.resnets.0.": "middle_block.0.", "mid_block.attentions.0.": "middle_block.1.",
    "mid_block.resnets.1.": "middle_block.2.", "add_embedding.linear_1.": "label_emb.0.0.",
    "add_embedding.linear_2.": "label_emb.0.2.",
}  # fmt: skip
UNET_RESNET = {
    "norm1.": "in_layers.0.", "conv1.": "in_layers.2.", "time_emb_proj.": "emb_layers.1.",
    "norm2.": "out_layers.0.", "conv2.": "out_layers.3.", "conv_shortcut.": "skip_connection.",
}  # fmt: skip
XL_TEXT = "conditioner.embedders.0.transformer.text_model.", "conditioner.embedders.1.model."
OPEN_CLIP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding", "final_layer_norm.": "ln_final.",
    "encoder.layers.": "transformer.resblocks.", "layer_norm1.": "ln_1.", "layer_norm2.": "ln_2.",
    "self_attn.out_proj.": "attn.out_proj.", "mlp.fc1.": "mlp.c_fc.", "mlp.fc2.": "mlp.c_proj.",
}  # fmt: skip
VAE_NAMES = {
    "mid_block.resnets.0.": "mid.block_1.", "mid_block.resnets.1.": "mid.block_2.",
    "mid_block.attentions.0.": "mid.attn_1.", "group_norm.": "norm.", "to_out.0.": "proj_out.",
    "to_q.": "q.", "to_k.": "k.", "to_v.": "v.", "conv_shortcut.": "nin_shortcut.",
    "conv_norm_out.": "norm_out.", "downsamplers.0.": "downsample.", "upsamplers.0.": "upsample.",
    "resnets.": "block.", "down_blocks.": "down.",
}  # fmt: skip


def renamed(key, names):
    for old, new in names.items():
        key = re.sub(rf"(?<![^.]){re.escape(old)}", new, key)
    return key


def ldm_unet_key(key, config):
    """LDM numbers the layers of all levels through, a level's down- or upsampler with them."""
    per_level = config.layers_per_block + 1  # on the way down the last is the downsampler
    found = re.match(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.*)", key)
    if not found:
        return renamed(key, UNET_ENDS | (UNET_RESNET if "resnets" in key else {}))
    side, level, kind, layer, rest = found.groups()
    first = int(level) * per_level
    if kind == "downsamplers":
        return f"input_blocks.{first + per_level}.0.{rest.replace('conv.', 'op.')}"
    if kind == "upsamplers":
        after_attention = "CrossAttn" in config.up_block_types[int(level)]
        return f"output_blocks.{first + per_level - 1}.{1 + after_attention}.{rest}"
    blocks = f"input_blocks.{1 + first + int(layer)}" if side == "down" else f"output_blocks.{first + int(layer)}"
    return f"{blocks}.1.{rest}" if kind == "attentions" else f"{blocks}.0.{renamed(rest, UNET_RESNET)}"


def ldm_vae_key(key, config):
    """LDM counts the decoder's levels from the last to the first."""
    last = len(config.up_block_types) - 1
    key = re.sub(r"up_blocks\.(\d+)", lambda found: f"up.{last - int(found[1])}", key)
    return renamed(key, VAE_NAMES)


def to_ldm(unet, vae, text_encoder):
    """Return a dict of tensors by LDM key, with what published files hold besides the weights."""
    weights = {UNET + ldm_unet_key(key, unet.config): value for key, value in unet.state_dict().items()}
    for key, value in vae.state_dict().items():
        is_conv = ".attentions." in key and value.ndim == 2  # LDM's are 1x1 convolutions
        weights[VAE + ldm_vae_key(key, vae.config)] = value[:, :, None, None] if is_conv else value
    for key, value in text_encoder.state_dict().items():
        weights[TEXT + key.removeprefix("text_model.")] = value
    length = text_encoder.config.max_position_embeddings
    besides = {"betas": torch.ones(1000), TEXT + "embeddings.position_ids": torch.arange(length)[None]}
    return {key: value.contiguous().clone() for key, value in (weights | besides).items()}


def to_open_clip(text_encoder):
    """Return a dict of tensors by OpenCLIP's keys: one matrix for q, k and v, the projection transposed."""
    weights, state = {}, dict(text_encoder.state_dict())
    state = {key.removeprefix("text_model."): value for key, value in state.items()}
    weights["text_projection"] = state.pop("text_projection.weight").T
    for key, value in state.items():
        if ".q_proj." in key:
            joined = torch.cat([state[key.replace(".q_proj.", f".{name}_proj.")] for name in "qkv"])
            key, value = key.replace("self_attn.q_proj.", "attn.in_proj_"), joined
        if ".k_proj." not in key and ".v_proj." not in key:
            weights[renamed(key, OPEN_CLIP)] = value
    return weights


@pytest.fixture(scope="module")
def teacher(teachers):
    return teachers["train_lcm_lora_sd15"]


@pytest.fixture(scope="module")
def xl_reference(teachers, tmp_path_factory):
    """Return (pipeline, the folder of its settings and other weights, its one file); ten layers mark SDXL."""
    pipe = StableDiffusionXLPipeline.from_pretrained(teachers["train_lcm_lora_sdxl"])
    wide = type(pipe.text_encoder_2)
    pipe.text_encoder_2 = tiny_text(pipe.tokenizer_2, wide, 24, 10, projection_dim=12).eval()
    folder = tmp_path_factory.mktemp("xl")
    pipe.save_pretrained(folder / "config")
    generator = torch.Generator().manual_seed(1)
    for part in (pipe.unet, pipe.vae, pipe.text_encoder, pipe.text_encoder_2):
        for parameter in part.parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    weights = to_ldm(pipe.unet, pipe.vae, pipe.text_encoder)
    weights = {key.replace(TEXT, XL_TEXT[0]): value for key, value in weights.items()}
    second = {XL_TEXT[1] + key: value for key, value in to_open_clip(pipe.text_encoder_2).items()}
    assert XL_KEY in second
    weights |= {key: value.contiguous().clone() for key, value in second.items()}
    save_file(weights, folder / "model.safetensors")
    return pipe, folder / "config", folder / "model.safetensors"


def test_an_sdxl_file_gives_the_weights_and_the_folder_the_settings(xl_reference, sample, shards):
    reference, folder, file = xl_reference
    trainer = load_script("train_lcm_lora_sdxl.py")
    args = trainer.parse_args(flags(file, shards, "unused", teacher_config=folder))
    for pipe in (
        trainer.load_teacher(args, torch.float32, torch.device("cpu")),
        sample.load_teacher(sampler_args(sample, file, folder), "cpu"),
    ):
        for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
            theirs, ours = getattr(reference, name).state_dict(), getattr(pipe, name).state_dict()
            assert theirs.keys() == ours.keys()
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0, msg=lambda text, name=name: name + text)
        assert pipe.config.force_zeros_for_empty_prompt is True
        assert pipe.scheduler.config.prediction_type == "epsilon"


@pytest.fixture(scope="module")
def reference(teacher):
    """A teacher of the folder's shapes whose weights are all other than the folder's, norms included."""
    pipe = StableDiffusionPipeline.from_pretrained(teacher)
    generator = torch.Generator().manual_seed(1)
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        for parameter in part.parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return pipe


@pytest.fixture(scope="module")
def file(reference, tmp_path_factory):
    path = tmp_path_factory.mktemp("single") / "teacher.safetensors"
    save_file(to_ldm(reference.unet, reference.vae, reference.text_encoder), path)
    return path


@pytest.fixture(scope="module")
def bare_config(teacher, tmp_path_factory):
    """What a user copies from a model's page: no weights, a safety checker that is named and not there."""
    folder = tmp_path_factory.mktemp("config") / "v-teacher"
    shutil.copytree(teacher, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    change(folder / "scheduler" / "scheduler_config.json", prediction_type="v_prediction")
    change(
        folder / "model_index.json",
        safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
        feature_extractor=["transformers", "CLIPFeatureExtractor"],  # gone since transformers 5
        requires_safety_checker=True,
    )
    return folder


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.fixture(scope="module")
def sample():
    return load_script("scripts/sample.py")


@torch.no_grad()
def outputs(pipe):
    """Return what every model of a pipeline makes of fixed inputs."""
    generator = torch.Generator().manual_seed(2)
    latents, pixels = (torch.randn(1, c, 16, 16, generator=generator) for c in (4, 3))
    prompt_embeds, _ = pipe.encode_prompt("sea at dawn", pipe.device, 1, False)
    return {
        "text": prompt_embeds,
        "unet": pipe.unet(latents, 500, prompt_embeds).sample,
        "encoder": pipe.vae.encode(pixels).latent_dist.parameters,
        "decoder": pipe.vae.decode(latents).sample,
    }


def assert_same_models(pipe, reference, parts=("text", "unet", "encoder", "decoder")):
    ours, theirs = outputs(pipe), outputs(reference)
    for part in parts:
        torch.testing.assert_close(ours[part], theirs[part], msg=lambda text, part=part: f"{part}: {text}")
    assert pipe.vae.config.scaling_factor == reference.vae.config.scaling_factor


def test_keys_and_counts_are_those_of_published_sd15_files():
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768)  # the rest of the defaults are SD 1.5's
        vae = AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
            block_out_channels=(128, 256, 512, 512), layers_per_block=2,
        )  # fmt: skip
    keys = {ldm_unet_key(key, unet.config): value.shape for key, value in unet.state_dict().items()}
    assert len(keys) == 686
    assert keys["input_blocks.3.0.op.weight"] == (320, 320, 3, 3)
    assert keys["input_blocks.4.0.skip_connection.weight"] == (640, 320, 1, 1)
    assert keys["input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight"] == (320, 768)
    assert keys["middle_block.2.out_layers.3.weight"] == (1280, 1280, 3, 3)
    assert keys["output_blocks.2.1.conv.weight"] == (1280, 1280, 3, 3)
    assert keys["output_blocks.8.2.conv.weight"] == (640, 640, 3, 3)
    assert keys["output_blocks.11.0.skip_connection.weight"] == (320, 640, 1, 1)
    keys = {ldm_vae_key(key, vae.config): value.shape for key, value in vae.state_dict().items()}
    assert len(keys) == 248
    assert keys["encoder.down.2.block.0.nin_shortcut.weight"] == (512, 256, 1, 1)
    assert keys["encoder.down.2.downsample.conv.weight"] == (512, 512, 3, 3)
    assert keys["decoder.up.0.block.0.nin_shortcut.weight"] == (128, 256, 1, 1)
    assert {"encoder.mid.attn_1.proj_out.weight", "decoder.norm_out.bias", "quant_conv.weight"} <= set(keys)


@pytest.mark.parametrize("config", ["teacher", "bare_config"])
def test_trainer_takes_weights_of_the_file_and_settings_of_the_folder(
    request, trainer, file, reference, teacher, shards, config
):
    folder = request.getfixturevalue(config)
    args = trainer.parse_args(flags(file, shards, "unused", teacher_config=folder))
    pipe = trainer.load_teacher(args, torch.float32, torch.device("cpu"))
    assert_same_models(pipe, reference)
    unlike = outputs(StableDiffusionPipeline.from_pretrained(teacher))
    assert all((unlike[part] - value).abs().max() > 0.01 for part, value in outputs(pipe).items())
    expected = {"teacher": "epsilon", "bare_config": "v_prediction"}[config]
    assert pipe.scheduler.config.prediction_type == expected
    assert type(pipe.scheduler).__name__ == "DDIMScheduler" and pipe.safety_checker is None
    assert not any(weight.requires_grad for weight in pipe.unet.parameters()) and not pipe.unet.training


def test_trainer_gives_file_its_dtype_and_another_vae(
    trainer, file, reference, teacher, shards, tmp_path, monkeypatch
):
    changes = {"teacher_config": teacher, "pretrained_vae_model_name_or_path": teacher}
    args = trainer.parse_args(flags(file, shards, "unused", **changes))
    with pytest.raises(trainer.UnusableInput, match=f"--pretrained_vae_model_name_or_path {teacher}.* its own folder"):
        trainer.load_teacher(args, torch.float32, torch.device("cpu"))
    shutil.copytree(teacher / "vae", tmp_path / "vae")
    args.pretrained_vae_model_name_or_path = str(tmp_path / "vae")
    for name in ("scaling_factor", "shift_factor"):  # another family's latents
        change(tmp_path / "vae" / "config.json", **{name: 0.7})
        with pytest.raises(trainer.UnusableInput, match=f"its {name} is 0.7, that of the teacher's own VAE"):
            trainer.load_teacher(args, torch.float32, torch.device("cpu"))
        shutil.copy(teacher / "vae" / "config.json", tmp_path / "vae")
    args.teacher_config = None  # then it is its family's
    with pytest.raises(trainer.UnusableInput, match=f"that of the teacher's own VAE {trainer.VAE_SCALING}"):
        trainer.check_vae(SimpleNamespace(config={"latent_channels": 4, "scaling_factor": 0.3}), args)
    fitting = {"latent_channels": 4, "scaling_factor": trainer.VAE_SCALING, "shift_factor": None}
    trainer.check_vae(SimpleNamespace(config=fitting), args)
    args.teacher_config = str(teacher)
    busy = torch.nn.Identity()
    busy.to = mock.Mock(side_effect=torch.AcceleratorError("CUDA error: device is busy"))
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "load_pipeline", lambda *_given, **_named: SimpleNamespace(components={"unet": busy}))
        patch.setattr(trainer, "set_prediction", lambda *_: None)
        with pytest.raises(torch.AcceleratorError, match="is busy"):  # and not: check the id and the network
            trainer.load_teacher(args, torch.float32, torch.device("cpu"), check=False)
    pipe = trainer.load_teacher(args, torch.bfloat16, torch.device("cpu"))
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        assert {weight.dtype for weight in part.parameters()} == {torch.bfloat16}
    pipe = copy.deepcopy(pipe).to(torch.float32)
    other = StableDiffusionPipeline.from_pretrained(teacher)
    vae = {key: value.bfloat16().float() for key, value in other.vae.state_dict().items()}
    torch.testing.assert_close(pipe.vae.state_dict(), vae, rtol=0, atol=0)
    unet = {key: value.bfloat16().float() for key, value in reference.unet.state_dict().items()}
    torch.testing.assert_close(pipe.unet.state_dict(), unet, rtol=0, atol=0)


def sampler_args(sample, model, config=None):
    """Return the flags of scripts/sample.py for a model."""
    line = ["--pretrained_teacher_model", str(model), "--prompts", "sea", "--device", "cpu", "--output_dir", "unused"]
    return sample.parse_args(line + ([] if config is None else ["--teacher_config", str(config)]))


def test_a_files_markers_and_the_flag_tell_what_it_predicts(trainer, file, teacher, shards, tmp_path):
    weights, path = load_file(file), tmp_path / "teacher.safetensors"
    for markers, flag, expected in (
        ((), None, ("epsilon", False)), (("v_pred",), None, ("v_prediction", False)),
        (("v_pred", "ztsnr"), None, ("v_prediction", True)), ((), "v_prediction", ("v_prediction", False)),
        (("v_pred",), "epsilon", ("epsilon", False)), (("edm_vpred.sigma_max",), None, "is an EDM model"),
    ):  # fmt: skip
        save_file(weights | {name: torch.zeros(1) for name in markers}, path)
        args = trainer.parse_args(flags(path, shards, "unused", teacher_config=teacher, prediction_type=flag))
        if isinstance(expected, str):
            with pytest.raises(trainer.UnusableInput, match=expected):
                trainer.load_teacher(args, torch.float32, torch.device("cpu"), vae=None)
            continue
        config = trainer.load_teacher(args, torch.float32, torch.device("cpu"), vae=None).scheduler.config
        assert (config.prediction_type, config.get("rescale_betas_zero_snr", False)) == expected
        assert trainer.make_schedule(config, args, torch.device("cpu")).prediction_type == expected[0]
    other = load_script(trainer.OTHER_SCRIPT)
    with pytest.raises(
        other.UnusableInput, match=f"teacher.safetensors: is not {other.FAMILY}; use {other.OTHER_SCRIPT}"
    ):
        other.check_teacher(args)
    assert trainer.check_teacher(args) is None
    # PNDMScheduler, which SD 1.5 names, has no zero terminal SNR. A file of SD 2.x does not tell what it predicts.
    save_file(weights | {name: torch.zeros(1) for name in ("v_pred", "ztsnr")}, path)
    args = trainer.parse_args(flags(path, shards, "unused", teacher_config=teacher))
    unet = SimpleNamespace(config=SimpleNamespace(cross_attention_dim=1024))
    pipe = SimpleNamespace(scheduler=PNDMScheduler(), unet=unet)
    trainer.set_prediction(pipe, args)
    assert trainer.make_schedule(pipe.scheduler.config, args, torch.device("cpu")).alphas[-1] < 1e-3
    save_file(weights, path)
    args.teacher_config = None
    save_file(weights, path, {"modelspec.prediction_type": "epsilon"})
    trainer.set_prediction(pipe, args)
    assert pipe.scheduler.config.prediction_type == "epsilon"
    save_file(weights, path)
    with pytest.raises(trainer.UnusableInput, match="give --prediction_type epsilon .* or v_prediction"):
        trainer.set_prediction(pipe, args)
    pipe.scheduler = EulerDiscreteScheduler(timestep_type="continuous", prediction_type="v_prediction")  # CosXL's
    with pytest.raises(trainer.UnusableInput, match="EulerDiscreteScheduler has no betas"):
        trainer.set_prediction(pipe, args)


@pytest.mark.parametrize("config", ["teacher", "bare_config"])
def test_sampler_loads_the_same_file(request, sample, file, reference, config):
    pipe = sample.load_teacher(sampler_args(sample, file, request.getfixturevalue(config)), "cpu")
    assert_same_models(pipe, reference)
    expected = {"teacher": "epsilon", "bare_config": "v_prediction"}[config]
    assert pipe.scheduler.config.prediction_type == expected
    sample.set_sampler(pipe, "lcm-without-lora")
    assert pipe.scheduler.config.prediction_type == expected


@pytest.mark.parametrize("is_xl", [False, True])
def test_file_decides_the_family(sample, file, teacher, tmp_path, is_xl):
    path = tmp_path / "model.safetensors"
    save_file(load_file(file) | ({XL_KEY: torch.zeros(8)} if is_xl else {}), path)
    family = sample.pipelines.family_of(sampler_args(sample, path, teacher))
    assert family.__name__ == f"train_lcm_lora_{'sdxl' if is_xl else 'sd15'}"


@pytest.fixture
def unusable(file, teacher, bare_config, tmp_path):
    """Return by name (model file, config, words of the message) of what cannot be loaded."""
    weights = load_file(file)
    changed = {
        "lora": {"lora_unet_mid_block.alpha": torch.ones(1)},
        "no-vae": {key: value for key, value in weights.items() if not key.startswith(VAE)},
        "no-text": {key: value for key, value in weights.items() if not key.startswith(TEXT)},
        "unet-hole": {k: v for k, v in weights.items() if k != UNET + "middle_block.1.proj_in.weight"},
        "text-hole": {k: v for k, v in weights.items() if k != TEXT + "final_layer_norm.weight"},
    }
    for name, tensors in changed.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")
    wider = tmp_path / "wider"
    shutil.copytree(bare_config, wider)
    change(wider / "unet" / "config.json", block_out_channels=[16, 16])
    return {
        "no config": (file, None, "give --teacher_config"),
        "config only on the Hub": (file, "no-such/model", "give --teacher_config"),
        "lora": (tmp_path / "lora.safetensors", bare_config, "lora.safetensors"),
        "no VAE": (tmp_path / "no-vae.safetensors", bare_config, "AutoencoderKL"),
        "no text encoder": (tmp_path / "no-text.safetensors", bare_config, "CLIPTextModel"),
        "hole in the UNet": (tmp_path / "unet-hole.safetensors", teacher, "unet-hole.safetensors"),
        "hole in the text encoder": (tmp_path / "text-hole.safetensors", teacher, "text-hole.safetensors"),
        "config of other shapes": (file, wider, "shape"),
    }


CASES = [
    "no config", "config only on the Hub", "lora", "no VAE", "no text encoder", "hole in the UNet",
    "hole in the text encoder", "config of other shapes",
]  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_unusable_file_is_named_in_one_line(trainer, shards, unusable, case):
    model, config, words = unusable[case]
    args = trainer.parse_args(flags(model, shards, "unused", teacher_config=config))
    with pytest.raises(trainer.UnusableInput) as error:
        trainer.load_teacher(args, torch.float32, torch.device("cpu"))
    said = str(error.value)
    assert words in said and str(model) in said and "\n" not in said


@pytest.mark.parametrize("case", ["no config", "lora"])
def test_sampler_ends_with_the_same_line(sample, unusable, tmp_path, capfd, case):
    model, config, words = unusable[case]
    args = sampler_args(sample, model, config)
    args.output_dir = tmp_path / "out"
    assert sample.exit_code(sample.main, args) == 2
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and words in said[0] and str(model) in said[0]


@pytest.mark.parametrize(("model", "config"), [("file", "./nowhere"), ("teacher", "teacher")])
def test_sampler_refuses_config_that_is_not_there_or_has_no_file(request, sample, teacher, capsys, model, config):
    config = teacher if config == "teacher" else config
    with pytest.raises(SystemExit) as stop:
        sampler_args(sample, request.getfixturevalue(model), config)
    message = capsys.readouterr().err
    assert stop.value.code == 2 and "--teacher_config" in message and message.count("\n") == 1


def test_the_prediction_type_is_read_from_pickled_files_and_headers_too(script, tmp_path):
    weights = {"model.x": torch.ones(2)}
    torch.save({"state_dict": weights | {"v_pred": torch.zeros(0)}}, tmp_path / "a.ckpt")
    save_file(weights, tmp_path / "a.SAFETENSORS", {"modelspec.prediction_type": "v"})
    save_file(weights, tmp_path / "b.safetensors", {"modelspec.prediction_type": "epsilon"})
    save_file(weights, tmp_path / "c.safetensors", {"modelspec.predict_key": "v"})  # ComfyUI's
    found = {path.name: "v_pred" in script.weight_names(path) for path in tmp_path.iterdir()}
    assert found == {"a.ckpt": True, "a.SAFETENSORS": True, "b.safetensors": False, "c.safetensors": True}
