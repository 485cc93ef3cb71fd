"""--init_lora: the UNet starts with the output that diffusers gives it with the same LoRA file."""

import json
import re
import shutil

import pytest
import torch
from conftest import finish, flags, one_family
from diffusers import DiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file


def with_lora(script, teacher, rank, alpha, random=False, **changes):
    """Return the teacher's UNet with an adapter, as training makes it; random: as training leaves it."""
    unet = DiffusionPipeline.from_pretrained(teacher).unet
    args = script.parse_args(flags(teacher, "x", "x", lora_rank=rank, lora_alpha=alpha, **changes))
    for number, parameter in enumerate(script.add_lora(unet, args)):
        if random:
            generator = torch.Generator().manual_seed(number)
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return unet


def output(unet, grad=False):
    generator = torch.Generator().manual_seed(0)
    z_t = torch.randn(1, 4, 16, 16, generator=generator)
    text = torch.randn(1, 5, unet.config.cross_attention_dim, generator=generator)
    added = {"text_embeds": torch.ones(1, 12), "time_ids": torch.full((1, 6), 8.0)}
    with torch.set_grad_enabled(grad):
        return unet.eval()(z_t, 499, text, added_cond_kwargs=added).sample


def write(script, unet, keys, folder, alpha):
    """Write a UNet's LoRA with these keys, in float32; return the file."""
    state = {name: value.detach() for name, value in get_peft_model_state_dict(unet).items()}
    config = unet.peft_config["default"].to_dict()
    config |= {"target_modules": sorted(config["target_modules"])}
    path, header = folder / script.WEIGHTS_NAME, None
    if keys == "kohya":
        halves = script.kohya_weights(state, alpha, unet.config.layers_per_block)
        names = {name: name.rpartition(".lora_")[0] for name in state}
        state = {
            key: next(v for n, v in state.items() if v.shape == half.shape and torch.equal(v.half(), half))
            if half.ndim else half
            for key, half in halves.items()
        }  # fmt: skip
        assert len(names) < len(state)
    elif keys == "diffusers":
        header = {"lora_adapter_metadata": json.dumps({f"unet.{name}": value for name, value in config.items()})}
        state = {f"unet.{name}": value for name, value in state.items()}
    else:
        path = folder / "unet" / "adapter_model.safetensors"
        unet.peft_config["default"].save_pretrained(path.parent)
        state = {f"base_model.model.{name}": value for name, value in state.items()}
    save_file(state, path, metadata=header)
    return path


@pytest.mark.parametrize("keys", ["kohya", "diffusers", "peft"])
def test_the_start_is_what_diffusers_makes_of_the_file(script, teacher, keys, tmp_path, capsys):
    trained = with_lora(script, teacher, 4, 7, random=True)
    path = write(script, trained, keys, tmp_path, 7)
    expected = output(trained)
    if keys != "peft":  # pipelines read no folder of PEFT's
        pipe = DiffusionPipeline.from_pretrained(teacher)
        pipe.load_lora_weights(str(path))
        torch.testing.assert_close(output(pipe.unet), expected, rtol=1e-4, atol=1e-4)
    for rank in (4, 7):
        unet = with_lora(script, teacher, rank, 3)
        assert (output(unet) - expected).abs().max() > 0.05
        script.load_init_lora(unet, path if rank == 4 else tmp_path)
        torch.testing.assert_close(output(unet), expected, rtol=1e-4, atol=1e-4)
        assert all(p.dtype == torch.float32 for p in unet.parameters() if p.requires_grad)
    output(unet, grad=True).square().mean().backward()
    up = unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.lora_B["default"].weight
    assert up.grad[:, 4:].abs().min() > 0  # the added ranks are trained
    assert "its rank 4 becomes 7, the --lora_rank" in capsys.readouterr().err


@pytest.mark.parametrize("keys", ["kohya", "diffusers"])
def test_a_larger_rank_is_cut_by_svd(script, teacher, keys, tmp_path):
    trained = with_lora(script, teacher, 8, 5, random=True)
    for name, parameter in trained.named_parameters():
        if "lora_B" in name:
            parameter.data[:, 3:] = 0  # of rank 3 in truth, so that a rank of 3 loses nothing
    write(script, trained, keys, tmp_path, 5)
    unet = with_lora(script, teacher, 3, 4)
    script.load_init_lora(unet, tmp_path)
    torch.testing.assert_close(output(unet), output(trained), rtol=2e-3, atol=2e-3)


