"""NoR-MAE: relate the prediction from the visible patches to the prediction from their closest neighbours.

Meng et al., "Closest Neighbors are Harmful for Lightweight Masked Auto-encoders", CVPR 2025. The closest neighbour of
each visible patch is passed through the same encoder and decoder in that patch's place, without gradient. The term is
a sum over C, the mean over images and tokens of Z^T Z', a P x P matrix of the two predictions, which is not formed.

With the paper's standardised tokens every row of Z sums to zero, and therefore C too. Its off-diagonal sum is minus its
trace: -(P - 1) times the mean correlation of the two predictions. Minimising it makes the predictions similar.

N images   L patches, row by row   V visible patches   D encoder channels   E decoder channels
P pixel values of a patch   K neighbour slots
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from models_mae import (
    MaskedAutoencoderViT,
    MaskedImageModel,
    Masking,
    Term,
    View,
    at_least_float32,
    by_rank,
    mean_over_ranks,
    random_masking,
    take,
    without_autocast,
)
from models_targets import patchify, standardize
from options.nor_mae import Border, NeighborOptions, Normalize, Relation
from options.schema import require_choice

LINEAR = ("off_diagonal", "diagonal", "token_off_diagonal")  # relations, in the first prediction
AHEAD = ((0, 1), (1, -1), (1, 0), (1, 1))  # rows, columns: half of the eight neighbours; the others are opposite
K = 2 * len(AHEAD)
EPS = 1e-6


# ---- neighbours -----------------------------------------------------------------------------------------------------


def spans(length: int, step: int, border: str) -> list[tuple[slice, slice]]:
    """Return pairs of slices (here, there) of equal length along one side of the grid, with there = here + step."""
    first, last = slice(0, 1), slice(length - 1, length)
    if step == 0:
        return [(slice(0, length), slice(0, length))]
    here, there = slice(0, length - 1), slice(1, length)
    around = [(last, first)] if border == "wrap" else []
    pairs = [(here, there), *around]
    return pairs if step == 1 else [(there, here) for here, there in pairs]


def neighbor_blocks(grid: tuple[int, int], border: str) -> Iterator[tuple[int, tuple, tuple]]:
    """Yield all pairs of neighbours as (slot, here, there): indices of two blocks of a grid `[N, rows, columns, ...]`.

    A patch of the block `there` is neighbour number `slot` of the patch at the same place in the block `here`, which is
    in turn its neighbour number K - 1 - slot.
    """
    for index, (down, right) in enumerate(AHEAD):
        for row, other_row in spans(grid[0], down, border):
            for column, other_column in spans(grid[1], right, border):
                everything = slice(None)
                yield K // 2 + index, (everything, row, column), (everything, other_row, other_column)


def neighbor_table(grid: tuple[int, int], border: str = "natural", device: torch.device | None = None) -> Tensor:
    """Return the indices of the neighbours of each patch.

    Args:
        grid: Rows and columns of patches.
        border: `natural`: 3 neighbours in a corner, 5 at an edge, 8 elsewhere; `wrap`: 8 everywhere, as on a torus.

    Returns:
        `[L, K]` int64 in a fixed order of directions; L where there is no neighbour.

    Raises:
        ValueError: The grid has a single patch.
    """
    require_choice("border", border, Border)
    rows, columns = grid
    L = rows * columns
    if L < 2:
        raise ValueError(
            f"a grid of {rows} x {columns} patches has no neighbours: use smaller patches or larger images"
        )
    patch = torch.arange(L, device=device).reshape(1, rows, columns)
    table = torch.full((1, rows, columns, K), L, device=device)
    for slot, here, there in neighbor_blocks(grid, border):
        table[(*here, slot)] = patch[there]
        table[(*there, K - 1 - slot)] = patch[here]
    return table.masked_fill(table == patch[..., None], L).reshape(L, K)  # on a narrow torus a patch meets itself


def neighbor_similarities(tokens: Tensor, grid: tuple[int, int], border: str) -> tuple[Tensor, Tensor]:
    """Compute the cosine similarity of each patch with its neighbours.

    Cosines are symmetric, so four shifted products of the grid with itself fill the eight slots.

    Returns:
        The similarities `[N, L, K]` and the neighbours `[L, K]` in ascending order. Where a patch has no neighbour the
        similarity is -inf and the neighbour L. A similarity that is NaN becomes -1, the lowest cosine, because argmax
        and comparisons treat NaN differently in eager and compiled code; the NaN itself reaches the loss through the
        tokens.
    """
    N, L, _ = tokens.shape
    if L != grid[0] * grid[1]:
        raise ValueError(f"{L} patches do not form a grid of {grid[0]} x {grid[1]}")
    table_LK, order_LK = neighbor_table(grid, border, tokens.device).sort(dim=-1)
    with without_autocast(tokens):
        unit = F.normalize(at_least_float32(tokens), dim=-1).unflatten(1, grid)
        similarity = unit.new_zeros(N, *grid, K)
        for slot, here, there in neighbor_blocks(grid, border):
            cosine = (unit[here] * unit[there]).sum(dim=-1)
            similarity[(*here, slot)] = cosine
            similarity[(*there, K - 1 - slot)] = cosine
    similarity_NLK = similarity.reshape(N, L, K).gather(2, order_LK.expand(N, -1, -1))
    similarity_NLK = similarity_NLK.masked_fill(similarity_NLK.isnan(), -1.0)
    return similarity_NLK.masked_fill(table_LK == L, -torch.inf), table_LK


@torch.no_grad()
def closest_neighbors(tokens: Tensor, grid: tuple[int, int], border: str = "natural") -> Tensor:
    """Return the index of the neighbour with the highest cosine similarity, for each patch.

    Similarities that differ by rounding errors only are ties, so that the result is the same on every device.

    Args:
        tokens: `[N, L, D]`, compared in float32 or a wider type.
        grid: Rows and columns of patches; their product is L.
        border: `natural` or `wrap`, see `neighbor_table`.

    Returns:
        `[N, L]` int64; the lowest index in a tie.

    Raises:
        ValueError: L is not the number of patches of the grid, or the grid has a single patch.
    """
    similarity_NLK, table_LK = neighbor_similarities(tokens, grid, border)
    tolerance = 4 * torch.finfo(similarity_NLK.dtype).eps
    equal_NLK = similarity_NLK >= similarity_NLK.amax(dim=-1, keepdim=True) - tolerance
    slot_NL = equal_NLK.to(torch.uint8).argmax(dim=-1)  # the first of a tie
    return table_LK.expand(len(tokens), -1, -1).gather(2, slot_NL[:, :, None])[:, :, 0]


@torch.no_grad()
def released_neighbors(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return the companion that the released code selects for each patch, `[N, L]`.

    It determines the most similar of the eight neighbours on a torus, in ascending order, and then gathers along the
    patches instead of the neighbours: the result "slot s" selects the first neighbour of patch s. On a 14 x 14 grid
    every companion is therefore one of the patches 0 to 6.

    Raises:
        ValueError: there are fewer than 3 x 3 patches.
    """
    if min(grid) < 3:
        raise ValueError(f"the released selection needs 3 x 3 patches or more, not {grid[0]} x {grid[1]}")
    similarity_NLK, table_LK = neighbor_similarities(tokens, grid, "wrap")
    return table_LK[similarity_NLK.argmax(dim=-1), 0]


