"""NoR-MAE: relate each patch's prediction to that of its closest neighbour.

Meng et al., "Closest Neighbors are Harmful for Lightweight Masked Auto-encoders", CVPR 2025. Every visible patch has a companion, the neighbour
most similar to it. The companions go through the same encoder and decoder, in the visible patches' places and without gradient, and the term
relates the two predictions Z and Z' by C = mean over images and tokens of Z^T Z', a P x P matrix of which only sums are ever needed.

With the paper's per-token standardisation every row of Z sums to zero, so all entries of C do too, and the off-diagonal sum is minus the trace:
-(P - 1) times the mean correlation of the two predictions. Minimising it makes them alike.

N images   L patches, row-major   V visible patches   D encoder channels   E decoder channels   P pixel values   K neighbour slots
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from models_mae import MaskedAutoencoderViT, Masking, Term, View, at_least_float32, patchify, random_masking, standardize, take, without_autocast

BORDERS = ("natural", "wrap")
RELATIONS = ("off_diagonal", "off_diagonal_squared", "diagonal", "token_off_diagonal", "alignment")
NORMALIZATIONS = ("token", "feature", "none")

EPS = 1e-6
GRAM_PATCHES = 256  # up to here one product of all pairs is faster than eight of neighbours, and small
AROUND = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if (dy, dx) != (0, 0)]


def require(name: str, value: object, choices: tuple[str, ...]) -> None:
    """ValueError unless `value` is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; it can be {', '.join(choices)}")


# ---- neighbours


def neighbor_table(grid: tuple[int, int], border: str, device: torch.device | None = None) -> Tensor:
    """Each patch's neighbours `[L, 8]` in ascending order; L stands where a natural border has none (3, 5 or 8 are real).

    With `wrap` the grid is a torus. ValueError for a single patch, which has no neighbour.
    """
    require("border", border, BORDERS)
    rows, columns = grid
    L = rows * columns
    if L < 2:
        raise ValueError(f"a grid of {rows} x {columns} patches has no neighbours: use smaller patches or larger images")
    y, x = torch.arange(rows, device=device)[:, None], torch.arange(columns, device=device)[None, :]
    here = y * columns + x
    slots = []
    for dy, dx in AROUND:
        there = (y + dy) % rows * columns + (x + dx) % columns
        real = there != here
        if border == "natural":
            real = real & (y + dy >= 0) & (y + dy < rows) & (x + dx >= 0) & (x + dx < columns)
        slots.append(torch.where(real, there, L))
    return torch.stack(slots, dim=-1).reshape(L, len(AROUND)).sort(dim=-1).values


def slot_similarity(tokens: Tensor, table: Tensor, ids: Tensor | None) -> Tensor:
    """Cosine similarity `[N, V, K]` of patches `ids` (None: all) with each neighbour in the table, -inf where there is none; one slot at a time."""
    unit_NLD = F.normalize(tokens, dim=-1)
    query_NVD = unit_NLD if ids is None else take(unit_NLD, ids)
    N, L, _ = tokens.shape
    neighbor_NVK = table.expand(N, -1, -1) if ids is None else table[ids]
    similarity = []
    for k in range(table.shape[1]):
        neighbor_NV = neighbor_NVK[:, :, k]
        cosine_NV = (query_NVD * take(unit_NLD, neighbor_NV.clamp(max=L - 1))).sum(dim=-1)
        similarity.append(cosine_NV.masked_fill(neighbor_NV == L, -torch.inf))
    return torch.stack(similarity, dim=-1)


def gram_similarity(tokens: Tensor, table: Tensor, ids: Tensor | None) -> Tensor:
    """Cosine similarity `[N, V, L]` of patches `ids` (None: all) with all patches, -inf where they are no neighbours."""
    unit_NLD = F.normalize(tokens, dim=-1)
    L = tokens.shape[1]
    adjacent_LL = torch.zeros(L, L + 1, dtype=torch.bool, device=tokens.device).scatter_(1, table, True)[:, :L]
    query_NVD, adjacent = (unit_NLD, adjacent_LL) if ids is None else (take(unit_NLD, ids), adjacent_LL[ids])
    return (query_NVD @ unit_NLD.transpose(1, 2)).masked_fill_(~adjacent, -torch.inf)


