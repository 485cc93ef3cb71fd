"""scripts/evaluate.py: the statistics, the pictures kept and resumed, the judges' interfaces, the report."""

import argparse
import base64
import html.parser
import importlib.util
import io
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import types
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
from conftest import ROOT, cases, load_script, write_shard
from diffusers import StableDiffusionPipeline
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(ROOT / "scripts"))
from lib import pipelines
from lib.evaluation.measures import score_row
from lib.trainers import UnusableInput, exit_code, sd15

YARDSTICK = str(ROOT / "assets" / "demo-teacher-sd15" / "reference.safetensors")
PROMPTS = ["a red hill", "the <sea> & more", "snow"]
COUNT = 7
FEATURES = """
import torch

def load(device):
    weight = torch.randn(12, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    def features(pictures):
        assert pictures.dtype == torch.uint8 and pictures.shape[-1] == 3
        cells = torch.nn.functional.adaptive_avg_pool2d(pictures.permute(0, 3, 1, 2).double() / 255, 2)
        return cells.flatten(1) @ weight
    return features
"""
CLIP = """
def load(device):
    return lambda pictures, prompts: pictures.double().mean((1, 2, 3)) + 1000 * (
        __import__("torch").tensor([float(len(p)) for p in prompts])
    )
"""


@pytest.fixture(scope="module")
def teacher(teachers):
    """Return the folder of the tiny SD 1.5 teacher: nothing here depends on the family."""
    return teachers["train_lcm_lora_sd15"]


@pytest.fixture(scope="module")
def evaluate():
    return load_script("scripts/evaluate.py")


@pytest.fixture(scope="module")
def judges(tmp_path_factory):
    """Return a folder with stand-ins of a feature model and CLIP score, and two random LoRAs."""
    folder = tmp_path_factory.mktemp("judges")
    for name, text in (("mean", FEATURES), ("clip", CLIP)):
        (folder / f"{name}.py").write_text(text)
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    return folder


@pytest.fixture(scope="module")
def lora(teacher, judges):
    """Write a random LoRA of the tiny teacher and return its folder."""
    pipe = StableDiffusionPipeline.from_pretrained(teacher)
    torch.manual_seed(1)
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "conv1"], init_lora_weights=False))
    layers = get_peft_model_state_dict(pipe.unet)
    StableDiffusionPipeline.save_lora_weights(judges / "lora", unet_lora_layers=layers)
    return judges / "lora"


def load(model, **flags):
    """Return the pipeline of a model on the CPU, in float32 where --mixed_precision is not given."""
    return pipelines.load_teacher(argparse.Namespace(pretrained_teacher_model=str(model), **flags), "cpu")


def run(evaluate, line):
    """Return the exit code of the tool."""
    return exit_code(evaluate.main, evaluate.parse_args(line))


def flags(teacher, judges, output_dir, *more):
    return [
        "--pretrained_teacher_model", str(teacher), "--prompts_file", str(judges / "prompts.txt"),
        "--lora", str(judges / "lora"), "--output_dir", str(output_dir), "--num_images", str(COUNT),
        "--steps", "1", "2", "--teacher_steps", "3", "--batch_size", "2", "--shown", "2",
        "--features", str(judges / "mean.py"), "--clip_model", str(judges / "clip.py"),
        *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def evaluated(evaluate, teacher, judges, lora, tmp_path_factory):
    """Return (folder, results) of a run with every sampler."""
    assert lora.is_dir()
    folder = tmp_path_factory.mktemp("evaluated")
    assert run(evaluate, flags(teacher, judges, folder)) == 0
    return folder, json.loads((folder / "results.json").read_text())


def features_of(folder, row, judges):
    model = {}
    exec((judges / "mean.py").read_text(), model)
    pictures = [np.asarray(Image.open(folder / "pictures" / row / f"{i:05d}.png")) for i in range(COUNT)]
    return model["load"]("cpu")(torch.from_numpy(np.stack(pictures)))


def fid_by_sqrtm(a, b):
    """The textbook's formula with scipy's matrix root."""
    cov_a, cov_b = np.cov(a.T), np.cov(b.T)
    root = scipy.linalg.sqrtm(cov_a @ cov_b)
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a + cov_b - 2 * root.real)


@pytest.mark.parametrize(("n", "m", "width"), [(300, 200, 16), (60, 80, 32), (2, 50, 3)])
def test_frechet_distance_is_the_textbooks(n, m, width):
    from lib.evaluation.statistics import frechet_distance

    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(n, width)) * rng.uniform(0.1, 3, width), rng.normal(0.3, 1.5, (m, width))
    distance = frechet_distance(torch.from_numpy(a), torch.from_numpy(b))
    if n > width:  # else scipy takes the root of a singular matrix
        assert distance == pytest.approx(fid_by_sqrtm(a, b), rel=1e-6)
    assert frechet_distance(torch.from_numpy(b), torch.from_numpy(a)) == pytest.approx(distance, rel=1e-9)
    same = torch.from_numpy(a)
    assert abs(frechet_distance(same, same.clone())) < 1e-10 * same.square().sum()
    assert abs(frechet_distance(same, same + 2.0) - 4 * width) < 1e-8 * width


def test_interval_of_the_distance_is_as_wide_as_its_spread_and_holds_it():
    from lib.evaluation.statistics import GROUPS, T_95, frechet_distance, jackknife

    assert pytest.approx(scipy.stats.t.ppf(0.975, GROUPS - 1), abs=1e-3) == T_95

    generator = torch.Generator().manual_seed(0)
    found = [jackknife(frechet_distance, *torch.randn(2, 100, 6, generator=generator).double()) for _ in range(40)]
    spread = np.std([f["value"] for f in found])
    claimed = np.mean([(f["high"] - f["low"]) / 2 / T_95 for f in found])
    assert 0.8 < claimed / spread < 1.7, (claimed, spread)
    middle = np.mean([f["value"] for f in found])
    assert np.mean([f["low"] < middle < f["high"] for f in found]) > 0.85
    assert jackknife(frechet_distance, *torch.randn(2, 30, 6))["low"] is None  # too few for 20 groups


