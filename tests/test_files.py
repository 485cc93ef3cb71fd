"""What a run leaves: the LoRA file, model card, record, upload; whose files can be read by others."""

import ast
import copy
import json
import logging
import os
import stat
from importlib.metadata import version
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import yaml
from conftest import FAMILIES, SCRIPTS, flags, load_script
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from huggingface_hub.utils import filter_repo_objects
from peft import PeftModel
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

PIPELINES = {
    "train_lcm_lora_sd15": StableDiffusionPipeline, "train_lcm_lora_sdxl": StableDiffusionXLPipeline
}  # fmt: skip
TAGS = {
    "train_lcm_lora_sd15": {"stable-diffusion", "stable-diffusion-diffusers"},
    "train_lcm_lora_sdxl": {"stable-diffusion-xl", "stable-diffusion-xl-diffusers"},
}
TOKEN = "hf_secretSECRETsecretSECRET"
BLOCKS = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",), ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
XL = {
    "sample_size": 128, "block_out_channels": (320, 640, 1280), "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": [1, 2, 10], "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048, "use_linear_projection": True, "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip
SSD_1B = XL | {
    "transformer_layers_per_block": [1, [2, 2], [4, 4]], "mid_block_type": "UNetMidBlock2D",
    "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1],
}  # fmt: skip
# Script, released model's UNet config, its parameters, its LoRA's modules and parameters at rank 64.
RELEASED = {
    "SD 1.5": (
        SCRIPTS[0],
        {
            "sample_size": 64, "block_out_channels": (320, 640, 1280, 1280), "layers_per_block": 2,
            "down_block_types": BLOCKS[0], "up_block_types": BLOCKS[1], "cross_attention_dim": 768,
            "attention_head_dim": 8,
        },
        859_520_964, 278, 67_252_224,
    ),
    "SDXL": (SCRIPTS[1], XL, 2_567_463_684, 788, 196_751_360),
    "SSD-1B": (SCRIPTS[1], SSD_1B, 1_331_334_404, 423, 104_902_656),
}  # fmt: skip


both_families = pytest.mark.parametrize("script", SCRIPTS, ids=FAMILIES, indirect=True)


@pytest.fixture(scope="module")
def script(request):
    """The SD 1.5 script, unless a test names another."""
    return load_script(getattr(request, "param", SCRIPTS[0]))


@pytest.fixture
def args(script, teacher, shards, tmp_path):
    return script.parse_args(flags(teacher, shards, tmp_path / "run"))


@pytest.fixture(scope="module")
def fresh(script, teacher):
    """Return a function that gives the teacher's pipeline as a user has it after loading."""
    original = PIPELINES[script.__name__].from_pretrained(teacher)
    return lambda: copy.deepcopy(original)


def train_lora(script, unet, args, seed=1):
    """Add a LoRA with random weights, as training would leave it."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in script.add_lora(unet, args):
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return unet


@pytest.fixture
def trained(script, fresh, args, tmp_path):
    """Return (UNet with a LoRA of alpha != rank, folder with its file)."""
    pipe = fresh()
    train_lora(script, pipe.unet, args)
    (tmp_path / "run").mkdir()
    script.save_lora(pipe.unet, tmp_path / "run" / script.WEIGHTS_NAME, args)
    return pipe.unet, tmp_path / "run"


def inputs_of(unet):
    """Return fixed inputs of a UNet of either family."""
    generator, config = torch.Generator().manual_seed(0), unet.config
    z_t = torch.randn(2, 4, 8, 8, generator=generator)
    text = torch.randn(2, 5, config.cross_attention_dim, generator=generator)
    inputs = {"sample": z_t, "timestep": torch.tensor([19, 999]), "encoder_hidden_states": text}
    if config.addition_embed_type:
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        time_ids = torch.tensor([[40.0, 50, 1, 2, 32, 32]]).repeat(2, 1)
        text_embeds = torch.randn(2, pooled, generator=generator)
        inputs["added_cond_kwargs"] = {"text_embeds": text_embeds, "time_ids": time_ids}
    return inputs


def output(unet):
    """Return a UNet's output at fixed inputs."""
    with torch.no_grad():
        return unet.eval()(**inputs_of(unet)).sample


def count_lora_layers(unet):
    """Return how many linear and convolution layers have a LoRA."""
    layers = [m.get_base_layer() for m in unet.modules() if hasattr(m, "lora_A")]
    return [sum(isinstance(layer, kind) for layer in layers) for kind in (torch.nn.Linear, torch.nn.Conv2d)]


@pytest.mark.parametrize("model", RELEASED)
def test_released_models_get_the_known_lora(model):
    name, config, num_unet, num_modules, num_lora = RELEASED[model]
    script = load_script(name)
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
        assert sum(p.numel() for p in unet.parameters()) == num_unet
        parameters = script.add_lora(unet, script.parse_args(flags("owner/name", "pipe:", "x", lora_rank=64)))
    assert sum(p.numel() for p in parameters) == num_lora
    assert sum(count_lora_layers(unet)) == num_modules and len(parameters) == 2 * num_modules
    assert {p.dtype for p in parameters} == {torch.float32}


def test_a_target_that_matches_nothing_is_refused(script, fresh, args):
    args.lora_target_modules = "to_q,to_w"
    with pytest.raises(script.UnusableInput, match="--lora_target_modules.*'to_w'"):
        script.add_lora(fresh().unet, args)


@pytest.fixture
def warnings_of_libraries(caplog):
    """Collect what diffusers and peft warn of in their logs."""
    loggers = [logging.getLogger(name) for name in ("diffusers", "peft")]
    verbosity = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_warning()
    for logger in loggers:
        logger.addHandler(caplog.handler)
    yield caplog
    for logger in loggers:
        logger.removeHandler(caplog.handler)
    diffusers_logging.set_verbosity(verbosity)


@both_families
def test_the_file_loads_into_a_fresh_pipeline(trained, fresh, warnings_of_libraries, recwarn):
    """Every layer, with alpha unlike the rank, to the rounding of float16, and without a warning."""
    unet, folder = trained
    pipe = fresh()
    before = output(pipe.unet)
    recwarn.clear()
    pipe.load_lora_weights(folder, adapter_name="lcm")
    warned = [str(w.message) for w in recwarn] + [r.message for r in warnings_of_libraries.records]
    # diffusers reports of every LoRA without text encoder weights that it has none.
    assert [text for text in warned if not text.startswith("No LoRA keys associated to CLIP")] == []
    assert count_lora_layers(pipe.unet) == count_lora_layers(unet) and min(count_lora_layers(unet)) > 0
    torch.testing.assert_close(output(pipe.unet), output(unet), rtol=2e-3, atol=2e-3)
    assert (output(pipe.unet) - before).abs().max() > 0.1


def test_a_lora_trained_with_dropout_draws_without(script, fresh, args, tmp_path):
    args.lora_dropout, pipe, user = 0.5, fresh(), fresh()
    script.save_lora(train_lora(script, pipe.unet, args), tmp_path / script.WEIGHTS_NAME, args)
    user.load_lora_weights(tmp_path)
    with torch.no_grad():  # diffusers leaves new layers in training mode
        first, second = (user.unet(**inputs_of(user.unet)).sample for _ in range(2))
    assert torch.equal(first, second)


@both_families
def test_the_file_has_kohyas_three_tensors_a_module(script, trained):
    """As the released LCM-LoRAs: ComfyUI and Forge take half of the layers by other names, and no alpha."""
    unet, folder = trained
    assert {path.name for path in folder.iterdir()} == {script.WEIGHTS_NAME}
    state = load_file(folder / script.WEIGHTS_NAME)
    modules = {name.partition(".")[0] for name in state}
    assert len(modules) == sum(count_lora_layers(unet))
    sides = ("lora_down.weight", "lora_up.weight", "alpha")
    assert set(state) == {f"{module}.{side}" for module in modules for side in sides}
    assert {tensor.dtype for tensor in state.values()} == {torch.float16}
    assert {v.item() for name, v in state.items() if name.endswith("alpha")} == {8.0}
    place = {"train_lcm_lora_sd15": "mid_block_attentions_0", "train_lcm_lora_sdxl": "middle_block_1"}
    assert f"lora_unet_{place[script.__name__]}_transformer_blocks_0_attn1_to_out_0" in modules


def merged(base, loras):
    """Return a UNet with PEFT states merged by hand: W + weight * alpha / rank * B @ A."""
    unet = copy.deepcopy(base)
    for state, weight, alpha in loras:
        for name in (n for n in state if n.endswith(".lora_A.weight")):
            down, up = state[name], state[name.replace("lora_A", "lora_B")]
            delta = weight * alpha / len(down) * (up.flatten(1) @ down.flatten(1))
            target = unet.get_submodule(name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")).weight
            target.data += delta.view_as(target)
    return unet


def test_set_adapters_with_a_style_lora_is_the_weighted_sum(script, trained, fresh, args, tmp_path):
    lcm, style, pipe = trained[1], tmp_path / "style", fresh()
    style.mkdir()
    script.save_for_peft(trained[0], tmp_path / "peft-lcm")
    args.lora_rank, args.lora_alpha = 2, 3.0
    second = train_lora(script, fresh().unet, args, seed=2)
    script.save_lora(second, style / script.WEIGHTS_NAME, args)
    script.save_for_peft(second, tmp_path / "peft-style")
    states = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("peft-lcm", "peft-style")]
    expected = output(merged(pipe.unet, [(states[0], 1.0, 8), (states[1], 0.8, 3)]))
    pipe.load_lora_weights(lcm, adapter_name="lcm")
    pipe.load_lora_weights(style, adapter_name="style")
    pipe.set_adapters(["lcm", "style"], [1.0, 0.8])
    torch.testing.assert_close(output(pipe.unet), expected, rtol=2e-3, atol=2e-3)


def test_peft_users_can_load_a_checkpoint(script, trained, fresh, tmp_path):
    unet, folder = trained[0], tmp_path / "peft"
    script.save_for_peft(unet, folder)
    loaded = PeftModel.from_pretrained(fresh().unet, folder)
    assert count_lora_layers(loaded) == count_lora_layers(unet)
    torch.testing.assert_close(output(loaded), output(unet), rtol=1e-6, atol=1e-6)


# Card, record, upload


PROMPTS = ('sea: at "dawn"', "a 'quiet' lake\nby night")


def write_card(script, args, prompts=PROMPTS, drawn=True, config=None):
    """Write a card as the end of a run does and return (front matter, text)."""
    pictures = [Image.new("RGB", (8, 8)) for _ in prompts]
    script.Path(args.output_dir).mkdir(exist_ok=True)
    state = SimpleNamespace(repository="")
    accelerator = SimpleNamespace(num_processes=1, mixed_precision="bf16")
    job = SimpleNamespace(args=args, prompts=list(prompts), accelerator=accelerator, state=state, max_train_steps=7)
    job.teacher_pictures = [Image.new("RGB", (8, 8), (3, 0, 0)) for _ in prompts]
    (script.Path(args.output_dir) / f"image_{2 * drawn}.png").touch()  # of a run with more prompts
    job.schedule = SimpleNamespace(prediction_type=args.prediction_type or "epsilon")
    job.pipe = type("StableDiffusionPipeline", (), {})()
    job.pipe.scheduler = SimpleNamespace(config={"prediction_type": job.schedule.prediction_type} | (config or {}))
    script.write_card(job, {1: pictures, 4: pictures} if drawn else {})
    text = (script.Path(args.output_dir) / "README.md").read_text()
    return yaml.safe_load(text.split("---\n")[1]), text


@both_families
def test_card_of_a_hub_teacher(script, args):
    args.pretrained_teacher_model, args.hub_token, args.prediction_type = "owner/teacher", TOKEN, "v_prediction"
    script.Path(args.output_dir).mkdir(exist_ok=True)
    (script.Path(args.output_dir) / "image_mine.png").touch()  # the user's
    front, text = write_card(script, args)
    assert front["base_model"] == "owner/teacher" and front["library_name"] == "diffusers"
    assert front["pipeline_tag"] == "text-to-image"
    expected = {"text-to-image", "diffusers", "diffusers-training", "lora", "lcm-lora", "template:sd-lora"}
    assert expected | TAGS[script.__name__] == set(front["tags"])
    assert [entry["output"]["url"] for entry in front["widget"]] == ["image_0.png", "image_1.png"]
    assert front["widget"][1]["text"] == "a 'quiet' lake\nby night"
    assert all((script.Path(args.output_dir) / f"image_{n}.png").is_file() for n in (0, 1))
    found = {path.name for path in script.Path(args.output_dir).glob("image_*")}
    assert found == {"image_0.png", "image_1.png", "image_mine.png"}
    assert "config, prediction_type='v_prediction')" in text
    told = {"rescale_betas_zero_snr": True, "clip_sample": True, "thresholding": True}  # by a file's keys; of pixels
    options = "clip_sample=False, thresholding=False, prediction_type='v_prediction', rescale_betas_zero_snr=True)"
    assert options in write_card(script, args, config=told)[1]
    assert "LCMScheduler" in text and "<Gallery />" in text and "| lora_alpha | 8.0 |" in text
    assert (
        "| loss_type | huber |" in text and "| max_train_steps | 7 |" in text and "| mixed_precision | bf16 |" in text
    )
    assert "difference" not in text and "| processes | 1 |" in text and "init_lora" not in text
    assert "guidance_scale=1.0, width=32, height=32).images[0]" in text and "Pictures: 4 steps" in text
    gone = "a local LoRA"
    for source, told in (
        ("owner/lora", "owner/lora"),
        (args.output_dir, gone),
        ("/me/x", gone),
        ("me/x.safetensors", gone),
    ):
        args.init_lora, args.resolution = source, script.DEFAULT_RESOLUTION_PX
        text = write_card(script, args)[1]
        assert f"| init_lora | {told} |" in text and "guidance_scale=1.0).images[0]" in text
    args.phases, compared = 2, "the pictures from the teacher's 50 steps, guidance 7.5"
    assert f"| mean difference of {compared} | 1.0, 1.0 of 255 at 1, 4 steps |" in write_card(script, args)[1]
    args.phases = 1
    args.objective = "matching"  # whose fake has a rate by default, which is no flag's
    assert "| student_eta | 0.3 |" in write_card(script, args)[1] and "| None |" not in write_card(script, args)[1]
    ast.parse(text.partition("```python\n")[2].partition("```")[0])


def test_card_without_pictures_has_no_gallery_of_them(script, args):
    front, text = write_card(script, args, drawn=False)
    assert not front.get("widget") and not list(script.Path(args.output_dir).glob("image_*"))
    assert "difference" not in text and "Sampler: LCM. Pictures: none." in text
    assert "draws in 2 to 8 steps." in text and "num_inference_steps=4," in text
    assert "\n# LCM-LoRA\n" in text
    args.phases = 2
    _, text = write_card(script, args, drawn=False)
    for words in ("DDIM with eta 0 in diffusers, elsewhere Euler, SGM Uniform.", "\n# LoRA of few steps\n"):
        assert words in text, "a title with LCM in it would be taken for the sampler"
    assert "timestep_spacing='trailing'" in text and "DDIMScheduler.from_config" in text
    assert "set_alpha_to_one=True" in text, "a default, which the teacher's config may contradict"
    assert 'load_lora_weights("PATH/TO/THIS/FOLDER"' in text, "a bare name is a Hub id"


def test_card_of_a_local_teacher_names_no_path_and_passes_on_its_license(
    script, args, teacher, shards, tmp_path, monkeypatch
):
    args.hub_token = TOKEN
    front, text = write_card(script, args)
    assert not front.get("base_model") and not front.get("license")
    for secret in (TOKEN, str(teacher), shards, str(tmp_path), "/tmp", "/home"):
        assert secret not in text
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "README.md").write_text("---\nlicense: creativeml-openrail-m\n---\n# teacher\n")
    args.pretrained_teacher_model = str(tmp_path / "teacher")
    assert write_card(script, args)[0]["license"] == "creativeml-openrail-m"
    args.pretrained_teacher_model = str(tmp_path / "teacher" / "README.md")  # a single file
    for config, given in ((None, ""), ("owner/ssd", ', config="owner/ssd"'), (str(tmp_path), ', config="ITS-CONFIG"')):
        args.teacher_config = config
        assert f'StableDiffusionPipeline.from_single_file("THE-TEACHER"{given}, ' in write_card(script, args)[1]
    args.teacher_config = None
    monkeypatch.setattr(script, "create_repo", mock.Mock(side_effect=ImportError("socksio is not installed")))
    with pytest.raises(script.UnusableInput, match="socksio is not installed; install it"):
        script.make_repository(args)
    monkeypatch.undo()
    args.hub_model_id = "my run (v1)"
    with pytest.raises(script.UnusableInput, match="my run .v1. cannot be made.*; give --hub_model_id OWNER/NAME"):
        script.make_repository(args)
    monkeypatch.setattr(script, "hf_hub_download", lambda *_, **__: tmp_path / "teacher" / "README.md")
    args.pretrained_teacher_model = "owner/teacher"
    assert write_card(script, args)[0]["license"] == "creativeml-openrail-m"