# ---- relations ------------------------------------------------------------------------------------------------------


def standardize_features(z: Tensor) -> Tensor:
    """Standardise each of the P features of `z` `[N, L, P]` over all patches of all images of all ranks."""
    centred = z - mean_over_ranks(z.mean(dim=(0, 1)))
    return centred / (mean_over_ranks(centred.square().mean(dim=(0, 1))) + EPS).sqrt()


def neighbor_relation(z: Tensor, z_cnp: Tensor, relation: str = "off_diagonal", normalize: str = "token") -> Tensor:
    """Compute the relation of two predictions that the neighbour term minimises.

    With a and b the normalised predictions and C = a^T b / (N L), a P x P matrix:

    - `off_diagonal`: sum of C without its diagonal (the paper)
    - `diagonal`: sum of the diagonal of C
    - `off_diagonal_squared`: sum of the squares of C without its diagonal
    - `token_off_diagonal`: sum of a b^T / P without its diagonal, averaged over images
    - `alignment`: mean squared difference of a and b (NoA in the paper's supplement)

    Args:
        z: `[N, L, P]`, the prediction from the visible patches.
        z_cnp: `[N, L, P]`, the prediction from their companions; it gets no gradient.
        relation: One of the above.
        normalize: `token` standardises each row; `feature` each of the P features over all images and patches of all
            ranks; `none` neither.

    Returns:
        A scalar, in float32 or a wider type.

    Raises:
        ValueError: Unknown relation or normalisation.
    """
    require_choice("relation", relation, Relation)
    require_choice("normalize", normalize, Normalize)
    with without_autocast(z):
        predicted, predicted_in = z, z_cnp.dtype
        z, z_cnp = at_least_float32(z), at_least_float32(z_cnp.detach())
        # torch.compile decides itself what to save for the backward pass, and does not trace custom functions well.
        by_hand = relation in LINEAR and not torch.compiler.is_compiling()
        if normalize == "feature":
            z, z_cnp = standardize_features(z), standardize_features(z_cnp)
        elif normalize == "token":
            z, z_cnp = z if by_hand else standardize(z), standardize(z_cnp)
        N, L, P = z.shape
        if relation == "alignment":
            return F.mse_loss(z, z_cnp)
        if relation == "off_diagonal_squared":  # the only one that needs the matrix
            C_PP = mean_over_ranks(z.reshape(N * L, P).T @ z_cnp.reshape(N * L, P) / (N * L))
            return C_PP.square().sum() - C_PP.diagonal().square().sum()
        # The others are linear in a: its product with b, or with the sum of b minus b itself.
        if relation == "off_diagonal":
            z_cnp = z_cnp.sum(dim=2, keepdim=True) - z_cnp
        elif relation == "token_off_diagonal":
            z_cnp = (z_cnp.sum(dim=1, keepdim=True) - z_cnp) * (L / P)
        if by_hand:
            a = predicted if normalize == "token" else z  # `predicted` is the model's tensor: saving it needs no memory
            if relation == "token_off_diagonal" and predicted_in is torch.float16:
                predicted_in = torch.float32  # a sum over all tokens exceeds the largest number of float16
            return MeanProduct.apply(a, z_cnp, normalize == "token", predicted_in)
        return (z * z_cnp).sum(dim=2).mean()