def first_best(similarity: Tensor) -> Tensor:
    """Index of the best along the last axis; of values that rounding alone can tell apart, the first.

    Equal patches must tie however the device orders its sums, hence the few units of rounding that count as equal. Always a valid index.
    """
    tolerance = 4 * torch.finfo(similarity.dtype).eps
    return (similarity >= similarity.amax(dim=-1, keepdim=True) - tolerance).to(torch.int8).argmax(dim=-1)


@torch.no_grad()
def closest_neighbors(tokens: Tensor, grid: tuple[int, int], border: str = "natural", *, ids_keep: Tensor | None = None) -> Tensor:
    """For each patch, the index `[N, L]` of the neighbour with the highest cosine similarity; exact ties take the lowest index.

    `tokens` `[N, L, D]` are compared in float32 at least. With `ids_keep` `[N, V]` only those patches are asked: `[N, V]`. Small grids on a CPU
    compare by one product of all pairs; elsewhere neighbours are visited slot by slot, which is linear in L and free of reduced-precision matmuls.
    """
    table = neighbor_table(grid, border, tokens.device)
    with without_autocast(tokens):
        tokens = at_least_float32(tokens)
        if tokens.shape[1] <= GRAM_PATCHES and tokens.device.type == "cpu":
            return first_best(gram_similarity(tokens, table, ids_keep))
        slot = first_best(slot_similarity(tokens, table, ids_keep))
    neighbor = table.expand(len(tokens), -1, -1) if ids_keep is None else table[ids_keep]
    return neighbor.gather(2, slot[:, :, None])[:, :, 0]


@torch.no_grad()
def released_neighbors(tokens: Tensor, grid: tuple[int, int], *, ids_keep: Tensor | None = None) -> Tensor:
    """The companions of the released code, `[N, L]` (or `[N, V]` for `ids_keep`).

    It finds the best slot among eight wrapped neighbours and then gathers along the patches instead of the slots, so slot s selects the first
    neighbour of patch s: on a 14 x 14 grid one of patches 0 to 6, whichever patch asked. Kept to compare with; ValueError under 3 x 3 patches.
    """
    if min(grid) < 3:
        raise ValueError(f"the released selection needs 3 x 3 patches or more, not {grid[0]} x {grid[1]}")
    table = neighbor_table(grid, "wrap", tokens.device)
    with without_autocast(tokens):
        slot = slot_similarity(at_least_float32(tokens), table, ids_keep).argmax(dim=-1)
    return table[slot, 0]


# ---- relations


