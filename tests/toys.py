"""Two methods that exist only in the tests. They show the code that a new method needs, and that this is sufficient.

`register` adds them to the registry. A training process calls it before its program starts.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

import methods
from models_mae import MaskedAutoencoderViT
from models_targets import Target, patchify
from models_vit import Pretrainer
from options.schema import Options, result


class Brightness(Target):
    """Mean and maximum of each patch."""

    width = 2

    def __init__(self, patch_size):
        super().__init__()
        self.patch_size = patch_size

    def forward(self, images):
        patches = patchify(images, self.patch_size)
        return torch.stack([patches.mean(dim=-1), patches.amax(dim=-1)], dim=-1)

    def error(self, pred, target):
        return (pred - target).square().mean(dim=-1)


class BrightnessMAE(MaskedAutoencoderViT):
    def make_target(self):
        return Brightness(self.patch_size)


@dataclass(frozen=True, kw_only=True)
class TwinOptions(Options):
    momentum: float = result(0.9, section="Method")
    """Momentum of the teacher."""


class Twin(Pretrainer):
    """Two views: the student's feature of one view predicts the EMA teacher's feature of the other."""

    Options = TwinOptions

    def __init__(self, *sizes, **more):
        super().__init__(*sizes, **more)
        self.predictor = nn.Sequential(nn.Linear(self.embed_dim, 8), nn.BatchNorm1d(8), nn.Linear(8, self.embed_dim))
        self.init_weights()
        self.teacher = nn.ParameterList(p.detach().clone().requires_grad_(False) for p in self.blocks.parameters())

    def views(self, min_scale, hflip):
        (crop,) = super().views(min_scale, hflip)
        return (replace(crop, count=2),)

    def teach(self, images):
        names = [name for name, _ in self.blocks.named_parameters()]
        x = torch.cat([self.cls_token.expand(len(images), -1, -1), self.embed(images)], dim=1)
        return torch.func.functional_call(self.blocks, dict(zip(names, self.teacher, strict=True)), (x,))[:, 1:].mean(1)

    def forward(self, images, labels=None, *, noise=None):
        first, second = images
        with torch.no_grad():
            wanted = self.teach(second)
        found = self.predictor(self.encode(first)[:, 1:].mean(dim=1))
        loss = F.mse_loss(F.normalize(found, dim=-1), F.normalize(wanted, dim=-1))
        return {"loss": loss, "contrastive": loss}

    @torch.no_grad()
    def after_update(self, taken):
        for old, new in zip(self.teacher, self.blocks.parameters(), strict=True):
            old.copy_(torch.where(taken, old.lerp(new, 1 - self.options.momentum), old))


def register():
    methods.METHODS["brightness_mae"] = methods.Method(BrightnessMAE, note="toy target")
    methods.METHODS["twin"] = methods.Method(Twin, TwinOptions, note="toy with two views and a teacher")
