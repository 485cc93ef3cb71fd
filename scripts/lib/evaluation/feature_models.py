# SPDX-License-Identifier: Apache-2.0
"""The models that judge pictures. Pictures are uint8 tensors [N, H, W, 3]; every model is one callable.

    features(pictures) -> [N, D] float64        what the Fréchet distance and KID compare
    clip_score(pictures, prompts) -> [N]        100 cos(picture, text), at least 0 (arXiv:2104.08718, w = 100)
    lpips(pictures, others) -> [N]              perceptual distance (arXiv:1801.03924)

A Python file given by path stands in for any of them: it defines `load(device)`, which returns the callable.
"""

import importlib.util
import json
import sys
import textwrap
from pathlib import Path

import torch
from model_args import InputError

NAMES = {"clip": "openai/clip-vit-large-patch14", "dinov2": "facebook/dinov2-base"}
INSTALL = "pip install -r scripts/requirements-eval.txt"
LOAD_ERRORS = (OSError, ValueError, LookupError, TypeError, RuntimeError, AttributeError, ImportError)


def refusal(what, error, remedy):
    """Return the InputError of a model that does not load."""
    return InputError(f"{what} does not load; {remedy} ({textwrap.shorten(str(error), 200)})")


def load_python(path, device):
    """Return what `load(device)` of a Python file returns; raises InputError if it has no such function."""
    spec = importlib.util.spec_from_file_location(f"judge_{Path(path).stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "load"):
        raise InputError(f"{path}: defines no load(device); see scripts/evaluation/features.py")
    return module.load(device)


def load_features(spec, device):
    """Return the feature model of `inception`, `clip`, `dinov2` or PATH; raises InputError.

    Inception's weight file is unpickled by torch-fidelity and a Python file is run: name only ones you trust.
    PATH is a transformers folder, the demo's judge (.safetensors) or a Python file; NAME=PATH gives
    `inception` its weight file, and `clip` and `dinov2` the folder or Hub id to take.
    """
    name, _, source = spec.partition("=")
    try:
        if name == "inception":
            return InceptionFeatures(source or None, device)
        if spec.endswith(".py"):
            return load_python(spec, device)
        if spec.endswith(".safetensors"):
            return DemoJudge(spec, device)
        return TransformerFeatures(source or NAMES.get(name, spec), device)
    except LOAD_ERRORS as error:
        if isinstance(error, InputError):
            raise
        remedy = "give a local folder or file, --features NAME=PATH, where there is no network"
        raise refusal(f"--features {spec}", error, remedy) from error


def load_clip_score(source, device):
    """Return clip_score of a CLIP model's folder or Hub id, or of a Python file; raises InputError."""
    try:
        return load_python(source, device) if source.endswith(".py") else ClipScore(source, device)
    except LOAD_ERRORS as error:
        if isinstance(error, InputError):
            raise
        raise refusal(f"--clip_model {source}", error, "give a local folder, or none") from error


def load_lpips(source, device):
    """Return lpips of `vgg` (torch-fidelity) or of a Python file; raises InputError."""
    try:
        if source.endswith(".py"):
            return load_python(source, device)
        return Lpips(device)
    except LOAD_ERRORS as error:
        if isinstance(error, InputError):
            raise
        raise refusal(f"--lpips {source}", error, f"{INSTALL}; its weights need the network once") from error


def optional(module):
    """Return a module of an optional library; raises InputError with the install line if it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(f"{module.split('.')[0]} is missing ({error}): {INSTALL}") from error


def channels_first(pictures, device):
    """Return pictures as uint8 [N, 3, H, W] on the device."""
    return torch.as_tensor(pictures).permute(0, 3, 1, 2).contiguous().to(device)


class InceptionFeatures:
    """The 2,048 pool features of FID's Inception, by torch-fidelity."""

    def __init__(self, weights, device):
        """Load the network from a weight file, or by torch-fidelity from the network."""
        kind = optional("torch_fidelity.feature_extractor_inceptionv3").FeatureExtractorInceptionV3
        self.model = kind("inception-v3-compat", ["2048"], feature_extractor_weights_path=weights)
        self.model, self.device = self.model.eval().to(device), device

    @torch.no_grad()
    def __call__(self, pictures):
        """Return features [N, 2048]."""
        return self.model(channels_first(pictures, self.device))[0].double().cpu()


class TransformerFeatures:
    """The pooled features of any image model of transformers; CLIP's projected ones."""

    def __init__(self, source, device):
        """Load model and image processor from a folder or Hub id."""
        from transformers import AutoImageProcessor, AutoModel

        self.model = AutoModel.from_pretrained(source).eval().to(device)
        self.processor, self.device = AutoImageProcessor.from_pretrained(source), device

    @torch.no_grad()
    def __call__(self, pictures):
        """Return features [N, D]."""
        inputs = self.processor(images=list(channels_first(pictures, "cpu")), return_tensors="pt")
        get = getattr(self.model, "get_image_features", self.model)
        return get(pixel_values=inputs["pixel_values"].to(self.device)).pooler_output.double().cpu()


class ClipScore(TransformerFeatures):
    """CLIP's agreement of picture and prompt."""

    def __init__(self, source, device):
        """Load model, image processor and tokenizer."""
        from transformers import AutoTokenizer

        super().__init__(source, device)
        self.tokenizer = AutoTokenizer.from_pretrained(source)
        self.limit = self.model.config.text_config.max_position_embeddings

    @torch.no_grad()
    def __call__(self, pictures, prompts):
        """Return scores [N]; a prompt's words beyond the model's length are cut."""
        options = {"padding": True, "truncation": True, "max_length": self.limit, "return_tensors": "pt"}
        tokens = self.tokenizer(list(prompts), **options).to(self.device)
        texts = self.model.get_text_features(**tokens).pooler_output.double().cpu()
        seen = super().__call__(pictures)
        return 100 * torch.cosine_similarity(seen, texts).clamp(min=0)


class Lpips:
    """LPIPS with VGG-16, by torch-fidelity."""

    def __init__(self, device):
        """Load the network; torch-fidelity takes its weights from the network once."""
        kind = optional("torch_fidelity.sample_similarity_lpips").SampleSimilarityLPIPS
        self.model, self.device = kind("lpips-vgg16").to(device), device

    @torch.no_grad()
    def __call__(self, pictures, others):
        """Return distances [N] of pictures of the same size."""
        pair = (channels_first(x, self.device) for x in (pictures, others))
        return self.model(*pair).double().cpu().flatten()


class DemoJudge:
    """The judge of scripts/demo: features, and the share of a landscape caption that a picture shows."""

    def __init__(self, path, device):
        """Load the judge's weights."""
        sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "demo"))
        from judge import Judge
        from landscapes import ATTRIBUTES, labels_of

        if not Path(path).is_file():
            raise FileNotFoundError(f"{path}: not there")
        self.judge, self.labels_of, self.device = Judge.load(path).to(device), labels_of, device
        self.attributes = ATTRIBUTES

    def __call__(self, pictures):
        """Return features [N, 64]."""
        return self.judge.read(torch.as_tensor(pictures).to(self.device))[0].cpu()

    def is_landscape(self, prompt):
        """Return whether a prompt names all attributes, as the demo's captions do."""
        return all(any(f" {name} " in f" {prompt} " for name in names) for names in self.attributes)

    def accuracy(self, pictures, prompts):
        """Return the share of attributes that is right [N]; None unless all prompts are the demo's."""
        if not all(self.is_landscape(prompt) for prompt in prompts):
            return None
        labels = torch.tensor([self.labels_of(prompt) for prompt in prompts])
        found = self.judge.read(torch.as_tensor(pictures).to(self.device))[1].cpu()
        return (found == labels).double().mean(1)


def describe(spec):
    """Return the name of a feature model in tables: `inception`, `clip`, a file's stem or a folder's name."""
    name = spec.partition("=")[0]
    if name in ("inception", *NAMES):
        return name
    config = Path(spec) / "config.json"
    kind = json.loads(config.read_text()).get("model_type") if config.exists() else None
    return kind or Path(spec).stem