def test_interval_of_a_mean():
    from lib.evaluation.statistics import bootstrap_mean

    values = torch.randn(400, generator=torch.Generator().manual_seed(0)) + 5
    figure = bootstrap_mean(values)
    assert figure["value"] == pytest.approx(values.mean().item(), rel=1e-6)
    assert (figure["high"] - figure["low"]) / 2 == pytest.approx(1.96 * values.std().item() / 20, rel=0.15)
    assert bootstrap_mean(values) == figure


def test_rows_and_figures(evaluated, judges):
    folder, results = evaluated
    rows = {(row["sampler"], row["steps"]): row for row in results["rows"][1:]}
    samplers = ("ddim", "dpmsolver", "dpmsolver++", "lcm-lora", "lcm-without-lora")
    assert set(rows) == {(s, n) for s in samplers for n in (1, 2)}
    for (sampler, steps), row in rows.items():
        guided = not sampler.startswith("lcm")
        assert row["evaluations"] == steps * (1 + guided)
        assert row["guidance"] == (7.5 if guided else 1.0)
        figures = row["figures"]
        assert row["name"].startswith(f"{sampler}-guidance")
        mine, yardstick = features_of(folder, row["name"], judges), features_of(folder, "reference", judges)
        expected = fid_by_sqrtm(mine.numpy(), yardstick.numpy())
        assert figures["FD/mean/teacher"]["value"] == pytest.approx(expected, rel=1e-6)
        assert figures["FD/mean/teacher"]["low"] is None  # 7 pictures
        assert figures["seconds"]["value"] > 0
        assert figures["clip_score"]["low"] < figures["clip_score"]["value"] < figures["clip_score"]["high"]
    assert rows["lcm-lora", 2]["figures"] != rows["lcm-without-lora", 2]["figures"]
    took = [{"block": 0, "seconds": 0.1}] * 8 + [{"block": 8, "seconds": 0.9}]  # the last block is smaller
    assert score_row({}, {}, took)["seconds"]["value"] == pytest.approx(0.1)
    floor = results["rows"][0]
    assert floor["name"] == "teacher" and floor["steps"] == 3


def test_scores_compare_the_right_pictures(evaluated):
    folder, results = evaluated
    row = next(r for r in results["rows"] if r["sampler"] == "ddim" and r["steps"] == 2)

    def pictures(name):
        return [np.asarray(Image.open(folder / "pictures" / name / f"{i:05d}.png"), float) for i in range(COUNT)]

    mine = pictures(row["name"])
    score = np.mean([mine[i].mean() + 1000 * len(PROMPTS[i % 3]) for i in range(COUNT)])
    assert row["figures"]["clip_score"]["value"] == pytest.approx(score)


def test_pictures_are_those_of_sample(evaluated, teacher, lora):
    from lib.pipelines import draw, load_lora, set_sampler

    folder, _ = evaluated
    pipe = load(teacher)
    load_lora(pipe, lora)
    set_sampler(pipe, "lcm-lora")
    drawn, _ = draw(pipe, PROMPTS, 2, 1.0, [0, 1, 2])
    (row,) = (folder / "pictures").glob("lcm-lora-guidance*-2steps-*")
    for index, picture in enumerate(drawn):
        kept = np.asarray(Image.open(row / f"{index:05d}.png"), int)
        assert abs(kept - np.asarray(picture, int)).max() <= 1


def stable(results, samplers=("ddim", "lcm-lora")):
    """Return the figures of some rows, without the times."""
    return [
        (row["name"], {key: figure for key, figure in row["figures"].items() if key != "seconds"})
        for row in results["rows"]
        if row["sampler"] in samplers
    ]


def test_a_killed_run_draws_only_what_is_missing(evaluate, evaluated, teacher, judges, tmp_path, monkeypatch, capsys):
    from lib.evaluation.pictures import Gallery

    keep, kept = Gallery.keep, []

    def stop(self, row, index, picture, took):
        if len(kept) == 17:
            self.path(row, index).with_suffix(".part").mkdir()  # what another run is writing is not touched
            raise KeyboardInterrupt
        kept.append(self.path(row, index))
        keep(self, row, index, picture, took)

    args = evaluate.parse_args(flags(teacher, judges, tmp_path, "--samplers", "ddim", "lcm-lora"))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Gallery, "keep", stop)
        evaluate.main(args)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.png")}
    assert len(before) == 17
    assert exit_code(evaluate.main, args) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before, "kept pictures were written again"
    assert len(list(tmp_path.rglob("*.png"))) == COUNT * 6
    folder, results = evaluated
    assert stable(json.loads((tmp_path / "results.json").read_text())) == stable(results)
    with monkeypatch.context() as patch:  # once complete, nothing is loaded to draw with
        patch.setattr(evaluate, "load_teacher", None)
        assert exit_code(evaluate.main, args) == 0
        assert stable(json.loads((tmp_path / "results.json").read_text())) == stable(results)
        (tmp_path / "results.json").unlink()
        (tmp_path / "results.json").mkdir()
        assert exit_code(evaluate.main, args) == 2 and "cannot be written to" in capsys.readouterr().err


