# SPDX-License-Identifier: Apache-2.0
"""The models that judge pictures. Pictures are uint8 tensors [N, H, W, 3]; every model is one callable.

    features(pictures) -> [N, D] float64        input of the Fréchet distance, KID and the spread
    clip_score(pictures, prompts) -> [N]        100 cos(picture, text), at least 0 (arXiv:2104.08718, w = 100)

A Python file given by path stands in for any of them: it defines `load(device)`, which returns the callable.
"""

import json
import runpy
import sys
import textwrap
from pathlib import Path

import torch

from lib.trainers import UnusableInput

HUB_MODELS = {"clip": "openai/clip-vit-large-patch14", "dinov2": "facebook/dinov2-base"}
INSTALL = "pip install -r scripts/requirements-eval.txt"


def load_judge(flag, source, device, kind, remedy):
    """Return the model of a flag: a .py file's, on `device`, or `kind()`; refuse one that does not load."""
    try:
        return runpy.run_path(source)["load"](device) if source.endswith(".py") else kind()
    except Exception as error:
        why = textwrap.shorten(f"{type(error).__name__}: {error}", 200)
        raise UnusableInput(f"{flag} {source} does not load; {remedy} ({why})") from error


def load_features(spec, device="cpu"):
    """Return the feature model of `inception`, `clip`, `dinov2` or PATH, on the CPU until `to(device)`.

    Inception's weight file is unpickled by torch-fidelity and a Python file is run: name only ones you trust.
    PATH is a transformers folder, the demo's judge (.safetensors) or a Python file; NAME=PATH gives
    `inception` its weight file, and `clip` and `dinov2` the folder or Hub id to take.
    """
    name, _, source = spec.partition("=")

    def kind():
        if name == "inception":
            return InceptionFeatures(source or None)
        if spec.endswith(".safetensors"):
            return DemoJudge(spec)
        return TransformerFeatures(source or HUB_MODELS.get(name, spec))

    remedy = "without network give --features clip=FOLDER, or for the demo assets/demo-teacher-sd15/judge.safetensors"
    return load_judge("--features", spec, device, kind, remedy)


def load_clip_score(source, device="cpu"):
    return load_judge("--clip_model", source, device, lambda: ClipScore(source), "give a local folder, or none")


def channels_first(pictures, device):
    return torch.as_tensor(pictures).permute(0, 3, 1, 2).contiguous().to(device)


class OnDevice:
    """A judge around one module, which loads on the CPU and moves to the GPU when the pictures are drawn."""

    device = "cpu"

    def to(self, device):
        self.model, self.device = self.model.to(device), device
        return self


class InceptionFeatures(OnDevice):
    def __init__(self, weights):
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3 as Inception
        except ImportError as error:
            raise ImportError(f"{INSTALL}: {error}") from error
        self.model = Inception("inception-v3-compat", ["2048"], feature_extractor_weights_path=weights).eval()

    @torch.no_grad()
    def __call__(self, pictures):
        # .cpu() first, here and below: MPS has no float64.
        return self.model(channels_first(pictures, self.device))[0].cpu().double()


class TransformerFeatures(OnDevice):
    """The pooled features of any image model of transformers; CLIP's projected ones."""

    def __init__(self, source):
        from transformers import AutoImageProcessor, AutoModel

        self.model = AutoModel.from_pretrained(source).eval()
        self.processor = AutoImageProcessor.from_pretrained(source)

    @torch.no_grad()
    def __call__(self, pictures):
        inputs = self.processor(images=list(channels_first(pictures, "cpu")), return_tensors="pt")
        get = getattr(self.model, "get_image_features", self.model)
        return get(pixel_values=inputs["pixel_values"].to(self.device)).pooler_output.cpu().double()


class ClipScore(TransformerFeatures):
    """CLIP's agreement of picture and prompt; a prompt's words beyond the model's length are cut."""

    def __init__(self, source):
        from transformers import AutoTokenizer

        super().__init__(source)
        self.tokenizer = AutoTokenizer.from_pretrained(source)
        self.limit = self.model.config.text_config.max_position_embeddings

    @torch.no_grad()
    def __call__(self, pictures, prompts):
        options = {"padding": True, "truncation": True, "max_length": self.limit, "return_tensors": "pt"}
        tokens = self.tokenizer(list(prompts), **options).to(self.device)
        texts = self.model.get_text_features(**tokens).pooler_output.cpu().double()
        return 100 * torch.cosine_similarity(super().__call__(pictures), texts).clamp(min=0)


class DemoJudge(OnDevice):
    """The judge of scripts/demo: features, and the share of a landscape caption that a picture shows."""

    def __init__(self, path):
        sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "demo"))
        from judge import Judge
        from landscapes import labels_of

        if not Path(path).is_file():
            raise FileNotFoundError(f"{path}: not there")
        self.model, self.labels_of = Judge.load(path), labels_of

    def __call__(self, pictures):
        return self.model.read(torch.as_tensor(pictures).to(self.device))[0]

    def accuracy(self, pictures, prompts):
        """Return the share of attributes that is right [N]; None unless all prompts are the demo's captions."""
        try:
            labels = torch.tensor([self.labels_of(prompt) for prompt in prompts])
        except StopIteration:  # a prompt that names no value of an attribute
            return None
        return (self.model.read(torch.as_tensor(pictures).to(self.device))[1] == labels).double().mean(1)


def describe_model(spec):
    name = spec.partition("=")[0]
    if name in ("inception", *HUB_MODELS):
        return name
    config = Path(spec) / "config.json"
    return (json.loads(config.read_text()).get("model_type") if config.exists() else None) or Path(spec).stem
