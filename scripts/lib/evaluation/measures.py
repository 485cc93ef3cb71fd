# SPDX-License-Identifier: Apache-2.0
"""From kept pictures to figures: features and scores of each picture, distances and means of each row."""

import json
from collections import Counter
from functools import partial
from pathlib import Path

import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from lib.evaluation.feature_models import HUB_MODELS, describe_model, load_clip_score, load_features
from lib.evaluation.pictures import read_real, real_pictures
from lib.evaluation.statistics import bootstrap_mean, frechet_distance, jackknife, pairwise_distances, spread
from lib.trainers import UnusableInput, sd15

SCORES = {
    "clip_score": "CLIP score (higher is better)",
    "accuracy": "share of caption attributes shown (higher is better)",
}
NOTES = (
    "FD is the Fréchet distance of the features of two sets of pictures; smaller is nearer. To 'teacher': to the "
    "teacher's own many-step pictures of the same prompts with other noise, which needs no real pictures. To "
    "'real': to the pictures of --reference.",
    "The first row is the teacher drawn a second time. Its distance is the floor: what a perfect LoRA would "
    "have. It is above 0 because the FD of few pictures is too large, by less for pictures that vary less: a row "
    "at the floor or below may lack variety. Read the spread beside it, and take at least 5 pictures a feature "
    "(CLIP has 768, Inception 2,048).",
    "Spread is the mean distance, in features, of two pictures of one prompt, as a share of the teacher's. "
    "Below 1 they are more alike. It needs several pictures of a prompt: more --num_images than prompts.",
    "In brackets, or after ±, are 95% intervals: percentile bootstrap over pictures for means, jackknife over "
    "20 groups of pictures for FD and of prompts for the spread, since resampling with repeats would "
    "inflate an FD; fewer than 40 have none. Rows whose intervals overlap widely are not known to differ. No "
    "interval holds the bias of FD.",
    "UNet evaluations count a guided step as two. Seconds are for one picture when a batch is drawn, in text "
    "encoder, UNet and VAE.",
)


class Measures:
    """The models that judge, loaded once: on the CPU while pictures are drawn, then moved to the device."""

    def __init__(self, args, device):
        models = [load_features(spec, device) for spec in args.features]
        self.features = dict(zip(map(describe_model, args.features), models, strict=True))
        if len(self.features) < len(args.features):
            raise UnusableInput(f"--features {' '.join(args.features)}: two have the same name; rename one")
        self.clip_score = None if args.clip_model == "none" else load_clip_score(args.clip_model, device)

    def to(self, device):
        for model in (*self.features.values(), self.clip_score):
            if hasattr(model, "to"):
                model.to(device)

    def read(self, gallery, row, indices):
        """Return {measure: {index: value}} of some of a row's pictures."""
        pictures, prompts = gallery.read(row, indices), [gallery.prompt(index) for index in indices]
        values = {name: model(pictures) for name, model in self.features.items()}
        for model in self.features.values():
            shares = model.accuracy(pictures, prompts) if hasattr(model, "accuracy") else None
            if shares is not None:
                values["accuracy"] = shares
        if self.clip_score:
            values["clip_score"] = self.clip_score(pictures, prompts)
        copies = {key: [row.clone() for row in found] for key, found in values.items()}  # pickle sends a view whole
        return {key: dict(zip(indices, found, strict=True)) for key, found in copies.items()}

    def row(self, gallery, row):
        """Return {measure: values in order of pictures} of a row, from the shares of all processes."""
        found = {}
        for part in gather_object([self.read(gallery, row, list(block)) for block in gallery.blocks]):
            for key, values in part.items():
                found.setdefault(key, {}).update(values)
        whole = {key: values for key, values in found.items() if len(values) == gallery.count}
        return {key: torch.stack([values[index] for index in sorted(values)]) for key, values in whole.items()}

    def real(self, paths, size, accelerator):
        found = {name: [] for name in self.features}
        rank, processes = accelerator.process_index, accelerator.num_processes
        for pictures in read_real(paths, size, sd15.Skipped(), rank, processes):
            for name, model in self.features.items():
                found[name].append(model(pictures))
        shares = gather_object([{name: torch.cat(parts) for name, parts in found.items() if parts}])
        return {name: torch.cat([share[name] for share in shares if share]) for name in found}


def check_real(paths, accelerator):
    """Decode the pictures of --reference before anything is drawn, and report those that cannot be used."""
    skipped, rank, processes = sd15.Skipped(), accelerator.process_index, accelerator.num_processes
    usable = sum(gather_object([sum(1 for _ in real_pictures(paths, skipped, rank, processes))]))
    left_out = sd15.describe(sum(map(Counter, gather_object([dict(skipped)])), Counter()))
    left_out = left_out and f"; left out: {left_out}"
    if usable < 2:
        raise UnusableInput(f"--reference {' '.join(map(str, paths))}: fewer than two pictures there{left_out}")
    accelerator.print(f"--reference: {usable} pictures{left_out}")