def test_two_processes_draw_what_one_draws(evaluate, evaluated, teacher, judges, tmp_path):
    from lib.evaluation.pictures import Gallery, list_rows

    folder, _ = evaluated
    args = evaluate.parse_args(flags(teacher, judges, tmp_path, "--samplers", "ddim", "--steps", "2"))
    pipe, (row,) = load(teacher), list_rows(args)[1:]
    shares = [Gallery(args, rank, 2) for rank in (0, 1)]
    assert sorted(i for share in shares for block in share.blocks for i in block) == list(range(COUNT))
    for share in shares:
        share.draw(pipe, share.missing([row]), is_quiet=True)
        assert not share.missing([row])
    for index in range(COUNT):
        name = f"pictures/{row.folder}/{index:05d}.png"
        assert (np.asarray(Image.open(tmp_path / name)) == np.asarray(Image.open(folder / name))).all()

    sizes = []

    def refuse(_module, inputs):
        sizes.append(len(inputs[0]))
        if len(inputs[0]) > 2:
            raise RuntimeError("CUDA out of memory")

    pipe.unet.register_forward_pre_hook(refuse)
    args = evaluate.parse_args(flags(teacher, judges, tmp_path / "small", "--samplers", "ddim"))
    share, rows = Gallery(args, 0, 2), list_rows(args)[1:]
    share.draw(pipe, share.missing(rows), is_quiet=True)
    drawn = sum(len(block) for block in share.blocks)
    assert sizes == [4, *[2] * (2 + drawn * 1 + drawn * 2)], "one block is drawn untimed, and finds what fits"


def test_pictures_of_other_settings_are_refused(evaluate, evaluated, teacher, judges, tmp_path, capsys):
    from lib.evaluation.pictures import Gallery, list_rows

    folder, _ = evaluated
    shutil.copytree(folder / "pictures", tmp_path / "pictures")
    shutil.copytree(teacher, tmp_path / "other")
    (tmp_path / "other" / "model_index.json").write_text((teacher / "model_index.json").read_text() + " ")
    changed = flags(tmp_path / "other", judges, tmp_path, "--resolution", "16", "--seed", "1")
    assert run(evaluate, changed) == 2
    message = capsys.readouterr().err
    assert "resolution, seed, teacher;" in message and "delete" in message and message.count("\n") == 1
    with pytest.raises(UnusableInput, match="drawn with another"):  # process 1 draws nothing, but process 0 ends
        Gallery(args := evaluate.parse_args([*changed, "--batch_size", "99"]), 1, 2).missing(list_rows(args))
    for name in ("pretrained_vae_model_name_or_path", "teacher_config"):
        setattr(args, name, str(tmp_path / "other"))
        before = Gallery(args).common[name]
        with (tmp_path / "other" / "model_index.json").open("a") as file:
            file.write(" ")
        assert Gallery(args).common[name] != before
    (picture := next(tmp_path.glob("pictures/teacher/*.png"))).unlink()
    os.mkfifo(picture)
    signal.alarm(60)  # ends what waits at it
    assert run(evaluate, flags(teacher, judges, tmp_path)) == 2 and evaluate.read_yardstick(picture)[0] is None
    signal.alarm(0)


def test_a_trained_on_lora_gets_its_own_pictures(lora, tmp_path, monkeypatch):
    from lib.evaluation.pictures import fingerprint

    shutil.copytree(lora, tmp_path / "lora")
    before = fingerprint(tmp_path / "lora")
    (tmp_path / "lora" / "README.md").write_text("not the weights")
    assert fingerprint(tmp_path / "lora") == before
    weights = tmp_path / "lora" / "pytorch_lora_weights.safetensors"
    os.utime(weights, ns=(1, 1))
    assert fingerprint(tmp_path / "lora") == before
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    os.utime(weights, ns=(1, 1))
    assert fingerprint(tmp_path / "lora") != before
    assert fingerprint("owner/name") != fingerprint("owner/other")
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_: weights)  # pushed anew
    assert fingerprint("owner/name") == fingerprint(weights)
    two = [tmp_path / name for name in ("one", "two")]
    for folder, text in zip(two, ("xy", "x"), strict=True):
        folder.mkdir()
        (folder / "a.safetensors").write_text(text)
        (folder / "b.safetensors").write_text("xyy"[len(text) :])
    assert fingerprint(two[0]) != fingerprint(two[1])
    (two[0] / "config.json").write_text("{}")  # a model that is copied to a node's own disk stays the same
    shutil.copytree(two[0], tmp_path / "copy", copy_function=shutil.copyfile)
    os.utime(tmp_path / "copy" / "config.json", ns=(1, 1))
    assert fingerprint(two[0]) == fingerprint(tmp_path / "copy")
    # Of a folder with two LoRAs what is loaded counts; of a model's folder all that it holds, behind links too.
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / "lora" / name).write_text("{}")
        assert fingerprint(tmp_path / "lora") == fingerprint(weights)
    assert fingerprint(tmp_path / "lora" / name) != fingerprint(weights)
    (two[0] / "pytorch_lora_weights.safetensors").write_text("x")
    (two[0] / "unet").symlink_to(tmp_path / "copy")
    before = fingerprint(two[0], lambda model: [model])
    (tmp_path / "copy" / "a.safetensors").write_text("z")
    assert fingerprint(two[0], lambda model: [model]) != before


