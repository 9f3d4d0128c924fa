"""MAE's training step, restated in the simplest way: the baseline for our own MAE step.

He et al., "Masked Autoencoders Are Scalable Vision Learners", CVPR 2022. Written from the paper's equations and
the known behaviour of the published program, not from its source: two sorts for the mask, the whole forward under
one autocast, AdamW as torch constructs it, a gradient norm built from one norm per tensor, and a wait for the device
in every step, because the loss is read as a number and the device is synchronised before the log.

There are no options, checks or other objectives. Parameters have MAE's names, so weights can be copied between this
model and `models_mae.MaskedAutoencoderViT`.

N images   L patches, row-major   V visible patches   D encoder channels   E decoder channels   P pixel values
"""

from __future__ import annotations

import math
from functools import partial

import torch
from timm.layers import PatchEmbed
from timm.models.vision_transformer import Block
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn


def sincos_table(channels: int, rows: int, columns: int) -> Tensor:
    """Return the fixed positions `[1, 1 + L, channels]`: column first, then row; zeros for the class token."""
    quarter = channels // 4
    frequency = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    halves = []
    for place in (column, row):
        angle = place.reshape(-1, 1).double() * frequency
        halves += [angle.sin(), angle.cos()]
    table = torch.cat(halves, dim=1)
    return torch.cat([torch.zeros(1, channels, dtype=torch.float64), table]).float().unsqueeze(0)


class RestatedMAE(nn.Module):
    """The masked autoencoder; `forward(images, noise)` gives the loss, a scalar."""

    block: type[Block] = Block

    def __init__(
        self,
        img_size: int = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 192,
        depth: int = 12,
        num_heads: int = 12,
        decoder_embed_dim: int = 192,
        decoder_depth: int = 12,
        decoder_num_heads: int = 12,
        mask_ratio: float = 0.75,
        norm_pix_loss: bool = False,
    ):
        super().__init__()
        side = img_size // patch_size
        self.patch_size, self.mask_ratio, self.norm_pix_loss = patch_size, mask_ratio, norm_pix_loss
        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(sincos_table(embed_dim, side, side), requires_grad=False)
        self.blocks = self.stack(depth, embed_dim, num_heads)
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.decoder_embed = nn.Linear(embed_dim, decoder_embed_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_embed_dim))
        self.decoder_pos_embed = nn.Parameter(sincos_table(decoder_embed_dim, side, side), requires_grad=False)
        self.decoder_blocks = self.stack(decoder_depth, decoder_embed_dim, decoder_num_heads)
        self.decoder_norm = nn.LayerNorm(decoder_embed_dim, eps=1e-6)
        self.decoder_pred = nn.Linear(decoder_embed_dim, patch_size**2 * in_chans)
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)

    def stack(self, depth: int, channels: int, heads: int) -> nn.ModuleList:
        norm = partial(nn.LayerNorm, eps=1e-6)
        layer = partial(self.block, channels, heads, 4.0, qkv_bias=True, norm_layer=norm)  # type: ignore[arg-type]
        return nn.ModuleList(layer() for _ in range(depth))

    def patchify(self, images_NCHW: Tensor) -> Tensor:
        """Return the patches `[N, L, P]`, their values ordered row, column, channel."""
        n, channels, height, width = images_NCHW.shape
        p = self.patch_size
        grid = images_NCHW.reshape(n, channels, height // p, p, width // p, p)
        return torch.einsum("nchpwq->nhwpqc", grid).reshape(n, (height // p) * (width // p), p * p * channels)

    def choose(self, noise_NL: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return indices of the visible patches, the order that inverts the shuffle, and the mask (1 = removed)."""
        n, count = noise_NL.shape
        keep = int(count * (1 - self.mask_ratio))
        shuffle_NL = torch.argsort(noise_NL, dim=1)
        restore_NL = torch.argsort(shuffle_NL, dim=1)
        mask_NL = torch.ones(n, count, device=noise_NL.device)
        mask_NL[:, :keep] = 0
        return shuffle_NL[:, :keep], restore_NL, torch.gather(mask_NL, 1, restore_NL)

    def encode(self, tokens_NLD: Tensor, keep_NV: Tensor) -> Tensor:
        """Encode class token and visible patches: `[N, 1 + V, D]`."""
        index = keep_NV.unsqueeze(-1).repeat(1, 1, tokens_NLD.shape[2])
        visible_NVD = torch.gather(tokens_NLD, 1, index)
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(len(tokens_NLD), -1, -1)
        x = torch.cat([cls, visible_NVD], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def decode(self, latent: Tensor, restore_NL: Tensor) -> Tensor:
        """Return the prediction `[N, L, P]` for every patch."""
        x = self.decoder_embed(latent)
        hidden = self.mask_token.repeat(x.shape[0], restore_NL.shape[1] + 1 - x.shape[1], 1)
        full = torch.cat([x[:, 1:], hidden], dim=1)
        full = torch.gather(full, 1, restore_NL.unsqueeze(-1).repeat(1, 1, x.shape[2]))
        x = torch.cat([x[:, :1], full], dim=1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_pred(self.decoder_norm(x))[:, 1:]

    def reconstruction(self, images: Tensor, pred_NLP: Tensor, mask_NL: Tensor) -> Tensor:
        """Return the mean squared error over the removed patches."""
        target = self.patchify(images)
        if self.norm_pix_loss:
            mean, variance = target.mean(dim=-1, keepdim=True), target.var(dim=-1, keepdim=True)
            target = (target - mean) / (variance + 1e-6) ** 0.5
        error_NL = ((pred_NLP - target) ** 2).mean(dim=-1)
        return (error_NL * mask_NL).sum() / mask_NL.sum()

    def tokens(self, images: Tensor) -> Tensor:
        return self.patch_embed(images) + self.pos_embed[:, 1:]

    def forward(self, images: Tensor, noise_NL: Tensor) -> Tensor:
        keep_NV, restore_NL, mask_NL = self.choose(noise_NL)
        pred_NLP = self.decode(self.encode(self.tokens(images), keep_NV), restore_NL)
        return self.reconstruction(images, pred_NLP, mask_NL)


class RestatedStep:
    """One training step as the published program takes it: every step waits for the device, more than once."""

    def __init__(self, model: RestatedMAE, device: torch.device, amp: torch.dtype | None, lr: float = 1.5e-4):
        self.model, self.device, self.amp = model, device, amp
        self.optimizer = torch.optim.AdamW(param_groups_weight_decay(model, 0.05), lr=lr, betas=(0.9, 0.95))
        self.scaler = torch.amp.GradScaler(device.type, enabled=amp is torch.float16)

    def __call__(self, images: Tensor, noise_NL: Tensor) -> float:
        with torch.autocast(self.device.type, dtype=self.amp, enabled=self.amp is not None):
            loss = self.model(images, noise_NL)
        value = loss.item()
        if not math.isfinite(value):
            raise FloatingPointError(f"the loss is {value}")
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        norms = [torch.norm(p.grad, 2.0) for p in self.model.parameters() if p.grad is not None]
        torch.norm(torch.stack(norms), 2.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return value