def across_ranks(x: Tensor) -> Tensor:
    """The mean of `x` over all processes, through which gradients flow back to each; `x` itself without torch.distributed."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return x
    from torch.distributed.nn.functional import all_reduce

    return all_reduce(x) / dist.get_world_size()


def standardize_features(z: Tensor) -> Tensor:
    """Each of the P dimensions of `z` `[N, L, P]` standardised over all patches of all images on all ranks (biased variance)."""
    centered = z - across_ranks(z.mean(dim=(0, 1)))
    return centered / (across_ranks(centered.square().mean(dim=(0, 1))) + EPS).sqrt()


NORMALIZE = {"token": standardize, "feature": standardize_features, "none": lambda z: z}


def neighbor_relation(z: Tensor, z_cnp: Tensor, relation: str = "off_diagonal", normalize: str = "token") -> Tensor:
    """One scalar that relates predictions `[N, L, P]` to those of the companions, which get no gradient; float32 at least.

    With a, b the two after `normalize` (`token`: each row standardised, `feature`: each column over images and patches, `none`) and C = a^T b / (N L):
    `off_diagonal` sums C off its diagonal, `off_diagonal_squared` the squares there, `diagonal` is C's trace; `token_off_diagonal` sums
    a b^T / P off its diagonal, averaged over images; `alignment` is the mean squared difference (the supplement's NoA).
    """
    require("relation", relation, RELATIONS)
    require("normalize", normalize, NORMALIZATIONS)
    with without_autocast(z):
        a = NORMALIZE[normalize](at_least_float32(z))
        b = NORMALIZE[normalize](at_least_float32(z_cnp.detach()))
        P = a.shape[-1]
        if relation == "alignment":
            return F.mse_loss(a, b)
        if relation == "off_diagonal_squared":  # the one square, hence the one matrix
            C_PP = across_ranks(a.flatten(0, 1).T @ b.flatten(0, 1) / (a.shape[0] * a.shape[1]))
            return C_PP.square().sum() - C_PP.diagonal().square().sum()
        same_NL = (a * b).sum(dim=-1)  # what the diagonal holds
        if relation == "diagonal":
            return same_NL.mean()
        if relation == "off_diagonal":
            return (a.sum(dim=-1) * b.sum(dim=-1) - same_NL).mean()
        all_N = (a.sum(dim=1) * b.sum(dim=1)).sum(dim=-1)
        return ((all_N - same_NL.sum(dim=1)) / P).mean()


# ---- the term


@dataclass(frozen=True)
class NeighborOptions:
    """What the neighbour term compares, and how."""

    weight: float = 5e-5
    """The paper's lambda. Under per-token standardisation it weighs the correlation of the two predictions by weight x (P - 1)."""
    companion: str = "closest"
    """closest: each visible patch's closest neighbour takes its place; random: an independent second mask of the same image."""
    cnp: str = "closest"
    """closest: the neighbour that is most similar; released: what the released code selects (see released_neighbors), to compare with."""
    border: str = "auto"
    """natural: 3, 5 or 8 neighbours; wrap: the grid is a torus; auto: natural, but wrap where cnp is released, which allows no other."""
    similarity: str = "embed_pos"
    """Whose cosine decides: embed_pos, patch embeddings with positions; embed, without; pixels, the normalised image's patches."""
    relation: str = "off_diagonal"
    """off_diagonal, off_diagonal_squared, diagonal, token_off_diagonal or alignment (see neighbor_relation)."""
    normalize: str = "token"
    """token: each predicted patch standardised; feature: each dimension over images and patches; none. With cnp released it stays at
    token, and means token under norm_pix_loss and none without, as released."""
    space: str = "pixels"
    """pixels: relate the predictions; embedding: what the decoder's norm hands to the prediction layer."""
    tokens: str = "all"
    """Which decoded patches are related: all, visible or masked."""

    def __post_init__(self) -> None:
        if isinstance(self.weight, bool) or not isinstance(self.weight, int | float) or not abs(self.weight) < float("inf"):
            raise ValueError(f"weight is {self.weight!r}; it must be a finite number")
        require("companion", self.companion, ("closest", "random"))
        require("cnp", self.cnp, ("closest", "released"))
        require("border", self.border, (*BORDERS, "auto"))
        require("similarity", self.similarity, ("embed_pos", "embed", "pixels"))
        require("relation", self.relation, RELATIONS)
        require("normalize", self.normalize, NORMALIZATIONS)
        require("space", self.space, ("pixels", "embedding"))
        require("tokens", self.tokens, ("all", "visible", "masked"))
        if self.border == "auto":
            object.__setattr__(self, "border", "wrap" if self.cnp == "released" else "natural")
        if self.cnp == "released":
            fixed = {"companion": "closest", "border": "wrap", "similarity": "embed_pos", "normalize": "token"}
            for name, value in fixed.items():
                if getattr(self, name) != value:
                    raise ValueError(f"cnp released fixes {name} to {value}; found {getattr(self, name)!r}")


class NeighborTerm(Term):
    """The paper's term: companions, a second pass without gradient, a relation of the two predictions."""

    name: ClassVar[str] = "neighbor"
    Options: ClassVar[type] = NeighborOptions
    options: NeighborOptions

    def __init__(self, options: NeighborOptions) -> None:
        super().__init__(options)
        self.noise_rows = 1 if options.companion == "random" else 0

    def check(self, model: MaskedAutoencoderViT) -> None:
        rows, columns = model.grid
        if self.options.companion == "closest" and rows * columns < 2:
            raise ValueError(f"a grid of {rows} x {columns} patches has no neighbours: use smaller patches or larger images")
        if self.options.cnp == "released" and min(model.grid) < 3:
            raise ValueError(f"the released selection needs 3 x 3 patches or more, not {rows} x {columns}")
        if self.normalization(model) == "token" and self.width(model) < 2:
            raise ValueError("normalize token needs patches of more than one value: use larger patches, or feature or none")

    def width(self, model: MaskedAutoencoderViT) -> int:
        """Dimensions of what is related."""
        return model.patch_pixels if self.options.space == "pixels" else model.decoder_norm.normalized_shape[0]

    def normalization(self, model: MaskedAutoencoderViT) -> str:
        """The option or, for the released selection, what the released code does."""
        return "none" if self.options.cnp == "released" and not model.norm_pix_loss else self.options.normalize

    def scale(self, model: MaskedAutoencoderViT) -> dict[str, float]:
        """The weight times what the relation reaches at a correlation of 1; empty where it is not bounded by token standardisation."""
        if self.normalization(model) != "token":
            return {}
        letter, P, L = "P" if self.options.space == "pixels" else "E", self.width(model), model.num_patches
        L = {"all": L, "visible": model.num_visible, "masked": L - model.num_visible}[self.options.tokens]
        reach = {
            "off_diagonal": (f"({letter}-1)", P - 1),
            "diagonal": (f"({letter}-1)", P - 1),
            "alignment": (f"2({letter}-1)/{letter}", 2 * (P - 1) / P),
            "token_off_diagonal": ("L(L-1)", L * (L - 1)),
        }
        if self.options.relation not in reach:
            return {}
        text, value = reach[self.options.relation]
        return {f"weight x {text}": self.options.weight * value}

    def companions(self, model: MaskedAutoencoderViT, view: View) -> Tensor:
        """`[N, V]`: the patch that stands in for each visible one."""
        if self.options.similarity == "embed_pos":
            compared = view.tokens
        elif self.options.similarity == "embed":
            compared = model.patch_embed(view.images)
        else:
            compared = patchify(view.images, model.patch_size)
        if self.options.cnp == "released":
            return released_neighbors(compared, model.grid, ids_keep=view.ids_keep)
        return closest_neighbors(compared, model.grid, self.options.border, ids_keep=view.ids_keep)

    @torch.no_grad()
    def second_decoded(self, model: MaskedAutoencoderViT, view: View) -> Tensor:
        """The companions through encoder and decoder: `[N, L, E]`.

        Closest neighbours keep their own positions in the encoder and take the visible patches' places in the decoder, as released. A random
        companion is a whole second mask, with places of its own.
        """
        masking = Masking(view.ids_keep, view.ids_restore, view.mask)
        if self.options.companion == "random":
            masking = random_masking(view.noise[:, self.noise_row], model.num_visible)
            chosen = masking.ids_keep
        else:
            chosen = self.companions(model, view)
        latent, taps = model.encode_tokens(take(view.tokens, chosen))
        return model.decode(latent, masking, taps)

    @torch.no_grad()
    def second_pass(self, model: MaskedAutoencoderViT, view: View) -> Tensor:
        """The companions' prediction `[N, L, P]`, without gradient."""
        return at_least_float32(model.decoder_pred(self.second_decoded(model, view)))

    def forward(self, model: MaskedAutoencoderViT, view: View) -> Tensor:
        if self.options.space == "pixels":
            z, z_cnp = view.pred, self.second_pass(model, view)
        else:
            z, z_cnp = view.decoded, self.second_decoded(model, view)
        if self.options.tokens != "all":
            ids = view.ids_keep if self.options.tokens == "visible" else view.ids_restore.argsort(dim=1)[:, model.num_visible :]
            z, z_cnp = take(z, ids), take(z_cnp, ids)
        return neighbor_relation(z, z_cnp, self.options.relation, self.normalization(model))