def load_yardstick(args, names):
    """Return {feature model: features [P, S, D]} of --yardstick: S pictures of each prompt, as kept there."""
    try:
        with safe_open(args.yardstick, "pt") as file:
            name, known, features = file.metadata()["features"], file.metadata(), file.get_tensor("features").double()
    except (OSError, LookupError, TypeError, SafetensorError) as error:
        raise UnusableInput(f"--yardstick {args.yardstick}: cannot be read ({error})") from error
    if name not in names:
        raise UnusableInput(f"--yardstick {args.yardstick}: holds features of {name}; give --features of it")
    judge = next(spec for spec in args.features if describe_model(spec) == name)
    for key, value in drawn_by(args, judge).items():
        if sd15.differences({key: known.get(key, value)}, {key: value}):
            raise UnusableInput(f"--yardstick {args.yardstick}: is of another {key}; --draw_yardstick makes one")
    return {name: features[: len(args.prompts)][: args.num_images]}


def drawn_by(args, judge):
    """Return what a yardstick's header tells of its pictures: the names of models, or checksums of local ones."""
    model, rest = args.pretrained_teacher_model, ("vae*", "text_encoder*", "tokenizer*", "scheduler*")
    teacher = sd15.fingerprint(Path(model), ("unet*",)) if Path(model).exists() else f"{model} {args.teacher_revision}"
    found, judge = {"teacher": teacher, "prediction type": str(args.prediction_type)}, judge.rpartition("=")[2]
    places = {"VAE": args.pretrained_vae_model_name_or_path, "teacher_config": args.teacher_config}
    places |= {"rest of the teacher": model, "feature model": HUB_MODELS.get(judge, judge)}
    for key, path in places.items():
        parts = rest if key in ("VAE", "rest of the teacher") else ()
        found[key] = sd15.fingerprint(Path(path), parts) if path and Path(path).exists() else str(path)
    return found | ({"resolution": str(args.resolution)} if args.resolution else {})


def save_yardstick(args, features, side):
    """Write features {model: [S * P, D]} of a row with S pictures of each prompt, `side` px, as --yardstick."""
    ((name, values),) = features.items()
    by_prompt = values.unflatten(0, (-1, len(args.prompts))).transpose(0, 1).half().contiguous()
    settings = {"prompts": json.dumps(args.prompts), "features": name, "teacher_steps": str(args.teacher_steps)}
    settings |= {"guidance_scale": f"{args.guidance_scale[0]:g}", "seed": str(args.seed)}
    settings |= drawn_by(args, args.features[0]) | {"resolution": str(side)}
    sd15.write_atomically(args.yardstick, save({"features": by_prompt}, settings))
    print(f"{args.yardstick}: {tuple(by_prompt.shape)}, features of {name}")


def frechet_to(reference, features):
    """Return {value, low, high} of the Fréchet distance to a reference [N, D], or [P, S, D] by prompt."""
    if reference.ndim == 3 and len(features) > len(reference):
        features = features.unflatten(0, (-1, len(reference))).transpose(0, 1)
    return jackknife(frechet_distance, features, reference)


def spread_beside(reference, prompts, features):
    if reference.ndim == 3:
        reference, prompts = reference.transpose(0, 1).flatten(0, 1), len(reference)
    return spread(*(pairwise_distances(x, prompts) for x in (features, reference)))


def distances_to(references, prompts):
    """Return {figure: (feature model, function of a row's features)} of {name: {feature model: features}}.

    The pictures of the rows have `prompts` prompts in turn.
    """
    found = {}
    for against, features in references.items():
        for model, reference in features.items():
            found[f"FD/{model}/{against}"] = model, partial(frechet_to, reference)
            if against == "teacher":
                found[f"spread/{model}"] = model, partial(spread_beside, reference, prompts)
    return found


def score_row(values, distances, took):
    """Return {figure: {value, low, high}} of a row: distances, means of scores, seconds of its records."""
    figures = {figure: distance(values[model]) for figure, (model, distance) in distances.items()}
    figures |= {key: bootstrap_mean(values[key]) for key in SCORES if key in values}
    sizes = Counter(record["block"] for record in took)  # the last block may be smaller, and slower a picture
    by_block = {record["block"]: record["seconds"] for record in took if sizes[record["block"]] == max(sizes.values())}
    figures["seconds"] = bootstrap_mean([by_block[block] for block in sorted(by_block)])
    return figures


def titles(features, references):
    pairs = {f"FD/{m}/{r}": f"FD, {m}, to {r}" for r in references for m in features}
    return pairs | {f"spread/{m}": f"spread, {m}" for m in features} | SCORES | {"seconds": "seconds a picture"}