class MeanProduct(torch.autograd.Function):
    """Compute the mean over all tokens of a . c, where a is `z` `[N, L, P]`, optionally standardised, and c a constant.

    The gradient with respect to `z` is known in the forward pass, so it is computed there, in the memory of `c` (which
    is overwritten), and saved in the type `kept`. Autograd would instead save a, c and intermediate results of their
    size. `z` is saved too, which needs no memory if the model keeps it anyway.

    With row deviation s, q = a . c and c' = c - mean(c), the gradient of q with respect to a row of z is

        g = (c' - a q / (P - 1)) / s

    A second backward pass (`create_graph=True`) needs c', which is recovered as c' = s g + a q / (P - 1).
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, c: Tensor, standardized: bool, kept: torch.dtype) -> Tensor:
        x = at_least_float32(z)
        a = standardize(x) if standardized else x
        product_NL1 = (a[:, :, None] @ c[..., None])[..., 0]
        if standardized and ctx.needs_input_grad[0]:
            s = (x.var(dim=2, keepdim=True) + EPS).sqrt()
            c.sub_(c.mean(dim=2, keepdim=True)).addcmul_(a, product_NL1, value=-1 / (x.shape[2] - 1)).div_(s)
        del a  # frees memory before another tensor of its size is allocated
        ctx.standardized = standardized
        ctx.save_for_backward(c.to(kept), *((z, product_NL1) if standardized else ()))
        return product_NL1.mean()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        g, *rest = ctx.saved_tensors
        tokens = g.shape[:2].numel()
        if not torch.is_grad_enabled():
            return g.to(gradient.dtype, copy=True).mul_(gradient / tokens), None, None, None
        g = g.to(gradient.dtype)
        if ctx.standardized:
            z, q = rest
            z = at_least_float32(z)
            s, a = (z.var(dim=2, keepdim=True) + EPS).sqrt(), standardize(z)
            centred = (s * g + a * q / (z.shape[2] - 1)).detach()
            g = (centred - a * (a * centred).sum(dim=2, keepdim=True) / (z.shape[2] - 1)) / s
        return g * (gradient / tokens), None, None, None


# ---- the term -------------------------------------------------------------------------------------------------------


class NeighborTerm(Term):
    """NoR-MAE's term: select companions of the visible patches, pass them through the model, relate the predictions."""

    name: ClassVar[str] = "neighbor"
    Options: ClassVar[type] = NeighborOptions
    options: NeighborOptions
    reads_features = False
    reads_tokens = reads_decoder = reads_prediction = True

    def __init__(self, options: NeighborOptions) -> None:
        super().__init__(options)
        self.noise_rows = (options.companion == "random") + (options.fraction < 1)  # the last row is for `fraction`
        self.drawn = options.drawn  # computed once: torch.compile does not trace fractions.Fraction
        if options.together:
            self.images_together = "ranks"

    def check(self, model: MaskedImageModel) -> None:
        if not model.drops_hidden:
            raise ValueError(
                "the term neighbor needs an encoder that gets visible patches only; this method replaces hidden patches"
            )
        if model.num_predicted < model.num_patches and self.options.tokens != "all":
            raise ValueError(
                f"tokens is {self.options.tokens!r}; this decoder predicts hidden patches only, some or all: use 'all'"
            )
        if self.options.cnp == "released" and min(model.grid) < 3:
            raise ValueError(
                f"a grid of {model.grid[0]} x {model.grid[1]} patches is too small for cnp released, which needs "
                "3 x 3: use smaller patches or larger images"
            )
        if self.normalization(model) == "token" and self.width(model) < 2:
            raise ValueError("normalize 'token' needs patches of more than one value")
        if self.options.space == "embedding" and model.reconstruction_weight == 0:
            raise ValueError(
                "space 'embedding' leaves the prediction layer untrained without reconstruction: use space 'pixels' or "
                "a reconstruction_weight above 0"
            )

    def width(self, model: MaskedImageModel) -> int:
        """Return the width of what is related: P for predicted pixels, E for decoder embeddings."""
        return model.target.width if self.options.space == "pixels" else model.decoder_pred.in_features

    def normalization(self, model: MaskedImageModel) -> str:
        """Return the normalisation: the option, or, with `cnp: released`, that of the released code."""
        standardized = getattr(model.target, "normalize", False)
        return "none" if self.options.cnp == "released" and not standardized else self.options.normalize

    def scale(self, model: MaskedImageModel) -> dict[str, float]:
        """Return the weight times the factor of the mean correlation in the relation.

        Empty unless tokens are standardised.
        """
        P, L, V = self.width(model), model.num_patches, model.num_visible
        L = {"all": model.num_predicted, "visible": V, "masked": L - V}[self.options.tokens]
        letter = "P" if self.options.space == "pixels" else "E"
        reach = {
            "off_diagonal": (f"({letter}-1)", P - 1),
            "diagonal": (f"({letter}-1)", P - 1),
            "alignment": (f"2({letter}-1)/{letter}", 2 * (P - 1) / P),
            "token_off_diagonal": (f"L(L-1)({letter}-1)/{letter}", L * (L - 1) * (P - 1) / P),
        }
        if self.normalization(model) != "token" or self.options.relation not in reach:
            return {}
        factor, value = reach[self.options.relation]
        return {f"weight x {factor}": self.options.weight * value}

    def companions(self, model: MaskedAutoencoderViT, view: View) -> Tensor:
        """Return the index of the companion of each visible patch: `[N, V]`."""
        if self.options.similarity == "embed_pos":
            compared = view.tokens
        elif self.options.similarity == "embed":
            compared = model.patch_embed(view.images)
        else:
            compared = patchify(view.images, model.patch_size)
        if self.options.cnp == "released":
            found_NL = released_neighbors(compared, model.grid)
        else:
            found_NL = closest_neighbors(compared, model.grid, self.options.border)
        return found_NL.gather(1, view.ids_keep)

    @torch.no_grad()
    def second_decoded(self, model: MaskedAutoencoderViT, view: View) -> Tensor:
        """Pass the companions through encoder and decoder; return `[N, L, E]` after the decoder's norm.

        A companion keeps its own position in the encoder and has the position of the visible patch in the decoder, as
        in the released code. The patches of a random mask keep their own positions in both.
        """
        if self.options.companion == "random":
            ids = places = random_masking(view.noise[:, self.noise_row], model.num_visible).ids_keep
        else:
            ids, places = self.companions(model, view), view.ids_keep
        latent, taps = model.encode_tokens(take(view.tokens, ids))
        return model.decode(latent, Masking(places, view.ids_restore, view.mask), taps)

    @torch.no_grad()
    def second_pass(self, model: MaskedAutoencoderViT, view: View) -> Tensor:
        """Return the prediction from the companions: `[N, L, P]`, without gradient, in the type of the last layer."""
        return model.decoder_pred(self.second_decoded(model, view))

    def combines(self, batch_size: int) -> Literal["", "device", "ranks"]:
        """Return "device" also if the batch size is not a multiple of g, see `NeighborOptions.fraction`."""
        return "device" if batch_size % self.drawn[1] else super().combines(batch_size)

    def some_images(self, view: View) -> View:
        """Draw the images that take the second pass: the k of every g consecutive images that have the least noise.

        Micro-batches and processes get consecutive parts of the images of an update. Therefore the same images are
        drawn for any number of them, if g divides the batch size. Otherwise the batch is a single group with
        k = max(1, round(fraction x N)). Each image is drawn with equal probability, and each group counts equally, so
        the expectation of the mean over the drawn images is the mean over all images.
        """
        if self.options.fraction == 1:
            return view
        N, (k, group) = view.tokens.shape[0], self.drawn
        if N % group:
            k, group = max(1, round(self.options.fraction * N)), N
        number_N = view.noise[:, self.noise_row + self.noise_rows - 1, 0]
        first = torch.arange(0, N, group, device=number_N.device)
        drawn = (number_N.view(-1, group).topk(k, largest=False).indices + first[:, None]).flatten()
        parts: dict[str, Any] = {name: part[drawn] for name, part in vars(view).items() if isinstance(part, Tensor)}
        taps = {block: tap[drawn] for block, tap in view.taps.items()}
        return replace(view, **parts, taps=taps)

    def related(self, view: View, z: Tensor) -> Tensor:
        """Select the tokens of a prediction `[N, L, P]` that the option `tokens` names."""
        if self.options.tokens == "all":
            return z
        V = view.ids_keep.shape[1]
        ids = view.ids_keep if self.options.tokens == "visible" else by_rank(view.ids_restore)[:, V:]
        return take(z, ids)

    def forward(self, model: MaskedImageModel, view: View) -> Tensor:
        assert isinstance(model, MaskedAutoencoderViT)  # `check` refuses any other
        view = self.some_images(view)
        pixels = self.options.space == "pixels"
        return neighbor_relation(
            self.related(view, view.pred if pixels else view.decoded),
            self.related(view, self.second_pass(model, view) if pixels else self.second_decoded(model, view)),
            self.options.relation,
            self.normalization(model),
        )