def test_the_alpha_of_each_layer_counts(script, teacher, tmp_path):
    trained = with_lora(script, teacher, 4, 8, random=True)
    path = write(script, trained, "kohya", tmp_path, 8)
    state = load_file(path)
    for name in [name for name in state if name.endswith(".alpha")][::2]:
        up = name.replace("alpha", "lora_up.weight")
        state |= {name: torch.tensor(2.0), up: state[up] * 4}
    save_file(state, path)
    unet = with_lora(script, teacher, 4, 4)
    script.load_init_lora(unet, path)
    torch.testing.assert_close(output(unet), output(trained), rtol=1e-4, atol=1e-4)


@one_family
def test_a_config_beside_counts_for_pefts_file_alone(script, teacher, tmp_path):
    trained = with_lora(script, teacher, 4, 4, random=True)
    path = write(script, trained, "diffusers", tmp_path, 4)
    save_file(load_file(path), path)  # without a header, as many are
    config = {"r": 4, "lora_alpha": 8, "alpha_pattern": None}  # of another LoRA
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    for name, strength in (("style.safetensors", 1), (script.WEIGHTS_NAME, 1), ("adapter_model.safetensors", 2)):
        loras = script.read_lora(path.rename(tmp_path / name))
        path = tmp_path / name
        assert {one.alpha / len(one.down) for one in loras.values()} == {strength}, name
    state = {name.replace("unet.", "unet.base_model.model."): value for name, value in load_file(path).items()}
    save_file(state, tmp_path / script.WEIGHTS_NAME)  # as diffusers' LCM scripts write them: the config is theirs
    (tmp_path / "unet_lora").mkdir()
    for text, strength in ((json.dumps(config), 2), ('{"lora_alpha": null}', 1)):
        (tmp_path / "adapter_config.json").write_text(text)
        loras = script.read_lora(tmp_path / script.WEIGHTS_NAME)
        assert {one.alpha / len(one.down) for one in loras.values()} == {strength}
        path = shutil.copy(tmp_path / script.WEIGHTS_NAME, tmp_path / "unet_lora")  # and there it is one folder above
        loras = script.read_lora(path)
        assert {one.alpha / len(one.down) for one in loras.values()} == {strength}


@one_family
def test_the_original_block_names_tell_the_layers_of_a_block(script, tmp_path):
    for layers, several in ((1, ("3_1_a 5_1_a", "2_0_op 3_1_a", "4_0_op")), (2, ("6_0_op", "4_1_a 8_1_a", "8_1_a"))):
        for blocks in several:
            state = {}
            for name in blocks.split():
                key = f"lora_unet_input_blocks_{name}".replace("_a", "_transformer_blocks_0_attn1_to_q")
                shape = (1, 1) if "op" in name else ()
                state |= {f"{key}.lora_down.weight": torch.ones(2, 4, *shape)}
                state |= {f"{key}.lora_up.weight": torch.ones(4, 2, *shape), f"{key}.alpha": torch.tensor(1.0)}
            save_file(state, tmp_path / "a.safetensors")
            found = script.read_lora(tmp_path / "a.safetensors").keys()
            assert found == script.read_lora(tmp_path / "a.safetensors", layers).keys(), blocks


@pytest.mark.parametrize("keys", ["diffusers", "peft"])
def test_rank_patterns_alpha_patterns_and_rslora_count(script, teacher, keys, tmp_path):
    trained = DiffusionPipeline.from_pretrained(teacher).unet
    config = LoraConfig(
        r=4, lora_alpha=8, use_rslora=True, target_modules=["to_q", "to_k", "conv1"], init_lora_weights=False,
        rank_pattern={"to_q": 6}, alpha_pattern={"to_q": 3, "up_blocks.0.resnets.0.conv1": 1},
    )  # fmt: skip
    trained.add_adapter(config)
    path = write(script, trained, keys, tmp_path, None)
    unet = with_lora(script, teacher, 6, 4)
    assert (output(unet) - output(trained)).abs().max() > 0.01
    script.load_init_lora(unet, path)
    torch.testing.assert_close(output(unet), output(trained), rtol=1e-4, atol=1e-4)