def test_noise_of_the_yardstick_is_other_noise(evaluate, teacher, judges, lora, tmp_path):
    from lib.evaluation.pictures import REFERENCE_SEED, list_rows

    assert lora.is_dir()
    floor = list_rows(evaluate.parse_args(flags(teacher, judges, tmp_path)))[0]
    seeds = (floor.first_seed + REFERENCE_SEED, floor.first_seed)
    noise = [torch.randn(4, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    assert (noise[0] - noise[1]).abs().max() > 0.01


def read_all(path, rank=0, processes=1):
    """Return the pictures of a --reference, scaled to 8 x 8 px, and what was left out."""
    from lib.evaluation.pictures import read_real

    skipped = sd15.Skipped()
    return torch.cat(list(read_real([path], (8, 8), skipped, rank, processes))), skipped


def test_reference_pictures_from_folder_and_shard(tmp_path):
    from lib.evaluation.pictures import real_files

    samples = []
    (tmp_path / "folder" / "deep").mkdir(parents=True)
    for index, size in enumerate([(20, 10), (10, 30), (16, 16)]):
        picture = Image.new("RGB", size, (0, 0, 50 * index))
        picture.paste((200, 0, 0), (size[0] // 2 - 2, size[1] // 2 - 2, size[0] // 2 + 2, size[1] // 2 + 2))
        picture.save(tmp_path / "folder" / "deep" / f"{index}.png")
        samples.append({"png": (tmp_path / "folder" / "deep" / f"{index}.png").read_bytes(), "txt": "x"})
    shard = write_shard(tmp_path / "0.tar", samples)
    folder, tar = (read_all(path)[0] for path in (tmp_path / "folder", shard))
    assert folder.shape == (3, 8, 8, 3) and (folder == tar).all()
    (tmp_path / "shards" / "empty").mkdir(parents=True)
    shutil.copy(shard, tmp_path / "shards")
    assert (read_all(tmp_path / "shards")[0] == tar).all()
    with pytest.raises(UnusableInput, match="--reference .*empty: give a folder"):
        real_files([tmp_path / "shards" / "empty"])
    assert (folder[:, 3:5, 3:5, 0] > 100).all(), "the middle was cut away"
    shares = [read_all(shard, rank, 2)[0] for rank in (0, 1)]
    assert [len(share) for share in shares] == [2, 1]


def test_inception_through_the_library(monkeypatch):
    from lib.evaluation.feature_models import load_features

    class Inception(torch.nn.Module):
        def __init__(self, name, features, feature_extractor_weights_path=None):
            super().__init__()
            assert (name, features) == ("inception-v3-compat", ["2048"])
            self.path = feature_extractor_weights_path

        def forward(self, x):
            assert x.dtype == torch.uint8 and x.shape[1] == 3
            return (x.float().mean((2, 3)).repeat(1, 683)[:, :2048],)

    for name, attributes in {
        "torch_fidelity": {},
        "torch_fidelity.feature_extractor_inceptionv3": {"FeatureExtractorInceptionV3": Inception},
    }.items():
        monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(**attributes))
    pictures = torch.randint(0, 255, (4, 6, 5, 3), dtype=torch.uint8)
    model = load_features("inception=weights.pth", "cpu")
    assert model.model.path == "weights.pth"
    features = model(pictures)
    assert features.shape == (4, 2048) and features.dtype == torch.float64
    torch.testing.assert_close(features[:, :3], pictures.double().mean((1, 2)), rtol=1e-5, atol=1e-4)


def test_a_missing_library_is_named_before_drawing(evaluate, teacher, judges, lora, tmp_path, capsys, monkeypatch):
    assert lora.is_dir()
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    assert run(evaluate, flags(teacher, judges, tmp_path, "--features", "inception")) == 2
    message = capsys.readouterr().err
    assert "scripts/requirements-eval.txt" in message and message.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def tiny_models(teacher, tmp_path_factory):
    """Return a folder with a CLIP and a DINOv2 of a few thousand weights."""
    from transformers import CLIPConfig, CLIPModel, Dinov2Config, Dinov2Model

    folder, sizes = tmp_path_factory.mktemp("tiny"), {"hidden_size": 16, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    tokenizer = StableDiffusionPipeline.from_pretrained(teacher).tokenizer
    tokens = {"vocab_size": len(tokenizer), "max_position_embeddings": 24}
    tokens |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    vision = sizes | {"image_size": 16, "patch_size": 8}
    config = CLIPConfig(text_config=sizes | tokens, vision_config=vision, projection_dim=8)
    CLIPModel(config).save_pretrained(folder / "clip")
    tokenizer.save_pretrained(folder / "clip")
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    Dinov2Model(Dinov2Config(**small, image_size=16, patch_size=8)).save_pretrained(folder / "dinov2")
    size = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    for name, kind in (("clip", "CLIPImageProcessor"), ("dinov2", "BitImageProcessor")):
        text = json.dumps({"image_processor_type": kind, **size})
        (folder / name / "preprocessor_config.json").write_text(text)
    return folder


@pytest.mark.parametrize(("name", "width"), [("clip", 8), ("dinov2", 16)])
def test_features_of_transformers_models(tiny_models, name, width, tmp_path):
    from lib.evaluation.feature_models import describe_model, load_features
    from lib.evaluation.measures import Measures

    pictures = torch.randint(0, 255, (5, 20, 24, 3), dtype=torch.uint8)
    features = load_features(str(tiny_models / name), "cpu")(pictures)
    assert features.shape == (5, width) and features.dtype == torch.float64
    torch.testing.assert_close(load_features(f"{name}={tiny_models / name}", "cpu")(pictures), features)
    assert features.std(0).min() > 0 and describe_model(str(tiny_models / name)) == name
    for broken, text in (("broken", "{"), ("broken.py", "def load(:"), ("other.py", "x = 1")):
        (tmp_path / broken).mkdir() if broken == "broken" else (tmp_path / broken).write_text(text)
        if broken == "broken":
            (tmp_path / broken / "config.json").write_text(text)
        with pytest.raises(UnusableInput, match="does not load"):
            Measures(argparse.Namespace(features=[str(tmp_path / broken)], clip_model="none"), "cpu")


def test_clip_score(tiny_models):
    from lib.evaluation.feature_models import load_clip_score
    from transformers import AutoImageProcessor, CLIPModel, CLIPTokenizer

    source = tiny_models / "clip"
    pictures = torch.randint(0, 255, (2, 16, 16, 3), dtype=torch.uint8)
    prompts = ["a red hill", "word " * 40]
    scores = load_clip_score(str(source), "cpu")(pictures, prompts)
    model, tokenizer = CLIPModel.from_pretrained(source).eval(), CLIPTokenizer.from_pretrained(source)
    images = [Image.fromarray(picture.numpy()) for picture in pictures]
    pixels = AutoImageProcessor.from_pretrained(source)(images=images, return_tensors="pt")["pixel_values"]
    for index, prompt in enumerate(prompts):
        tokens = tokenizer([prompt], truncation=True, max_length=24, return_tensors="pt")
        with torch.no_grad():
            out = model(pixel_values=pixels[index : index + 1], **tokens)
        cosine = float((out.image_embeds * out.text_embeds).sum())
        assert float(scores[index]) == pytest.approx(max(0, 100 * cosine), abs=1e-3)


def test_the_demos_judge_scores_its_captions():
    from lib.evaluation.feature_models import load_features

    judge = load_features(str(ROOT / "assets" / "demo-teacher-sd15" / "judge.safetensors"), "cpu")
    pictures = torch.randint(0, 255, (2, 64, 64, 3), dtype=torch.uint8)
    assert judge(pictures).shape == (2, 64)
    caption = "mountains at sunset with clouds and a balloon"
    shares = judge.accuracy(pictures, [caption, caption])
    assert shares.shape == (2,) and set((4 * shares).tolist()) <= {0, 1, 2, 3, 4}
    assert judge.accuracy(pictures, [caption, "a red fox"]) is None


class Page(html.parser.HTMLParser):
    """Collect every address that a browser would follow by itself, and the text."""

    def __init__(self, text):
        super().__init__()
        self.addresses, self.tags, self.words = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href", "srcset", "data")]

    def handle_data(self, data):
        self.words.append(data)


def test_report_is_one_file(evaluated):
    folder, results = evaluated
    text = (folder / "report.html").read_text("utf-8")
    page = Page(text)
    assert "http" not in text.replace("http-equiv", "") and "@import" not in text and "url(" not in text
    assert all(address.startswith("data:") for address in page.addresses) and "script" not in page.tags
    pictures = [base64.b64decode(a.split(",")[1]) for a in page.addresses if a.startswith("data:image/png")]
    grid = np.asarray(Image.open(io.BytesIO(pictures[0])).convert("RGB"))
    with Image.open(folder / "pictures" / results["rows"][-1]["name"] / "00001.png") as picture:
        shown = np.asarray(picture).repeat(4, axis=0).repeat(4, axis=1)
    assert len(pictures) == 1 and (grid[-134:-6, -268:-140] == shown).all()  # of 3 columns the second
    words = " ".join(page.words)
    assert "the &lt;sea&gt; &amp; more" in text
    assert "FD, mean, to teacher" in words and "DPM-Solver++" in words and "floor" in words
    plots = [base64.b64decode(a.split(",")[1]) for a in page.addresses if a.startswith("data:image/svg")]
    assert len(plots) == HAS_PLOTS == ("requirements-eval.txt" not in words)
    assert all(b"DPM-Solver++, guidance 7.5" in one and b"seconds a picture" in one for one in plots)


def test_markdown_table_is_rectangular(evaluated):
    folder, results = evaluated
    table = (folder / "table.md").read_text("utf-8").split("\n\n")[2].splitlines()
    assert len(table) == 2 + len(results["rows"]) and len({line.count("|") for line in table}) == 1


def test_figures_are_rounded_for_reading():
    from lib.evaluation.report import number

    texts = [(None, "–"), (0, "0"), (1234.5, "1234"), (12.345, "12.3"), (0.001234, "0.00123")]
    assert [number(value) for value, _ in texts] == [text for _, text in texts]


HAS_PLOTS = importlib.util.find_spec("matplotlib") is not None  # of scripts/requirements-eval.txt
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chromium-browser"))), None)
PROBE = """<!doctype html><iframe id=f width=%d height=800></iframe><script>
const frame = document.getElementById("f");
frame.onload = () => {
  const page = frame.contentDocument, images = [...page.images];
  document.title = JSON.stringify({
    width: page.documentElement.clientWidth, wide: page.documentElement.scrollWidth,
    images: images.length, broken: images.filter(i => !i.naturalWidth).length,
    rows: page.querySelectorAll("tbody tr").length,
    requests: [window, frame.contentWindow].flatMap(w => w.performance.getEntriesByType("resource"))
      .filter(entry => !entry.name.startsWith("data:")).length,
  });
};
frame.srcdoc = %s;
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH")
@pytest.mark.parametrize("width", [1200, 390])
def test_report_in_a_browser(evaluated, tmp_path, width):
    folder, results = evaluated
    report = json.dumps((folder / "report.html").read_text("utf-8")).replace("</", "<\\/")
    (tmp_path / "probe.html").write_text(PROBE % (width, report), "utf-8")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", (tmp_path / "probe.html").as_uri()]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=240)
    title = re.search(r"<title>(.*?)</title>", finished.stdout)
    assert title, finished.stderr[-2000:]
    seen = json.loads(title[1].replace("&lt;", "<").replace("&amp;", "&"))
    assert seen["images"] == 1 + HAS_PLOTS and seen["broken"] == 0
    assert seen["wide"] <= seen["width"] <= width, "the page itself scrolls sideways"
    assert seen["rows"] > len(results["rows"])
    assert seen["requests"] == 0
    assert "CONSOLE" not in finished.stderr, finished.stderr


def test_help_answers_without_torch():
    code = "import sys; sys.modules['torch'] = sys.modules['diffusers'] = None\nimport runpy\n"
    code += "sys.argv = ['evaluate.py', '--help']\n"
    code += f"runpy.run_path({str(ROOT / 'scripts' / 'evaluate.py')!r}, run_name='__main__')"
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=20)
    assert finished.returncode == 0 and "--teacher_steps" in finished.stdout


@cases(
    ("more", "named"),
    [
        (["--num_images", "1"], "--num_images: 1: give 2 or more"),
        (["--batch_size", "0"], "--batch_size"),
        (["--steps", "51"], "--steps"),
        (["--steps", "0"], "--steps"),
        (["--teacher_steps", "2000"], "2000"),
        (["--guidance_scale", "-1"], "guidance"),
        (["--lora", "no/such/lora.safetensors"], "no/such/lora.safetensors"),
        (["--features", "none.py"], "none.py"),
        (["--features", "judge.safetensors"], "judge.safetensors"),
        (["--reference", "no-folder"], "no-folder"),
        (["--prompts_file", "no-prompts.txt"], "no-prompts.txt"),
        (["--seed", "2147483648"], "--seed"),
        (["--feature", "clip"], "did you mean --features?"),
        (["--output_dir", "/proc/none"], "/proc/none"),
        (["--output_dir", "/dev/null/folder"], "cannot be written to"),
        (["--yardstick", "no-file"], "--draw_yardstick 8 makes it"),
        (["--yardstick", str(ROOT / "README.md")], "is no yardstick file"),
        (["--draw_yardstick", "8"], "--yardstick FILE"),
        (["--yardstick", YARDSTICK], "other prompts"),
    ],
)
def test_wrong_values_exit_with_2(evaluate, teacher, judges, lora, tmp_path, capsys, more, named):
    assert lora.is_dir()
    more = [word.format(tmp=tmp_path) for word in more]
    with pytest.raises(SystemExit) as stop:
        evaluate.parse_args(flags(teacher, judges, tmp_path, *more))
    message = capsys.readouterr().err
    assert stop.value.code == 2 and named in message and message.count("\n") == 1


class Runs:
    """An object whose pickle makes a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
PICKLES = ("pkl", "pyd", "pickle", "pth", "pt", "npy", "npz", "cbor", "ten", "tenbin", "mp", "msg", "joblib", "bin")


def png(index=0):
    data = io.BytesIO()
    Image.new("RGB", (16, 16), (0, 0, 20 * index)).save(data, "PNG")
    return data.getvalue()


def test_nothing_in_a_reference_runs(tmp_path, monkeypatch):
    """Pickles under every suffix, PostScript under pictures' names, a file called like a command."""
    ran, folder = tmp_path / "ran", tmp_path / "real"
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {ran}\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    samples = [{"png": png(i), suffix: pickle.dumps(Runs(ran))} for i, suffix in enumerate(PICKLES)]
    samples += [{name: EPS} for name in ("png", "jpg", "eps")] + [{"png": pickle.dumps(Runs(ran))}]
    write_shard(folder / "0.tar", samples)
    (folder / "a.png").write_bytes(EPS)
    (folder / "b.webp").write_bytes(pickle.dumps(Runs(ran)))
    (folder / "pipe:touch ran; cat 0.tar").write_bytes(b"")
    monkeypatch.chdir(folder)
    pictures, skipped = read_all(".")
    assert len(pictures) == len(PICKLES)
    assert skipped["picture cannot be decoded"] == 5
    assert not ran.exists() and not (folder / "ran").exists()


def test_reference_is_checked_before_drawing(evaluate, teacher, judges, lora, tmp_path, capsys, monkeypatch):
    real = [{"jpg": b"damaged"}, *({"png": png(i)} for i in range(3)), {"txt": "no picture"}]
    shard = write_shard(tmp_path / "real.tar", real)
    drawn = []
    monkeypatch.setattr(evaluate, "load_teacher", lambda *_: drawn.append(capsys.readouterr().out) or load(teacher))
    line = flags(teacher, judges, tmp_path / "out", "--samplers", "ddim", "--steps", "1", "--reference", str(shard))
    assert lora.is_dir() and run(evaluate, line) == 0
    assert "3 pictures; left out: picture cannot be decoded: 1, no picture: 1" in drawn[0]
    write_shard(tmp_path / "real.tar", real[:2])
    assert run(evaluate, [*line[:-1], str(shard)]) == 2 and len(drawn) == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert "fewer than two" in message and "picture cannot be decoded: 1" in message


def test_spread_is_the_share_of_the_teachers():
    from lib.evaluation.statistics import pairwise_distances, spread

    generator = torch.Generator().manual_seed(0)
    prompts, noise = 4 * torch.randn(50, 6, generator=generator), torch.randn(3, 50, 6, generator=generator)
    mine, teachers = ((prompts + scale * noise).flatten(0, 1) for scale in (0.5, 1.0))
    figure = spread(pairwise_distances(mine, 50), pairwise_distances(teachers, 50))
    assert figure["value"] == pytest.approx(0.5, rel=1e-4) and figure["high"] - figure["low"] < 1e-3
    other = (prompts + torch.randn(3, 50, 6, generator=generator)).flatten(0, 1)
    figure = spread(pairwise_distances(other, 50), pairwise_distances(teachers, 50))
    assert figure["low"] < 1 < figure["high"] and figure["high"] - figure["low"] < 0.5
    by_hand = (teachers[0] - teachers[50]).norm(), (teachers[0] - teachers[100]).norm()
    by_hand = (*by_hand, (teachers[50] - teachers[100]).norm())
    assert float(pairwise_distances(teachers, 50)[0]) == pytest.approx(float(sum(by_hand)) / 3, rel=1e-6)
    assert spread(pairwise_distances(prompts, 50), pairwise_distances(teachers, 50)) is None


def test_spread_in_the_report(evaluate, evaluated, teacher, judges, tmp_path):
    _, results = evaluated  # 7 pictures of 3 prompts
    assert all(row["figures"]["spread/mean"]["value"] > 0 for row in results["rows"])
    line = flags(teacher, judges, tmp_path, "--samplers", "ddim", "--steps", "1", "--num_images", "3")
    assert run(evaluate, line) == 0
    (row,) = json.loads((tmp_path / "results.json").read_text())["rows"][1:]
    assert row["figures"]["spread/mean"] is None
    head, _, *lines = (tmp_path / "table.md").read_text("utf-8").split("\n\n")[2].splitlines()
    column = [cell.strip() for cell in head.split("|")].index("spread, mean")
    assert [line.split("|")[column].strip() for line in lines] == ["–", "–"]


def test_an_sdxl_teacher_is_judged_too(evaluate, teachers, judges, tmp_path):
    line = flags(teachers["train_lcm_lora_sdxl"], judges, tmp_path, "--samplers", "ddim", "--num_images", "2")
    line[line.index("--lora") : line.index("--lora") + 2] = []
    assert run(evaluate, line) == 0 and (tmp_path / "report.html").exists()


def check_that_a_yardstick_of_another_kind_is_refused(evaluate, line, kept, results, capsys):
    """Drawn at another size than the model's own, which is the default, or by other models of the same names."""
    assert results["settings"]["timed on"].endswith(" at a time"), "seconds of several machines would be told"
    other = kept.with_name("other.safetensors")
    for key in ("resolution", "feature model", "VAE", "prediction type", "rest of the teacher", "teacher_config"):
        with safe_open(kept, "pt") as file:
            assert key in file.metadata()
            save_file({"features": file.get_tensor("features")}, other, metadata=file.metadata() | {key: "99"})
        assert run(evaluate, [*line, "--yardstick", str(other)]) == 2
        assert f"is of another {key}" in capsys.readouterr().err.splitlines()[-1]


def test_a_yardstick_measures_as_its_pictures_do(evaluate, teacher, teachers, judges, lora, tmp_path, capsys):
    """The kept features give the distance to the pictures that they are of, in noise of their own."""
    from lib.evaluation.measures import frechet_to
    from lib.evaluation.statistics import frechet_distance, jackknife, pairwise_distances

    assert lora.is_dir()
    kept = tmp_path / "reference.safetensors"
    usual = flags(teacher, judges, tmp_path / "kept", "--clip_model", "none", "--yardstick", str(kept))
    assert run(evaluate, [*usual, "--draw_yardstick", "2"]) == 0
    assert f"{kept}: (3, 2, 5)" in capsys.readouterr().out
    features = load_file(kept)["features"].double()
    seeds = {json.loads(Image.open(p).text["record"])["settings"]["seed"] for p in tmp_path.rglob("*.png")}
    assert seeds == set(range(3, 9))
    line = [*usual, "--samplers", "ddim", "--steps", "1", "--num_images", "6", "--output_dir", str(tmp_path / "out")]
    position = line.index("--prompts_file")
    assert run(evaluate, line[:position] + line[position + 2 :]) == 0  # the file holds the prompts
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert not (tmp_path / "out" / "pictures" / "reference").exists() and results["prompts"] == PROMPTS
    (row,) = results["rows"][1:]
    pictures = [Image.open(tmp_path / "out" / "pictures" / row["name"] / f"{i:05d}.png") for i in range(6)]
    assert [json.loads(p.text["record"])["settings"]["seed"] for p in pictures] == [0, 1, 2, 9, 10, 11]
    exec(FEATURES, model := {})
    mine = model["load"]("cpu")(torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])))
    expected = frechet_distance(mine, features.flatten(0, 1))
    assert row["figures"]["FD/mean/teacher"]["value"] == pytest.approx(expected, rel=1e-9)
    by_prompt = [pairwise_distances(x, 3).mean() for x in (mine, features.transpose(0, 1).flatten(0, 1))]
    assert row["figures"]["spread/mean"]["value"] == pytest.approx(float(by_prompt[0] / by_prompt[1]), rel=1e-9)
    many = torch.randn(40, 2, 5, dtype=torch.float64)  # by prompt; a row's pictures have the prompts in turn
    own = jackknife(frechet_distance, many + 1, many)
    assert frechet_to(many, (many + 1).transpose(0, 1).flatten(0, 1)) == pytest.approx(own)
    sdxl = teachers["train_lcm_lora_sdxl"]
    for flag, value in (("features", judges / "clip.py"), ("resolution", 16), ("pretrained_teacher_model", sdxl)):
        assert run(evaluate, [*line, "--output_dir", str(tmp_path / flag), f"--{flag}", str(value)]) == 2
        named = {"pretrained_teacher_model": "of another teacher"}.get(flag, flag)
        assert named in capsys.readouterr().err.splitlines()[-1]
    check_that_a_yardstick_of_another_kind_is_refused(evaluate, line, kept, results, capsys)
    before = kept.read_bytes()
    for more, named in ((["--draw_yardstick", "2"], "exists"), (["--seed", "3"], "pictures of --seed 3")):
        with pytest.raises(SystemExit):
            evaluate.parse_args([*line, *more])
        assert named in capsys.readouterr().err
    assert evaluate.parse_args([*line, "--seed", "1"]).seed == 1 and kept.read_bytes() == before
    # Two of its three prompts: their features alone are the yardstick, and two pictures of each are drawn.
    few = [*line, "--num_images", "4", "--prompts", *PROMPTS[:2], "--output_dir", str(tmp_path / "few")]
    assert run(evaluate, few[:position] + few[position + 2 :]) == 0
    (row,) = json.loads((tmp_path / "few" / "results.json").read_text())["rows"][1:]
    pictures = [Image.open(tmp_path / "few" / "pictures" / row["name"] / f"{i:05d}.png") for i in range(4)]
    mine = model["load"]("cpu")(torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])))
    expected = frechet_distance(mine, features[:2].flatten(0, 1))
    assert row["figures"]["FD/mean/teacher"]["value"] == pytest.approx(expected, rel=1e-9)


