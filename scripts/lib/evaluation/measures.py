# SPDX-License-Identifier: Apache-2.0
"""From kept pictures to figures: features and scores of each picture, distances and means of each row."""

from functools import partial

import torch
from accelerate.utils import gather_object
from model_args import InputError

from evaluation.features import describe, load_clip_score, load_features, load_lpips
from evaluation.gallery import read_real
from evaluation.statistics import KernelDistance, bootstrap_mean, frechet_distance, jackknife

DISTANCES = ("FD", "KID")
SCORES = {
    "clip_score": "CLIP score (higher is better)",
    "accuracy": "share of caption attributes shown (higher is better)",
    "lpips": "LPIPS to the teacher's picture of the same noise",
    "diversity": "LPIPS between pictures of one prompt",
}
NOTES = (
    "FD is the Fréchet distance and KID the squared maximum mean discrepancy of the features of two sets of "
    "pictures; smaller is nearer. To 'teacher': to the teacher's own many-step pictures of the same prompts "
    "with other noise, which needs no real pictures. To 'real': to the pictures of --reference.",
    "The first row is the teacher drawn a second time. Its distance is the floor: what a perfect LoRA would "
    "have. It is above 0 because the FD of few pictures is too large; the table of that shows by how much. "
    "KID has no such bias, and can be below 0.",
    "In brackets are 95% intervals: percentile bootstrap over pictures for means, jackknife over 20 groups "
    "of pictures for FD and KID, since resampling with repeats would inflate an FD; fewer than 40 pictures "
    "have none. Rows whose intervals overlap widely are not known to differ. An interval does not hold the "
    "bias of FD: that the floor shows.",
    "UNet evaluations count a guided step as two. Seconds are for one picture when a batch is drawn, in text "
    "encoder, UNet and VAE. Peak memory is the accelerator's, or the process's on a CPU.",
)


class Measures:
    """The models that judge, loaded once."""

    def __init__(self, args, device):
        """Load the models that the flags name; raises InputError for one that is not to be had."""
        self.features = {describe(spec): load_features(spec, device) for spec in args.features}
        if len(self.features) < len(args.features):
            raise InputError(f"--features {' '.join(args.features)}: two have the same name; rename one")
        self.clip_score = None if args.clip_model == "none" else load_clip_score(args.clip_model, device)
        self.lpips = None if args.lpips == "none" else load_lpips(args.lpips, device)

    def read(self, gallery, row, teacher, indices):
        """Return {measure: [(index, values)]} of some of a row's pictures."""
        pictures, prompts = gallery.read(row, indices), [gallery.prompt(index) for index in indices]
        values = {name: (indices, model(pictures)) for name, model in self.features.items()}
        for model in self.features.values():
            shares = model.accuracy(pictures, prompts) if hasattr(model, "accuracy") else None
            if shares is not None:
                values["accuracy"] = (indices, shares)
        if self.clip_score:
            values["clip_score"] = (indices, self.clip_score(pictures, prompts))
        if self.lpips:
            if row.name not in ("teacher", "reference"):
                values["lpips"] = (indices, self.lpips(pictures, gallery.read(teacher, indices)))
            again = [i for i in indices if i + len(gallery.prompts) < gallery.count]
            if again:
                others = gallery.read(row, [i + len(gallery.prompts) for i in again])
                values["diversity"] = (again, self.lpips(gallery.read(row, again), others))
        return {key: list(zip(which, found, strict=True)) for key, (which, found) in values.items()}

    def row(self, gallery, row, teacher):
        """Return {measure: values in order of pictures} of a row, from the shares of all processes."""
        found = {}
        for block in gallery.blocks:
            for key, pairs in self.read(gallery, row, teacher, list(block)).items():
                found.setdefault(key, []).extend(pairs)
        merged = {}
        for part in gather_object([found]):
            for key, pairs in part.items():
                merged.setdefault(key, []).extend(pairs)
        return {
            key: torch.stack([v for _, v in sorted(pairs, key=lambda p: p[0])])
            for key, pairs in merged.items()
        }

    def real(self, paths, size, accelerator):
        """Return {feature model: features} of real pictures; raises InputError if they are fewer than 2."""
        found = {name: [] for name in self.features}
        for pictures in read_real(paths, size, accelerator.process_index, accelerator.num_processes):
            for name, model in self.features.items():
                found[name].append(model(pictures))
        shares = gather_object([{name: torch.cat(parts) for name, parts in found.items() if parts}])
        real = {
            name: torch.cat([share[name] for share in shares if name in share])
            for name in found
            if any(shares)
        }
        if not real or min(map(len, real.values())) < 2:
            raise InputError(f"--reference {' '.join(map(str, paths))}: fewer than two pictures there")
        return real


def records(gallery, row):
    """Return the records of a row's pictures, of all processes."""
    mine = [gallery.record(row, index) | {"block": block[0]} for block in gallery.blocks for index in block]
    return gather_object(mine)


def frechet_to(reference, features):
    """Return the Fréchet distance of features to those of a reference as {value, low, high}."""
    return jackknife(frechet_distance, features, reference)


def distances_to(references):
    """Return {figure: (feature model, function of a row's features)} of {name: {feature model: features}}."""
    found = {}
    for against, features in references.items():
        for model, reference in features.items():
            found[f"FD/{model}/{against}"] = model, partial(frechet_to, reference)
            by_prompt = against == "teacher"
            found[f"KID/{model}/{against}"] = model, KernelDistance(reference, paired=by_prompt)
    return found


def score_row(values, distances, took):
    """Return {figure: {value, low, high}} of a row: distances, means of scores, seconds of its records."""
    figures = {figure: distance(values[model]) for figure, (model, distance) in distances.items()}
    figures |= {key: bootstrap_mean(values[key]) for key in SCORES if key in values}
    by_block = {record["block"]: record["seconds"] for record in took}
    figures["seconds"] = bootstrap_mean([by_block[block] for block in sorted(by_block)])
    return figures


def titles(features, references):
    """Return {figure: title} of all figures, in the order of the table's columns."""
    pairs = {f"{k}/{m}/{r}": f"{k}, {m}, to {r}" for r in references for m in features for k in DISTANCES}
    return pairs | SCORES | {"seconds": "seconds a picture"}