def write_record(script, args):
    """Write the record of a run and return the config and the options that its tracker got."""
    configs = []
    accelerator = SimpleNamespace(init_trackers=lambda _project, *given: configs.append(given))
    state = script.RunState()
    script.open_output(args, state)
    state.lock.release()
    script.start_trackers(args, accelerator)
    return configs[0]


def test_the_token_is_in_no_record(script, args, trained):
    args.hub_token = TOKEN
    args.train_shards_path_or_url = [f"https://me:{TOKEN}@host/0.tar", f"pipe:curl -H 'Authorization: {TOKEN}' x.tar"]
    config, options = write_record(script, args)
    assert os.environ["SWANLAB_PROBE_RUNTIME"] == "false", "it would record the process's command line"
    kept = {"dir": str(script.Path(args.output_dir) / "dvclive"), "resume": True}
    assert options == {"wandb": {"dir": args.output_dir}, "dvclive": kept}
    write_card(script, args)
    script.save_for_peft(trained[0], trained[1] / "unet")
    record = json.loads((trained[1] / "args.json").read_text())
    flag_names = set(vars(args)) - {"hub_token"}
    assert set(record) == flag_names and flag_names <= set(config)
    assert record["learning_rate"] == config["learning_rate"] == 1e-3
    assert all(isinstance(value, (int, float, str, bool)) for value in config.values())
    assert TOKEN not in json.dumps(config)
    settings = script.settings_of(args, SimpleNamespace(num_processes=1, mixed_precision="no"), 4, [], 0)
    assert TOKEN not in json.dumps(settings)
    for path in trained[1].rglob("*"):
        assert path.is_dir() or TOKEN.encode() not in path.read_bytes(), path