def test_prompts_of_another_encoding_and_a_lora_given_twice(evaluate, teacher, judges, lora, tmp_path, capsys):
    assert lora.is_dir()
    (tmp_path / "prompts.txt").write_text("mountains at dawn", "utf-16")
    with pytest.raises(SystemExit):
        evaluate.parse_args(flags(teacher, judges, tmp_path, "--prompts_file", str(tmp_path / "prompts.txt")))
    assert "is not UTF-8" in capsys.readouterr().err
    args = evaluate.parse_args(flags(teacher, judges, tmp_path, "--lora", "owner/name"))
    assert args.lora == [str(judges / "lora"), "owner/name"]


@pytest.mark.usefixtures("evaluate")
def test_accuracy_needs_all_pictures(monkeypatch):
    from lib.evaluation import measures

    parts = [{"accuracy": {0: torch.ones(1)}, "FD": {0: torch.ones(1), 1: torch.ones(1)}}]
    monkeypatch.setattr(measures, "gather_object", lambda _mine: parts)
    gallery = argparse.Namespace(count=2, blocks=[])
    assert set(measures.Measures.row(argparse.Namespace(), gallery, None)) == {"FD"}


def test_judges_load_once_and_collectives_wait_for_hours(
    evaluate, teacher, judges, lora, tmp_path, monkeypatch, capsys
):
    from lib.evaluation import measures

    assert lora.is_dir()
    loaded, handlers, accelerator = [], [], evaluate.sd15.Accelerator
    load_features = measures.load_features
    monkeypatch.setattr(measures, "load_features", lambda *spec: loaded.append(spec) or load_features(*spec))

    def make(kwargs_handlers, **options):
        handlers.extend(kwargs_handlers)
        return accelerator(kwargs_handlers=kwargs_handlers, **options)

    monkeypatch.setattr(evaluate.sd15, "Accelerator", make)
    torch.backends.cudnn.allow_tf32 = True
    assert run(evaluate, flags(teacher, judges, tmp_path, "--samplers", "ddim", "--steps", "1")) == 0
    assert len(loaded) == 1 and not torch.backends.cudnn.allow_tf32
    assert [handler.timeout.total_seconds() >= 12 * 3600 for handler in handlers] == [True]
    failing = "fp8 needs a library", "launched as 2 processes, but each would work alone"
    monkeypatch.setattr(evaluate.sd15, "Accelerator", mock.Mock(side_effect=ImportError(failing[0])))
    assert run(evaluate, flags(teacher, judges, tmp_path)) == 2 and failing[0] in capsys.readouterr().err
    monkeypatch.setattr(evaluate.sd15, "Accelerator", lambda **_: SimpleNamespace(num_processes=1))
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run(evaluate, flags(teacher, judges, tmp_path)) == 2 and failing[1] in capsys.readouterr().err