TEXT_LAYER = {
    f"lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_{part}.weight": torch.ones(4, 4)
    for part in ("down", "up")
}


def test_what_does_not_fit_is_named(script, teacher, tmp_path):
    path = write(script, with_lora(script, teacher, 4, 8, random=True), "kohya", tmp_path, 8)
    good = load_file(path)
    attention = with_lora(script, teacher, 4, 4, lora_target_modules="to_q")
    with pytest.raises(script.UnusableInput, match="layers do not fit, such as .*--lora_target_modules"):
        script.load_init_lora(attention, path)
    unet = with_lora(script, teacher, 4, 4)
    key = next(name for name in good if "attn2_to_k.lora_down" in name)
    for content, named in (
        (good | {key: torch.zeros(4, 99)}, r": 1 of \d+ layers do not fit, such as .*attn2.to_k \(99 x "),
        (good | {"lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.zeros(1)}, "lora_te"),
        (good | {key.replace("lora_down.weight", "dora_scale"): torch.zeros(1)}, "LoRA of a UNet"),
        (good | TEXT_LAYER, "LoRA of a UNet alone .*text_encoder"),
        (good | {key.replace("lora_down", "lora_up"): torch.zeros(3)}, "LoRA of a UNet"),
        (good | {key: torch.tensor(1.0)}, "LoRA of a UNet"),
        ({name: value for name, value in good.items() if "up.weight" not in name}, "LoRA of a UNet"),
        ({"conv_in.weight": torch.zeros(1)}, "conv_in.weight"),
        (good | {key: torch.full_like(good[key], float("nan"))}, "not finite"),
        (good | {key: good[key][:0], key.replace("down", "up"): torch.zeros(4, 0)}, "LoRA of a UNet"),
        ({name: value.to(torch.float8_e4m3fn) for name, value in good.items()}, None),
        ({}, "LoRA of a UNet"),
        (b"", script.WEIGHTS_NAME),
        (None, script.WEIGHTS_NAME),
    ):
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content) if isinstance(content, bytes) else save_file(content, path)
        if named is None:
            script.load_init_lora(unet, path)
            continue
        with pytest.raises(script.UnusableInput, match=named) as error:
            script.load_init_lora(unet, path)
        assert "\n" not in str(error.value)


@one_family
def test_a_run_starts_from_the_lora(script, teacher, shards, tmp_path):
    trained = with_lora(script, teacher, 4, 8, random=True)
    cached = tmp_path / "cache" / "models--owner--released"  # as huggingface_hub keeps what it has downloaded
    (cached / "snapshots" / "0123").mkdir(parents=True)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0123")
    path = write(script, trained, "kohya", cached / "snapshots" / "0123", 8)
    options = {"max_train_steps": 1, "learning_rate": 1e-12, "cache_dir": tmp_path / "cache", "validation_steps": 9}
    finish(script, flags(teacher, shards, tmp_path / "run", init_lora="owner/released", **options), tmp_path / "said")
    started = load_file(tmp_path / "run" / script.WEIGHTS_NAME)
    for name, value in load_file(path).items():
        torch.testing.assert_close(started[name], value.half(), rtol=1e-3, atol=1e-4)
    first, last = ((tmp_path / "run" / "validation" / f"step-000000{n}.png").read_bytes() for n in (0, 1))
    assert first == last, "the first is what the run starts from, and a rate of 1e-12 changes nothing"
    path.unlink()  # its checkpoint is all that a resumed run needs
    line = flags(teacher, shards, tmp_path / "run", init_lora="owner/released", **options | {"max_train_steps": 2})
    assert any("resuming from" in text for text in finish(script, line, tmp_path / "said"))
    assert len(list((tmp_path / "run" / "validation").glob("*.png"))) == 3
    for name, reason in (tmp_path / "none", "no such file or folder"), ("owner/none", "Hub id.*network"):
        line = flags(teacher, shards, tmp_path / "other", init_lora=name, **options)
        said = finish(script, line, tmp_path / f"said {reason}", expected=2)
        assert re.search(f"^error: --init_lora .*none.*{reason}", said[-1]) and "loading the models" not in said