@both_families
def test_the_header_names_rank_alpha_and_model_and_no_path(script, trained, teacher, args, tmp_path):
    with safe_open(trained[1] / script.WEIGHTS_NAME, framework="pt") as file:
        metadata = file.metadata()
    header = json.dumps(metadata)
    assert all(secret not in header for secret in (str(teacher), str(tmp_path), "/tmp", args.output_dir))
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("4", "8.0")
    assert metadata.items() >= script.kohya_model(16).items() and metadata["ss_network_module"] == "networks.lora"


def test_versions_and_script_are_in_the_record(script, args):
    config, _ = write_record(script, args)
    folder = script.Path(args.output_dir)
    versions = json.loads((folder / "versions.json").read_text())
    assert versions["torch"] == config["version/torch"] == version("torch")
    copied = folder / script.Path(script.__file__).name
    assert copied.read_bytes() == script.Path(script.__file__).read_bytes()


def test_push_uploads_lora_pictures_and_card_only(script, args, trained, monkeypatch):
    folder, uploads, made = trained[1], [], []
    write_card(script, args)
    write_record(script, args)
    script.save_for_peft(trained[0], folder / "checkpoint-4" / "unet")
    script.save_lora(trained[0], folder / "checkpoint-4" / script.WEIGHTS_NAME, args)
    for name in ("log.jsonl", "logs/events.out", "validation/step-4.png", "checkpoint-4/image_0.png", "wandb/a.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("x")

    def create_repo(name, **options):
        made.append((name, options["private"]))
        return SimpleNamespace(repo_id=f"me/{name}")

    monkeypatch.setattr(script, "create_repo", create_repo)
    monkeypatch.setattr(script, "upload_folder", lambda **options: uploads.append(options))
    args.hub_token = TOKEN
    script.push(args, folder)
    assert uploads[0]["repo_id"] == "me/run" and uploads[0]["token"] == TOKEN and made == [("run", True)]
    files = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    sent = filter_repo_objects(files, allow_patterns=uploads[0]["allow_patterns"])
    # fnmatch's * also matches "/"
    assert set(sent) == {script.WEIGHTS_NAME, "README.md", "image_0.png", "image_1.png"} and len(files) > 10
    args.hub_public_repo = True
    script.make_repository(args)
    assert made[-1] == ("run", False)
    error = script.HfHubHTTPError("busy", response=mock.Mock(status_code=429))
    monkeypatch.setattr(script, "create_repo", mock.Mock(side_effect=error))
    assert script.make_repository(args) == "run", "a Hub that is busy is tried again at the end"


@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_every_file_follows_the_umask(script, args, trained, umask):
    """safetensors writes files that only their owner can read; a group's folder or a container needs them."""
    before = os.umask(umask)
    try:
        write_record(script, args)
        write_card(script, args)
        script.save_lora(trained[0], trained[1] / script.WEIGHTS_NAME, args)
        script.save_for_peft(trained[0], trained[1] / "unet")
        script.write_atomically(trained[1] / "text", "x")
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in trained[1].rglob("*") if path.is_file()}
    assert len(modes) > 8 and {mode & 0o777 for name, mode in modes.items() if name != ".lock"} == {0o666 & ~umask}, (
        modes
    )