def figure(value, half=None):
    return {"value": value, "low": half and value - half, "high": half and value + half}


def test_summary_has_the_best_guidance_of_each_step_count():
    from lib.evaluation.report import summary

    def row(label, steps, guidance, distance):
        figures = {"FD/judge/teacher": figure(distance, 1.0), "accuracy": figure(0.5, 0.01)}
        return {"label": label, "steps": steps, "guidance": guidance, "figures": figures}

    rows = [row("Teacher", 50, 7.5, 3.06), row("LCM-LoRA", 1, 1.0, 38.5), row("LCM-LoRA", 2, 1.0, 8.14)]
    rows += [row("DDIM", n, g, 10 * n + g) for g in (7.5, 2.0) for n in (1, 2)]
    rows[3]["figures"]["FD/judge/teacher"] = figure(1.0)
    figures = {"FD/judge/teacher": "FD, judge, to teacher", "accuracy": "share"}
    head, body, floor = summary({"rows": rows, "figures": figures})
    assert head == ["FD, judge, to teacher / accuracy", "1 step", "2 steps"]
    assert body == [
        ["LCM-LoRA, guidance 1", "38.5 ± 1.0 / 0.500 ± 0.010", "8.1 ± 1.0 / 0.500 ± 0.010"],
        ["DDIM, guidance 7.5", "1.0 / 0.500 ± 0.010", "27.5 ± 1.0 / 0.500 ± 0.010"],
        ["DDIM, its best guidance", "1.0 / 0.500 ± 0.010 (7.5)", "22.0 ± 1.0 / 0.500 ± 0.010 (2)"],
    ]
    assert floor == "Teacher, 50 steps, guidance 7.5: 3.1 ± 1.0 / 0.500 ± 0.010 (floor)"


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_the_demos_yardsticks_are_whole(evaluate, family, tmp_path):
    """`demo.sh` names no prompts: they are in the file, and are those that the demo always had."""
    from landscapes import random_captions

    path = ROOT / "assets" / f"demo-teacher-{family}"
    args = evaluate.parse_args([
        "--pretrained_teacher_model", str(path), "--yardstick", str(path / "reference.safetensors"),
        "--guidance_scale", "7.5", "2", "--num_images", "128", "--output_dir", str(tmp_path),
    ])  # fmt: skip
    assert args.prompts == random_captions(192) and args.guidance_scale == [7.5, 2] and args.gap == 8 * 192
    assert load_file(args.yardstick)["features"].shape == (192, 8, 64)
