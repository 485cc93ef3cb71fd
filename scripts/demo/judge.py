# SPDX-License-Identifier: Apache-2.0
"""The judge: a small network that reads a landscape's four attributes off the picture.

Its logits give prompt-following accuracy, its features the Fréchet distance between two sets of pictures.
"""

from pathlib import Path

import torch
from landscapes import ATTRIBUTES
from safetensors.torch import load_file, save_file
from torch import nn

FEATURES = 64


class Judge(nn.Module):
    """Seven convolutions, a feature layer, and one linear head over all attribute values."""

    def __init__(self):
        super().__init__()
        layers, channels = [], 3
        for width, stride in ((24, 2), (48, 1), (48, 2), (96, 1), (96, 2), (128, 1), (128, 2)):
            layers += [nn.Conv2d(channels, width, 3, stride, 1), nn.GroupNorm(8, width), nn.SiLU()]
            channels = width
        self.body = nn.Sequential(*layers)
        self.features = nn.Linear(channels * 4, FEATURES)
        self.head = nn.Linear(FEATURES, sum(map(len, ATTRIBUTES)))

    def forward(self, pixels):
        """Return (features [B, FEATURES], logits of each attribute) of pixels [B,3,H,W] in [-1,1]."""
        features = self.features(nn.functional.adaptive_avg_pool2d(self.body(pixels), 2).flatten(1))
        logits = self.head(nn.functional.silu(features))
        return features, logits.split([len(names) for names in ATTRIBUTES], dim=1)

    @classmethod
    def load(cls, path):
        judge = cls()
        judge.load_state_dict({name: value.float() for name, value in load_file(path).items()})
        return judge.eval().requires_grad_(False)

    def save(self, path):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        save_file({name: value.half().contiguous() for name, value in self.state_dict().items()}, path)

    @torch.no_grad()
    def read(self, pictures):
        """Return (features [N, FEATURES] f64, attribute indices [N, 4]) of uint8 pictures [N,H,W,3]."""
        features, predicted = [], []
        for chunk in torch.as_tensor(pictures).split(256):
            f, logits = self(chunk.permute(0, 3, 1, 2).float() / 127.5 - 1)
            features.append(f.cpu().double())  # MPS has no float64
            predicted.append(torch.stack([part.argmax(1) for part in logits], dim=1).cpu())
        return torch.cat(features), torch.cat(predicted)
