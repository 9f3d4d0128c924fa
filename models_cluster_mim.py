"""ClusterMIM: MAE that predicts the token of each hidden patch instead of its pixels.

Du et al., "On the Role of Discrete Tokenization in Visual Representation Learning", ICLR 2024. The tokens are the
numbers of k-means centres of raw patches, or of features of a trained encoder; `python -m tools.tokenizer kmeans` fits
them. A trained tokenizer (models_tokenizer.py) can take their place. The loss is the cross-entropy over hidden patches;
training predicts no others.

The neighbour term of NoR-MAE can be added: it relates the logits of hidden patches (`space: pixels`, that is, the
predictions) or their decoder embeddings (`space: embedding`), with `tokens: all`.

N images   L patches, row by row   V visible patches   E decoder channels   K tokens
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from models_beit import TokenPrediction
from models_mae import MaskedAutoencoderViT, Masking, View, by_rank, take
from models_vit import at_least_float32, without_autocast
from options.cluster_mim import ClusterMIMOptions


class ClusterMIM(TokenPrediction, MaskedAutoencoderViT):
    """MAE with tokens as target."""

    Options: ClassVar[type] = ClusterMIMOptions
    options: ClusterMIMOptions

    @torch.no_grad()
    def init_predictor(self) -> None:
        nn.init.xavier_uniform_(self.decoder_pred.weight)
        nn.init.zeros_(self.decoder_pred.bias)

    @property
    def num_predicted(self) -> int:
        return self.num_patches - self.num_visible

    def hidden(self, ids_restore: Tensor) -> Tensor:
        """Return the hidden patches `[N, L - V]`."""
        return by_rank(ids_restore)[:, self.num_visible :]

    def decode(self, latent: Tensor, masking: Masking, taps: dict[int, Tensor]) -> Tensor:
        """Decode `[N, 1 + V, D]` to the hidden patches: `[N, L - V, E]`, after the decoder's norm."""
        return take(super().decode(latent, masking, taps), self.hidden(masking.ids_restore))

    def target_loss(self, view: View) -> Tensor:
        """Return the mean cross-entropy over the hidden patches of all images."""
        with without_autocast(view.pred):
            target = self.target(view.images).gather(1, self.hidden(view.ids_restore))
            return self.target.error(view.pred, target).mean()

    def predict(self, images: Tensor, *, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the logits `[N, L, K]` of every patch and the mask `[N, L]`, 1 = removed."""
        view = self.observe(images, noise=noise)
        everything = Masking(view.ids_keep, view.ids_restore, view.mask)
        decoded = super().decode(view.latent, everything, view.taps)
        return at_least_float32(self.decoder_pred(decoded)), view.mask
