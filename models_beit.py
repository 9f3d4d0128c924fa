"""BEiT: the tokens of hidden patches are predicted from the rest of the image.

Bao et al., "BEiT: BERT Pre-Training of Image Transformers", ICLR 2022. Rectangles of patches are replaced by a learned
token; a linear layer on the encoder's last norm gives the logits of the K tokens for hidden patches only, and the loss
is the cross-entropy with the tokens of a frozen tokenizer. The released code uses DALL-E's tokenizer, whose file is a
pickle; here the tokenizer is trained on the user's own images (models_tokenizer.py).

The encoder has absolute positions and no layer scale, as the release's 800-epoch variant for ImageNet-1K. Differences:
positions are fixed sine-cosine instead of learned, the encoder's initial weights are MAE's, the tokenizer sees the
pixels of the model (the release resizes its crop with another filter), and colours are jittered after the crop, not
before.

`TokenPrediction` is what BEiT and ClusterMIM share. PeCo is BEiT with the tokens of a tokenizer that was trained with a
perceptual loss; no code of it was released, so `peco` is an interpretation of the paper's abstract.

N images   L patches, row by row   D encoder channels   Q predicted patches   K tokens
"""

from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from models_mae import MaskedImageModel, View, take
from models_simmim import BlockMaskedViT
from models_targets import Target, Tokens
from models_tokenizer import load_tokenizer, require_digest
from models_vit import Crop, Reader, at_least_float32, set_drop_path, without_autocast
from options.beit import BEiTOptions, TokenOptions


class TokenPrediction(MaskedImageModel):
    """Mixin: the target is the token of each patch. The tokenizer is read by `prepare` and is in no checkpoint."""

    target: Tokens

    @property
    def token_options(self) -> TokenOptions:
        options = self.options
        assert isinstance(options, TokenOptions)
        return options

    def make_target(self) -> Target:
        options = self.token_options
        return Tokens(options.tokens or 2, options.label_smoothing)  # `prepare` sets the true number

    def prepare(self, read: Reader, classes: int | None) -> None:
        """Read the tokenizer, and give the last layer as many outputs as there are tokens."""
        super().prepare(read, classes)
        options = self.token_options
        if self.target.tokenizer.network is not None:
            return
        if not options.tokenizer:
            raise ValueError(
                "tokens are predicted, and no tokenizer is given: train one (--method vq_tokenizer) or fit one (python "
                "-m tools.tokenizer kmeans), and name it with --tokenizer"
            )
        tokenizer, digest, made_with = load_tokenizer(read, options.tokenizer)
        require_digest("token_digest", options.token_digest, digest, options.tokenizer)
        if made_with["in_chans"] != self.in_chans:
            raise ValueError(
                f"{options.tokenizer} is for images of {made_with['in_chans']} channels, in_chans is {self.in_chans}"
            )
        if options.tokens not in (0, tokenizer.tokens):
            raise ValueError(f"tokens is {options.tokens}, and {options.tokenizer} has {tokenizer.tokens}")
        if not options.tokens:
            self._make_predictor(tokenizer.tokens)
        self.target.hold(tokenizer, self.grid)
        self.helpers = {options.tokenizer: made_with}
        self.options = replace(options, tokens=tokenizer.tokens, token_digest=digest)

    def _make_predictor(self, tokens: int) -> None:
        self.target.width = tokens
        self.decoder_pred = nn.Linear(self.decoder_pred.in_features, tokens)
        self.init_predictor()

    @torch.no_grad()
    def init_predictor(self) -> None:
        """Set the initial weights of the last layer."""
        nn.init.trunc_normal_(self.decoder_pred.weight, std=0.02)
        nn.init.zeros_(self.decoder_pred.bias)

    @torch.no_grad()
    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        super().init_weights(mode, needs_reset)
        self.init_predictor()

    def resized(self, before: tuple[int, int]) -> None:
        super().resized(before)
        if self.target.tokenizer.network is not None:
            self.target.hold(self.target.tokenizer.network, self.grid)


class BEiT(TokenPrediction, BlockMaskedViT):
    """Replace blocks, predict tokens of hidden patches."""

    Options: ClassVar[type] = BEiTOptions
    options: BEiTOptions
    smallest_share: ClassVar[float] = 16 / 75

    def __init__(self, *sizes: Any, **more: Any) -> None:
        super().__init__(*sizes, **more)
        set_drop_path(self.blocks, self.options.drop_path)

    def views(self, min_scale: float, hflip: float) -> tuple[Crop, ...]:
        """Return one crop, with the jitter of brightness, contrast and saturation of `color_jitter`."""
        (crop,) = super().views(min_scale, hflip)
        strength = self.options.color_jitter
        if not strength:
            return (crop,)
        return (replace(crop, jitter=(strength, strength, strength, 0.0), jitter_prob=1.0),)

    def no_weight_decay(self) -> set[str]:
        """Return the class token, which the release does not decay; it decays the mask token."""
        return {"cls_token"}

    @property
    def num_predicted(self) -> int:
        return self.num_hidden

    def select(self, tokens: Tensor, mask: Tensor) -> Tensor:
        return take(tokens, self.predicted(mask))

    def target_loss(self, view: View) -> Tensor:
        """Return the mean cross-entropy over the hidden patches of all images of all ranks."""
        with without_autocast(view.pred):
            ids = self.predicted(view.mask)
            error = self.target.error(view.pred, self.target(view.images).gather(1, ids))
            return self.mean_over_hidden(error, view.mask.gather(1, ids))

    def predict(self, images: Tensor, *, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the logits `[N, L, K]` of every patch and the mask `[N, L]`, 1 = hidden."""
        noise = self._complete(noise, images)
        mask = self.draw_mask(noise[:, 0])
        latent, _ = self.encode_replaced(self.embed(images), mask)
        return at_least_float32(self.decoder_pred(latent[:, 1:])), mask
