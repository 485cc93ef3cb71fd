"""scripts/benchmark_inference.py on the tiny teacher; the real architectures' sizes."""

import json
import sys

import pytest
import torch
from conftest import ROOT, SIDE, load_script

sys.path.insert(0, str(ROOT / "scripts"))


@pytest.fixture(scope="module")
def teacher(teachers):
    """Return the folder of the tiny SD 1.5 teacher: nothing here depends on the family."""
    return teachers["train_lcm_lora_sd15"]


@pytest.fixture(scope="module")
def benchmark():
    return load_script("scripts/benchmark_inference.py")


def run(benchmark, teacher, output, *flags):
    usual = ["--pretrained_teacher_model", str(teacher), "--device", "cpu", "--output_json", str(output)]
    args = benchmark.parse_args([*usual, "--lcm_steps", "2", "--steps", "5", "--repeats", "2", *flags])
    assert benchmark.main(args) == 0
    return json.loads(output.read_text())


def test_rows_are_appended_and_tabled(benchmark, teacher, tmp_path, capsys):
    output = tmp_path / "new" / "times.json"
    rows = run(benchmark, teacher, output, "--batch_sizes", "1", "2")
    assert [(r["sampler"], r["steps"], r["batch"]) for r in rows] == [
        ("standard", 5, 1), ("standard", 5, 2), ("lcm-lora", 2, 1), ("lcm-lora", 2, 2)
    ]  # fmt: skip
    assert all(r["seconds"] > 0 and r["peak_gib"] > 0 and r["resolution"] == SIDE for r in rows)
    assert {r["precision"] for r in rows} == {"float32"} and {r["mode"] for r in rows} == {"eager"}
    table = capsys.readouterr().out.strip().splitlines()
    assert len(table) == 4 and f"{rows[1]['seconds'] / rows[3]['seconds']:.1f}" in table[3]
    fused = run(benchmark, teacher, output, "--fuse_lora")
    assert fused[:4] == rows and fused[-1]["sampler"] == "LCM-LoRA, fused"


def test_standard_is_guided_and_the_lora_is_off(benchmark, teacher, tmp_path, monkeypatch):
    seen = []

    def draw(pipe, prompts, steps, guidance, *_args, **_kwargs):
        active = any(not m.disable_adapters for m in pipe.unet.modules() if hasattr(m, "disable_adapters"))
        seen.append((type(pipe.scheduler).__name__, steps, guidance, active, len(prompts)))
        return [], 0.5

    monkeypatch.setattr(benchmark, "draw", draw)
    rows = run(benchmark, teacher, tmp_path / "times.json", "--batch_sizes", "3")
    assert set(seen) == {("DDIMScheduler", 5, 7.5, False, 3), ("LCMScheduler", 2, 1.0, True, 3)}
    assert len(seen) == 6 and rows[0]["seconds"] == 1.5  # 3 runs each; 3 pictures of 0.5 s


@pytest.mark.parametrize(
    ("family", "millions", "lora"),
    [("sd15", 859.520964, 67252224), ("sdxl", 2567.463684, 196751360), ("ssd1b", 1331.334404, 104902656)],
)
def test_random_weights_have_the_real_sizes(benchmark, family, millions, lora):
    from benchmark.real_models import build_unet
    from peft import LoraConfig

    with torch.device("meta"):
        unet = build_unet(family)
        assert sum(p.numel() for p in unet.parameters()) / 1e6 == pytest.approx(millions)
        unet.add_adapter(LoraConfig(r=benchmark.LORA_RANK, target_modules=list(benchmark.LORA_TARGETS)))
    assert sum(p.numel() for name, p in unet.named_parameters() if "lora_" in name) == lora


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ([], "--random_weights"),
        (["--random_weights", "sd15", "--lora", "x/y"], "--lora"),
        (["--random_weights", "sd15", "--batch_sizes", "0"], "--batch_sizes"),
        (["--random_weights", "sd15", "--lcm_steps", "51"], "50"),
        (["--random_weights", "sd15", "--resolution", "100"], "--resolution"),
        (["--pretrained_teacher_model", "./none"], "./none"),
    ],
)
def test_wrong_values_exit_with_2(benchmark, capsys, flags, named):
    with pytest.raises(SystemExit) as stop:
        benchmark.parse_args(flags)
    message = capsys.readouterr().err
    assert stop.value.code == 2 and named in message and message.count("\n") == 1
