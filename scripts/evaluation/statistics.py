# SPDX-License-Identifier: Apache-2.0
"""Distances between two sets of features, and 95% intervals.

A mean gets the percentile bootstrap. The Fréchet distance must not: a resample repeats pictures, which adds
as much as drawing fewer of them does (with 192 pictures and 64 features more than the distance itself), so
the bootstrap's interval lies above the estimate. It gets the jackknife over groups of pictures; so does KID.
The interval says how far another such sample of as many pictures would fall; it does not hold the bias, which
is much the same for every row of the same number of pictures: compare with the floor.
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
    """Return the Fréchet distance of Gaussians fitted to features a [N, D] and b [M, D].

    arXiv:1706.08500, eq. 6: |mean_a - mean_b|^2 + trace(C_a) + trace(C_b) - 2 trace((C_a C_b)^(1/2)). With
    C = R^T R the last trace is the sum of the singular values of R_a R_b^T: no root of a nearly singular
    matrix is taken. Raises ValueError with fewer than 2 pictures, or two widths.
    """
    if min(len(a), len(b)) < 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"Fréchet distance of {tuple(a.shape)} and {tuple(b.shape)}: 2 or more of one width")
    (mean_a, root_a), (mean_b, root_b) = centred(a.double()), centred(b.double())
    cross = torch.linalg.svdvals(root_a @ root_b.T).sum()
    spread = root_a.square().sum() + root_b.square().sum()
    return float((mean_a - mean_b).square().sum() + spread - 2 * cross)


def kernel_distance(a, b, paired=False):
    """Return KID, the unbiased squared maximum mean discrepancy with the kernel (x.y/D + 1)^3.

    arXiv:1801.01401, section 4; over all pairs, in blocks of 1,000 rows. Can be below 0. `paired`: pictures i
    of both sets have the same prompt. As a set's pairs (i, i) are left out, so then are those between the
    sets (Gretton et al. 2012, JMLR 13, eq. 5): else these, which are alike, make the distance too small.
    """
    if min(len(a), len(b)) < 2 or (paired and len(a) != len(b)):
        raise ValueError("KID: give 2 or more features of each set, as many of both where they are paired")

    def kernel(products):
        return (products / a.shape[1] + 1) ** 3

    def total(x, y):
        return float(sum(kernel(part @ y.T).sum() for part in x.split(1000)))

    def unlike(x, y):
        return (total(x, y) - float(kernel((x * y).sum(1)).sum())) / (len(x) * (len(x) - 1))

    a, b = a.double(), b.double()
    across = unlike(a, b) if paired else total(a, b) / (len(a) * len(b))
    return unlike(a, a) + unlike(b, b) - 2 * across


def jackknife(distance, a, b, seed=0):
    """Return {value, low, high} of a distance of two sets: the delete-a-group jackknife, 95%.

    Var = (G-1)/G sum (d_g - mean d)^2, d_g without the g-th of G groups of both sets (Efron and Stein 1981;
    Kott 2001 for groups). Picture i of sets of the same length is in the same group, so pairs that share a
    prompt stay together. Without 2 pictures in each group there is no interval: low and high are None.
    """
    value = distance(a, b)
    if min(len(a), len(b)) < 2 * GROUPS:
        return {"value": value, "low": None, "high": None}
    draws = [torch.randperm(len(x), generator=torch.Generator().manual_seed(seed)) % GROUPS for x in (a, b)]
    left_out = torch.tensor([distance(a[draws[0] != g], b[draws[1] != g]) for g in range(GROUPS)]).double()
    error = ((GROUPS - 1) / GROUPS * (left_out - left_out.mean()).square().sum()).sqrt().item()
    return {"value": value, "low": value - T_95 * error, "high": value + T_95 * error}


def bootstrap_mean(values, resamples=1000, seed=0):
    """Return {value, low, high} of the mean of values [N]: the percentile bootstrap, 95%."""
    values = torch.as_tensor(values, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    means = torch.stack(
        [
            values[torch.randint(len(values), (len(values),), generator=generator)].mean()
            for _ in range(resamples)
        ]
    )
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return {"value": values.mean().item(), "low": low, "high": high}


def bias_curve(a, b):
    """Return [{pictures, distance}] of two draws of one thing, at several sizes: bias and nothing else."""
    sizes = sorted({n for n in (len(a) // 8, len(a) // 4, len(a) // 2, len(a)) if n >= 2})
    return [{"pictures": n, "distance": frechet_distance(a[:n], b[:n])} for n in sizes]
