# SPDX-License-Identifier: Apache-2.0
"""Distances between two sets of features, and 95% intervals.

A mean gets the percentile bootstrap. The Fréchet distance must not: a resample repeats pictures, which adds
as much as drawing fewer of them does (with 192 pictures and 64 features more than the distance itself), so
the bootstrap's interval lies above the estimate. It gets the jackknife over groups of pictures.
That interval does not hold the bias: read the spread beside it.
"""

import torch

GROUPS = 20
T_95 = 2.093  # Student's t, 97.5%, GROUPS - 1 degrees of freedom


def centred(features):
    """Return (mean [D], factor R with R^T R = covariance; R is [min(N, D), D]) of features [N, D] f64."""
    mean = features.mean(0)
    factor = (features - mean) / (len(features) - 1) ** 0.5
    if len(factor) > factor.shape[1]:
        factor = torch.linalg.qr(factor, mode="r").R
    return mean, factor


def frechet_distance(a, b):
    """Return the Fréchet distance of Gaussians fitted to features a [..., D] and b [..., D].

    arXiv:1706.08500, eq. 6: |mean_a - mean_b|^2 + trace(C_a) + trace(C_b) - 2 trace((C_a C_b)^(1/2)). With C = R^T R
    the last trace is the sum of the singular values of R_a R_b^T: no root of a nearly singular matrix is taken.
    """
    a, b = a.flatten(0, -2), b.flatten(0, -2)
    (mean_a, root_a), (mean_b, root_b) = centred(a.double()), centred(b.double())
    cross = torch.linalg.svdvals(root_a @ root_b.T).sum()
    spread = root_a.square().sum() + root_b.square().sum()
    return float((mean_a - mean_b).square().sum() + spread - 2 * cross)


def jackknife(distance, a, b):
    """Return {value, low, high} of a distance of two sets: the delete-a-group jackknife, 95%.

    Items i of sets of the same length are in the same group, so pictures of one prompt stay together. Without 2 items
    in each group low and high are None.
    """
    groups = [torch.randperm(len(x), generator=torch.Generator().manual_seed(0)) % GROUPS for x in (a, b)]
    value = distance(a, b)
    if min(len(a), len(b)) < 2 * GROUPS:
        return {"value": value, "low": None, "high": None}
    left_out = [distance(a[groups[0] != g], b[groups[1] != g]) for g in range(GROUPS)]
    left_out = torch.tensor(left_out, dtype=torch.float64)
    # Var = (G-1)/G sum (d_g - mean d)^2, d_g without the g-th group (Efron and Stein 1981; Kott 2001 for groups).
    error = ((GROUPS - 1) / GROUPS * (left_out - left_out.mean()).square().sum()).sqrt().item()
    return {"value": value, "low": value - T_95 * error, "high": value + T_95 * error}


def bootstrap_mean(values, resamples=1000, seed=0):
    """Return {value, low, high} of the mean of values [N]: the percentile bootstrap, 95%."""
    values = torch.as_tensor(values, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    draws = (torch.randint(len(values), (len(values),), generator=generator) for _ in range(resamples))
    means = torch.stack([values[draw].mean() for draw in draws])
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return {"value": values.mean().item(), "low": low, "high": high}


def pairwise_distances(features, prompts):
    """Return [P], by prompt, the mean distance of two pictures of it; nan for a prompt with one picture.

    features [N, D]: picture i has prompt i modulo `prompts`.
    """
    found = [torch.pdist(features[prompt::prompts].double()) for prompt in range(prompts)]
    return torch.stack([distances.mean() for distances in found])  # the mean of none is nan


def spread(mine, teachers):
    """Return {value, low, high} of the pairwise distances [P] as a share of the teacher's, by jackknife.

    None where no prompt has two pictures. Below 1 the pictures of a prompt are more alike than the teacher's.
    """
    known = ~(mine.isnan() | teachers.isnan())
    if not known.any():
        return None
    return jackknife(lambda a, b: float(a.mean() / b.mean()), mine[known], teachers[known])
