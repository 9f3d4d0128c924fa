"""Neighbours against a loop, relations against the matrices that they are sums of, and the term in a model."""

from datetime import timedelta
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import methods
import models_nor_mae
from models_mae import MaskedAutoencoderViT, patchify, random_masking
from models_nor_mae import (
    NeighborOptions,
    NeighborTerm,
    closest_neighbors,
    neighbor_relation,
    neighbor_table,
    released_neighbors,
)
from tests.published import assert_as_published, model_of, needs_vectors, read
from tests.small import direct

RELATIONS = ("off_diagonal", "off_diagonal_squared", "diagonal", "token_off_diagonal", "alignment")
GRIDS = [(1, 2), (2, 1), (2, 2), (1, 5), (3, 5), (4, 4), (14, 14)]


# ---- neighbours -----------------------------------------------------------------------------------------------------


def loop_neighbors(here, grid, border):
    """The patches around one, in ascending order."""
    rows, columns = grid
    y, x = divmod(here, columns)
    around = [(y + down, x + right) for down in (-1, 0, 1) for right in (-1, 0, 1)]
    if border == "wrap":
        around = [(row % rows, column % columns) for row, column in around]
    inside = {row * columns + column for row, column in around if 0 <= row < rows and 0 <= column < columns}
    return sorted(inside - {here})


def cosine(a, b):
    return F.cosine_similarity(a.double(), b.double(), dim=-1).item()


@pytest.mark.parametrize("border", ["natural", "wrap"])
@pytest.mark.parametrize("grid", GRIDS)
def test_the_table_has_the_neighbours_of_the_loop(grid, border):
    L = grid[0] * grid[1]
    table = neighbor_table(grid, border)
    assert table.shape == (L, 8)
    for here in range(L):
        assert sorted({j for j in table[here].tolist() if j < L}) == loop_neighbors(here, grid, border)


def test_known_neighbours():
    real = (neighbor_table((14, 14)) < 196).sum(dim=-1).reshape(14, 14)
    assert real[0, 0] == real[13, 13] == 3 and real[0, 5] == real[5, 0] == 5 and real[6, 6] == 8
    assert real.sum() == 1404
    wrapped = neighbor_table((14, 14), "wrap").sort(dim=-1).values
    assert wrapped[0].tolist() == [1, 13, 14, 15, 27, 182, 183, 195]
    assert ((neighbor_table((14, 14)) == 196).any(dim=-1)).sum() == 52


@pytest.mark.parametrize("border", ["natural", "wrap"])
@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("grid", GRIDS)
def test_closest_neighbors_are_as_similar_as_the_loop_says(grid, images, border):
    tokens = torch.randn(images, grid[0] * grid[1], 6, generator=torch.Generator().manual_seed(0))
    found = closest_neighbors(tokens, grid, border)
    assert found.shape == (images, grid[0] * grid[1]) and found.dtype == torch.int64
    for image, here in product(range(images), range(grid[0] * grid[1])):
        around = loop_neighbors(here, grid, border)
        answer = int(found[image, here])
        best = max(cosine(tokens[image, here], tokens[image, j]) for j in around)
        assert answer in around
        assert cosine(tokens[image, here], tokens[image, answer]) >= best - 1e-6


def test_a_neighbour_far_away_in_the_row_is_none():
    tokens = torch.eye(16)
    tokens[5] = tokens[10] + 0.1 * torch.eye(16)[5]  # its diagonal neighbour on a 4 x 4 grid
    assert closest_neighbors(tokens[None], (4, 4))[0, 5] == 10
    tokens = torch.eye(16)
    tokens[3] = tokens[4]  # end of one row and start of the next: no neighbours unless wrapped
    assert closest_neighbors(tokens[None], (4, 4))[0, 3] == 2
    assert closest_neighbors(tokens[None], (4, 4), "wrap")[0, 3] == 4


@pytest.mark.parametrize("dim", [3, 192, 1000])
@pytest.mark.parametrize("grid", [(2, 2), (14, 14), (7, 40)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_of_equals_the_lowest_index_is_taken(grid, dim, dtype):
    torch.manual_seed(0)
    tokens = torch.rand(1, 1, dim).expand(2, grid[0] * grid[1], dim).to(dtype)
    for border in ("natural", "wrap"):
        expected = [loop_neighbors(here, grid, border)[0] for here in range(grid[0] * grid[1])]
        assert closest_neighbors(tokens, grid, border).tolist() == [expected] * 2
        scaled = tokens * torch.rand(2, grid[0] * grid[1], 1, dtype=dtype).add(0.1)  # the same directions
        if dtype != torch.bfloat16:
            assert closest_neighbors(scaled, grid, border).tolist() == [expected] * 2


def test_ties_are_decided_among_the_best_only():
    tokens = torch.zeros(9, 4)
    tokens[4] = torch.tensor([1.0, 0, 0, 0])
    tokens[[5, 7]] = torch.tensor([2.0, 1.0, 0, 0])
    tokens[2] = torch.tensor([1.0, 1.0, 0, 0])
    assert closest_neighbors(tokens[None], (3, 3))[0, 4] == 5


def test_similarity_is_computed_in_float32_even_under_autocast():
    torch.manual_seed(0)
    detail = torch.randn(2, 196, 32)
    expected = closest_neighbors(1 + 0.03 * detail, (14, 14))  # bfloat16 products could not tell these apart
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(closest_neighbors(1 + 0.03 * detail, (14, 14)), expected)
    fine, finer = (closest_neighbors(1 + size * detail.double(), (14, 14)) for size in (1e-4, 1e-5))
    assert (fine == finer).float().mean() > 0.99  # nor float32 these: float64 is kept


def test_not_a_number_still_yields_neighbours():
    tokens = torch.full((1, 9, 4), float("nan"))
    for here, there in enumerate(closest_neighbors(tokens, (3, 3))[0].tolist()):
        assert there in loop_neighbors(here, (3, 3), "natural")
    assert released_neighbors(tokens, (3, 3)).max() < 9


@pytest.mark.parametrize(
    ("select", "grid"),
    [
        (closest_neighbors, (5, 7)),
        pytest.param(closest_neighbors, (14, 14), marks=pytest.mark.slow),
        pytest.param(released_neighbors, (5, 7), marks=pytest.mark.slow),
    ],
)
def test_compiled_selection_among_nan_is_the_eager_one(select, grid):
    """Inductor's argmax over a row of comparisons with NaN can return an index past the end of the row."""
    torch.compiler.reset()
    tokens = torch.randn(2, grid[0] * grid[1], 8, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(select, fullgraph=True)
    for bad in ((0,), (3, 4, grid[1] + 3), tuple(range(tokens.shape[1]))):
        broken = tokens.clone()
        broken[1, list(bad)] = torch.nan
        found, expected = compiled(broken, grid), select(broken, grid)
        assert torch.equal(found, expected)
        assert torch.equal(found[0], select(tokens, grid)[0])


def test_a_neighbour_that_is_not_a_number_is_chosen_last():
    tokens = torch.eye(9)
    tokens[0] = torch.nan
    assert closest_neighbors(tokens[None], (3, 3))[0, 4] == 1


def test_moving_the_image_moves_its_neighbours():
    torch.manual_seed(0)
    tokens = torch.randn(1, 5, 7, 6)
    moved = tokens.roll((2, 3), dims=(1, 2))
    rows, columns = torch.meshgrid(torch.arange(5), torch.arange(7), indexing="ij")
    index = (rows * 7 + columns).roll((2, 3), dims=(0, 1)).flatten()  # where each patch of the moved grid came from
    before = closest_neighbors(tokens.flatten(1, 2), (5, 7), "wrap")[0]
    after = closest_neighbors(moved.flatten(1, 2), (5, 7), "wrap")[0]
    assert torch.equal(index[after], before[index])


def test_one_patch_has_no_neighbours():
    for border in ("natural", "wrap"):
        with pytest.raises(ValueError, match="1 x 1"):
            closest_neighbors(torch.ones(1, 1, 4), (1, 1), border)
    with pytest.raises(ValueError, match="natural, wrap"):
        closest_neighbors(torch.ones(1, 4, 4), (2, 2), "torus")


class LargestTensor(TorchDispatchMode):
    """Keeps the number of elements of the largest tensor made inside."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.numel():
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return out


@pytest.mark.parametrize("border", ["natural", "wrap"])
def test_the_search_makes_nothing_larger_than_the_tokens(border):
    for grid in ((14, 14), (112, 112)):
        tokens = torch.randn(1, grid[0] * grid[1], 16)
        with LargestTensor() as largest:
            closest_neighbors(tokens, grid, border)
        assert largest.elements <= tokens.numel()


# ---- the released selection -----------------------------------------------------------------------------------------


def released_by_gather(tokens, grid):
    """What the released code computes: eight wrapped neighbours, and a gather along the patches."""
    L = grid[0] * grid[1]
    around = torch.tensor([loop_neighbors(here, grid, "wrap") for here in range(L)])
    neighbors = tokens[:, around]  # [N, L, 8, D]
    slot = F.cosine_similarity(tokens[:, :, None], neighbors, dim=-1).argmax(dim=-1)
    index = slot[:, :, None, None].expand(-1, -1, 1, tokens.shape[-1])
    return torch.gather(neighbors, 1, index)[:, :, 0]


@pytest.mark.parametrize("grid", [(3, 3), (4, 4), (14, 14), (16, 16)])
def test_the_released_selection_is_the_released_gather(grid):
    torch.manual_seed(0)
    tokens = torch.randn(4, grid[0] * grid[1], 12)
    found = released_neighbors(tokens, grid)
    selected = tokens.gather(1, found[:, :, None].expand(-1, -1, 12))
    assert torch.equal(selected, released_by_gather(tokens, grid))
    first = [loop_neighbors(slot, grid, "wrap")[0] for slot in range(8)]
    assert set(found.unique().tolist()) <= set(first)
    if grid == (14, 14):
        assert first == [1, 0, 1, 2, 3, 4, 5, 6]


def test_the_released_selection_is_not_the_closest_neighbour():
    """With the released gather put back as `closest`, the loop above would fail: it is right for a patch in 200."""
    torch.manual_seed(0)
    tokens = torch.randn(8, 196, 24)
    wrong, right = released_neighbors(tokens, (14, 14)), closest_neighbors(tokens, (14, 14), "wrap")
    assert (wrong == right).float().mean() < 0.02
    table = neighbor_table((14, 14), "wrap")
    assert (table == wrong[:, :, None]).any(dim=-1).float().mean() < 0.1
    tokens = torch.eye(16)
    tokens[5] = 2 * tokens[10]
    assert closest_neighbors(tokens[None], (4, 4))[0, 5] == 10
    assert released_neighbors(tokens[None], (4, 4))[0, 5] == 0  # the best is in slot 7, and patch 7's first is 2


def test_the_released_selection_needs_eight_neighbours():
    with pytest.raises(ValueError, match="2 x 5"):
        released_neighbors(torch.randn(1, 10, 4), (2, 5))


# ---- relations ------------------------------------------------------------------------------------------------------


def predictions(n=3, tokens=5, pixels=12, dtype=torch.float64):
    generator = torch.Generator().manual_seed(2)
    z, z_cnp = (2 * torch.randn(2, n, tokens, pixels, generator=generator, dtype=dtype) + 0.3).unbind()
    return (z + 0.5 * z_cnp).requires_grad_(), z_cnp


def standardized(z, normalize):
    if normalize == "token":
        return (z - z.mean(dim=-1, keepdim=True)) / (z.var(dim=-1, keepdim=True) + 1e-6).sqrt()
    if normalize == "feature":
        flat = z.flatten(0, 1)
        return (z - flat.mean(dim=0)) / (flat.var(dim=0, correction=0) + 1e-6).sqrt()
    return z


def relation_by_matrix(z, z_cnp, relation, normalize):
    """The sums as they are written, over matrices that are really there."""
    a, b = standardized(z, normalize), standardized(z_cnp, normalize)
    n, tokens, pixels = a.shape
    if relation == "alignment":
        return ((a - b) ** 2).sum() / (n * tokens * pixels)
    if relation == "token_off_diagonal":
        C = torch.einsum("nkp,nlp->nkl", a, b).mean(dim=0) / pixels
    else:
        C = torch.einsum("nkp,nkq->npq", a, b).mean(dim=0) / tokens
    off = 1 - torch.eye(len(C), dtype=C.dtype)
    if relation == "diagonal":
        return C.trace()
    return (off * (C**2 if relation == "off_diagonal_squared" else C)).sum()


@pytest.mark.parametrize("normalize", ["token", "feature", "none"])
@pytest.mark.parametrize("relation", RELATIONS)
def test_relations_are_the_sums_over_the_matrix(relation, normalize):
    z, z_cnp = predictions()
    found, expected = (
        neighbor_relation(z, z_cnp, relation, normalize),
        relation_by_matrix(z, z_cnp, relation, normalize),
    )
    torch.testing.assert_close(found, expected)
    (gradient,), (wanted,) = torch.autograd.grad(found, z), torch.autograd.grad(expected, z)
    scale = wanted.abs().max() + z.numel() ** -1
    torch.testing.assert_close(gradient / scale, wanted / scale, rtol=0, atol=1e-10)


@pytest.mark.parametrize("relation", RELATIONS)
def test_relations_are_float32_at_least_and_give_the_companion_no_gradient(relation):
    z, z_cnp = (x.detach().float().requires_grad_() for x in predictions())
    exact = neighbor_relation(z.double(), z_cnp.double(), relation)
    assert exact.dtype == torch.float64
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = neighbor_relation(z, z_cnp, relation)
        assert neighbor_relation(z.bfloat16(), z_cnp.bfloat16(), relation).dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-6)
    found.backward()
    assert z.grad is not None and z_cnp.grad is None


@pytest.mark.parametrize("patch_size", [2, 4, 16])
@pytest.mark.parametrize("relation", ["off_diagonal", "diagonal", "token_off_diagonal"])
def test_gradients_are_finite_in_float16(relation, patch_size):
    """As with autocast, the predictions are float16, and the loss is scaled by 65536 times its weight."""
    torch.manual_seed(0)
    L, P = (224 // patch_size) ** 2, 3 * patch_size**2
    z, z_cnp = torch.randn(1, L, P, requires_grad=True), torch.randn(1, L, P)
    exact = torch.autograd.grad(neighbor_relation(z, z_cnp, relation) * 5e-5 * 65536, z)[0]
    half = neighbor_relation(z.half(), z_cnp.half(), relation) * 5e-5 * 65536
    (gradient,) = torch.autograd.grad(half, z)
    assert gradient.isfinite().all() and (gradient - exact).norm() < 0.01 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("relation", ["off_diagonal", "diagonal", "token_off_diagonal"])
def test_linear_relations_save_one_half_precision_tensor_beside_their_input(relation, dtype):
    z, z_cnp = (x.detach().bfloat16() for x in predictions())
    exact = z.double().requires_grad_()
    (wanted,) = torch.autograd.grad(relation_by_matrix(exact, z_cnp.double(), relation, "token"), exact)
    kept, z = [], z.to(dtype).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        found = neighbor_relation(z, z_cnp, relation)
    new = [(x.dtype, x.shape) for x in kept if x.data_ptr() != z.data_ptr()]
    assert new == [(torch.bfloat16, z.shape), (torch.float32, (*z.shape[:2], 1))]
    for again in (True, False):
        (gradient,) = torch.autograd.grad(3 * found, z, retain_graph=again)
        assert gradient.dtype == dtype
        torch.testing.assert_close(gradient.double(), 3 * wanted, rtol=2**-7, atol=1e-8)


@pytest.mark.parametrize("normalize", ["token", "feature", "none"])
@pytest.mark.parametrize("relation", RELATIONS)
def test_hessian_vector_products_are_those_of_the_matrix_formula(relation, normalize):
    def product(describe_relation):
        z, z_cnp = predictions()
        vector = torch.randn(z.shape, dtype=z.dtype, generator=torch.Generator().manual_seed(3))
        value = describe_relation(z, z_cnp, relation, normalize)
        (gradient,) = torch.autograd.grad(value.square() + value, z, create_graph=True)  # `value` also scales it
        return gradient.detach(), torch.autograd.grad((gradient * vector).sum(), z)[0]

    found, expected = product(neighbor_relation), product(relation_by_matrix)
    for one, other in zip(found, expected, strict=True):
        scale = other.abs().max() + 1e-3
        torch.testing.assert_close(one / scale, other / scale, rtol=0, atol=1e-9)


@pytest.mark.parametrize("normalize", ["token", "feature", "none"])
@pytest.mark.parametrize("relation", RELATIONS)
def test_compiled_relations_and_their_gradients_are_the_plain_ones(relation, normalize):
    torch.compiler.reset()
    z, z_cnp = predictions()
    compiled = torch.compile(neighbor_relation, fullgraph=True, backend="eager")
    plain, found = (each(z, z_cnp, relation, normalize) for each in (neighbor_relation, compiled))
    torch.testing.assert_close(found, plain)
    torch.testing.assert_close(torch.autograd.grad(found, z), torch.autograd.grad(plain, z))


@pytest.mark.parametrize(("relation", "normalize"), [*product(models_nor_mae.LINEAR, ("none", "token", "feature"))])
def test_the_formula_that_compiled_code_uses_agrees(relation, normalize, monkeypatch):
    """Values and gradients, for another number of tokens than of features."""
    z, z_cnp = torch.randn(2, 3, 5, 7, dtype=torch.float64)
    z.requires_grad_()
    found = []
    for compiling in (False, True):
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda compiling=compiling: compiling)
        value = neighbor_relation(z, z_cnp, relation, normalize)
        found.append((value, *torch.autograd.grad(value, z)))
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("changes", [{}, {"relation": "off_diagonal_squared"}, {"normalize": "feature"}])
def test_terms_that_are_no_mean_over_images_say_so(changes):
    term = models_nor_mae.NeighborTerm(models_nor_mae.NeighborOptions(**changes))
    assert term.images_together == ("ranks" if changes else "")


def test_with_standardized_tokens_the_off_diagonal_is_minus_the_trace():
    z, z_cnp = predictions(n=4, tokens=9, pixels=48)
    off, trace = (neighbor_relation(z, z_cnp, relation) for relation in ("off_diagonal", "diagonal"))
    assert abs(off + trace) < 1e-9 < trace
    r = torch.stack(
        [torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(z.flatten(0, 1), z_cnp.flatten(0, 1), strict=True)]
    )
    assert trace.item() == pytest.approx(47 * r.mean().item(), rel=1e-5)
    for normalize in ("feature", "none"):
        off, trace = (neighbor_relation(z, z_cnp, relation, normalize) for relation in ("off_diagonal", "diagonal"))
        assert abs(off + trace) > 1e-3


@pytest.mark.parametrize("pixels", [12, 48])
def test_alignment_is_the_same_loss_at_another_weight(pixels):
    z, z_cnp = predictions(pixels=pixels)
    (nor,) = torch.autograd.grad(neighbor_relation(z, z_cnp), z)
    (noa,) = torch.autograd.grad(neighbor_relation(z, z_cnp, "alignment"), z)
    assert (nor - pixels / 2 * noa).norm() < 1e-5 * nor.norm()


def test_a_step_down_the_relation_makes_the_predictions_alike():
    z, z_cnp = predictions()
    (gradient,) = torch.autograd.grad(neighbor_relation(z, z_cnp), z)
    closer = z - 0.1 * gradient / gradient.abs().max()
    assert neighbor_relation(closer, z_cnp, "diagonal") > neighbor_relation(z, z_cnp, "diagonal")
    assert neighbor_relation(z, z, "diagonal").item() == pytest.approx(11, rel=1e-4)  # P - 1 between equals


@pytest.mark.parametrize("relation", RELATIONS)
def test_relations_do_not_know_the_order_of_patches(relation):
    z, z_cnp = predictions()
    order = torch.tensor([3, 0, 4, 1, 2])
    for normalize in ("token", "feature"):
        found = neighbor_relation(z[:, order], z_cnp[:, order], relation, normalize)
        torch.testing.assert_close(found, neighbor_relation(z, z_cnp, relation, normalize))


@pytest.mark.parametrize("relation", RELATIONS)
def test_relations_make_no_matrix_that_they_do_not_square(relation):
    z, z_cnp = (torch.randn(3, 6, 40) for _ in range(2))
    for normalize in ("token", "feature", "none"):
        with LargestTensor() as largest:
            neighbor_relation(z, z_cnp, relation, normalize)
        assert largest.elements <= (1600 if relation == "off_diagonal_squared" else 720)


def test_unknown_arguments_are_refused():
    z, z_cnp = predictions()
    with pytest.raises(ValueError, match="off_diagonal_squared"):
        neighbor_relation(z, z_cnp, "offdiag")
    with pytest.raises(ValueError, match="feature"):
        neighbor_relation(z, z_cnp, normalize="batch")


# ---- the term in a model --------------------------------------------------------------------------------------------


def build(norm_pix_loss=True, grid=(4, 5), mask_ratio=0.75, **options):
    """A small model with the neighbour term; the same weights each time."""
    torch.manual_seed(0)
    return direct(
        MaskedAutoencoderViT,
        img_size=(4 * grid[0], 4 * grid[1]),
        patch_size=4,
        embed_dim=16,
        depth=2,
        num_heads=2,
        decoder_embed_dim=12,
        decoder_depth=1,
        decoder_num_heads=3,
        norm_pix_loss=norm_pix_loss,
        mask_ratio=mask_ratio,
        terms={"neighbor": NeighborTerm(NeighborOptions(**options))},
    )


def batch(model, n=3, rows=None):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(n, 3, *model.patch_embed.img_size, generator=generator)
    shape = (n, model.num_patches) if rows is None else (n, rows, model.num_patches)
    return images, torch.rand(shape, generator=generator)


def decoded_by_hand(model, tokens_ND, orders):
    """Encoder and decoder for each image's sequence of tokens; `orders[n][k]` is the place of its k-th token."""
    decoded = []
    for tokens, places in zip(tokens_ND, orders, strict=True):
        x = torch.cat([model.cls_token[0], tokens])[None]
        for block in model.blocks:
            x = block(x)
        x = model.decoder_embed(model.norm(x))[0]
        whole = [x[0]] + [
            x[1 + places.index(i)] if i in places else model.mask_token[0, 0] for i in range(model.num_patches)
        ]
        x = torch.stack(whole)[None] + model.decoder_pos_embed
        for block in model.decoder_blocks:
            x = block(x)
        decoded.append(model.decoder_norm(x)[0, 1:])
    return torch.stack(decoded)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"border": "wrap"},
        {"similarity": "embed"},
        {"similarity": "pixels"},
        {"space": "embedding"},
        {"tokens": "visible"},
        {"tokens": "masked", "relation": "off_diagonal_squared"},
        {"normalize": "feature", "tokens": "visible"},
        {"relation": "token_off_diagonal", "tokens": "masked", "normalize": "none"},
        {"relation": "alignment", "similarity": "pixels", "border": "wrap", "space": "embedding"},
    ],
)
@torch.no_grad()
def test_the_term_is_what_its_options_say(options):
    model = build(**options)
    images, noise = batch(model)
    chosen = NeighborOptions(**options)
    tokens = model.patch_embed(images) + model.pos_embed[:, 1:]
    compared = {"embed_pos": tokens, "embed": model.patch_embed(images), "pixels": patchify(images, 4)}[
        chosen.similarity
    ]
    orders, companions = noise.argsort(dim=1)[:, :5].tolist(), []
    for image, places in enumerate(orders):
        best = [
            max(
                loop_neighbors(i, model.grid, chosen.border),
                key=lambda j: cosine(compared[image, i], compared[image, j]),
            )  # noqa: B023
            for i in places
        ]
        companions.append(tokens[image, best])
    visible = [tokens[image, places] for image, places in enumerate(orders)]
    z, z_cnp = decoded_by_hand(model, visible, orders), decoded_by_hand(model, companions, orders)
    view = model.observe(images, noise=noise)
    torch.testing.assert_close(model.terms["neighbor"].second_pass(model, view), model.decoder_pred(z_cnp))
    if chosen.space == "pixels":
        z, z_cnp = model.decoder_pred(z), model.decoder_pred(z_cnp)
    if chosen.tokens != "all":
        ids = [[i for i in range(20) if (i in places) == (chosen.tokens == "visible")] for places in orders]
        z, z_cnp = (torch.stack([x[image, i] for image, i in enumerate(ids)]) for x in (z, z_cnp))
    expected = relation_by_matrix(z, z_cnp, chosen.relation, chosen.normalize)
    torch.testing.assert_close(model(images, noise=noise)["neighbor"], expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_random_companion_is_a_second_mask():
    model = build(companion="random")
    assert model.noise_rows == 2
    images, rows = batch(model, rows=2)
    tokens = model.patch_embed(images) + model.pos_embed[:, 1:]
    orders = rows[:, 1].argsort(dim=1)[:, :5].tolist()
    decoded = decoded_by_hand(model, [tokens[n, places] for n, places in enumerate(orders)], orders)
    view = model.observe(images, noise=rows)
    second = model.terms["neighbor"].second_pass(model, view)
    torch.testing.assert_close(second, model.decoder_pred(decoded))
    expected = neighbor_relation(view.pred, second)
    torch.testing.assert_close(model(images, noise=rows)["neighbor"], expected)


@pytest.mark.parametrize("norm_pix_loss", [True, False])
@pytest.mark.parametrize("relation", RELATIONS)
def test_released_mode(relation, norm_pix_loss):
    model = build(norm_pix_loss=norm_pix_loss, cnp="released", relation=relation)
    images, noise = batch(model)
    view = model.observe(images, noise=noise)
    with torch.no_grad():
        companions = released_by_gather(view.tokens, model.grid).gather(1, view.ids_keep[:, :, None].expand(-1, -1, 16))
        latent, taps = model.encode_tokens(companions)
        pred = model.decoder_pred(model.decode(latent, random_masking(noise, 5), taps))
    second = model.terms["neighbor"].second_pass(model, view)
    assert torch.equal(second, pred)
    expected = relation_by_matrix(view.pred, pred, relation, "token" if norm_pix_loss else "none")
    torch.testing.assert_close(model(images, noise=noise)["neighbor"], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "changes", [{"border": "natural"}, {"similarity": "pixels"}, {"normalize": "feature"}, {"companion": "random"}]
)
def test_released_mode_decides_the_selection(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        NeighborOptions(cnp="released", **changes)
    assert NeighborOptions(cnp="released").border == "wrap" and NeighborOptions().border == "natural"


@pytest.mark.parametrize(
    "wrong",
    [
        {"weight": float("nan")},
        {"weight": "5e-5"},
        {"weight": True},
        {"relation": "offdiag"},
        {"tokens": "some"},
        {"border": ""},
    ],
)
def test_impossible_options_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        NeighborOptions(**wrong)


def test_grids_that_are_too_small_are_refused():
    with pytest.raises(ValueError, match="2 x 2"):
        build(grid=(2, 2), mask_ratio=0.5, cnp="released")
    model = build(grid=(2, 2), mask_ratio=0.5)
    assert model(*batch(model)[:1])["loss"].isfinite()
    assert build(grid=(3, 3), mask_ratio=0.5, cnp="released")


def test_an_encoder_that_gets_hidden_patches_is_refused():
    with pytest.raises(ValueError, match="visible patches only"):
        methods.build("simmim", "mae_vit_tiny_patch4", input_size=16, terms={"neighbor": {}})


def test_patches_of_two_values_can_be_standardised():
    model = methods.build(
        "nor_mae", "mae_vit_tiny_patch1", input_size=4, in_chans=2, embed_dim=8, depth=1, num_heads=1,
        decoder_embed_dim=8, decoder_depth=1, decoder_num_heads=1,
    )  # fmt: skip
    assert model(torch.randn(2, 2, 4, 4))["neighbor"].isfinite()


def test_the_second_pass_gets_no_gradient():
    model = build(weight=1.0)
    images, noise = batch(model)
    view = model.observe(images, noise=noise)
    assert not model.terms["neighbor"].second_pass(model, view).requires_grad
    fixed = model.terms["neighbor"].second_pass(model, view)
    (neighbor_relation(view.pred, fixed) + model.target_loss(view)).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    model(images, noise=noise)["loss"].backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, expected[name], msg=name)


def test_at_weight_0_the_loss_is_maes_to_the_last_bit():
    model = build(weight=0.0)
    torch.manual_seed(0)
    plain = build()
    plain.terms.clear()
    images, noise = batch(model)
    losses = [m(images, noise=noise)["loss"] for m in (model, plain)]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    pairs = zip(model.parameters(), plain.parameters(), strict=True)
    assert all(torch.equal(a.grad, b.grad) for a, b in pairs if a.requires_grad)


def test_constant_and_black_images_are_finite():
    model = build(similarity="pixels")
    _, noise = batch(model)
    for images in (torch.zeros(3, 3, 16, 20), torch.full((3, 3, 16, 20), 0.7)):
        losses = model(images, noise=noise)
        losses["loss"].backward()
        assert all(value.isfinite() for value in losses.values())
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    view = model.observe(torch.full((3, 3, 16, 20), 0.7), noise=noise)
    for found, kept in zip(model.terms["neighbor"].companions(model, view), view.ids_keep, strict=True):
        assert found.tolist() == [loop_neighbors(i, model.grid, "natural")[0] for i in kept.tolist()]


def test_the_effective_weight():
    def scale(norm_pix_loss=True, **options):
        model = build(norm_pix_loss, **options)
        return model.terms["neighbor"].scale(model)

    assert scale() == {"weight x (P-1)": pytest.approx(5e-5 * 47)}
    assert scale(weight=1.0, space="embedding") == {"weight x (E-1)": 11.0}
    assert scale(relation="alignment", weight=0.0192) == {"weight x 2(P-1)/P": pytest.approx(0.0192 * 2 * 47 / 48)}
    assert scale(relation="token_off_diagonal", tokens="visible", weight=1.0) == {
        "weight x L(L-1)(P-1)/P": pytest.approx(20 * 47 / 48)  # L: 5 visible patches
    }
    assert scale(normalize="none") == scale(relation="off_diagonal_squared") == scale(False, cnp="released") == {}


@pytest.mark.parametrize("relation", ["off_diagonal", "diagonal", "token_off_diagonal"])
def test_equal_predictions_have_the_effective_weight(relation):
    """token_off_diagonal relates every prediction with those of the other patches: all are equal here."""
    model = build(relation=relation, weight=1.0)
    equal = torch.randn(48).expand(2, model.num_patches, 48)
    (reach,) = model.terms["neighbor"].scale(model).values()
    assert neighbor_relation(equal, equal, relation).abs().item() == pytest.approx(reach, rel=1e-4)


def test_embeddings_without_a_reconstruction_are_refused():
    """No part of the loss would train the prediction layer."""
    with pytest.raises(ValueError, match="space 'embedding' leaves the prediction layer untrained"):
        methods.build(
            "nor_mae",
            "mae_vit_tiny_patch16",
            reconstruction_weight=0.0,
            terms={"neighbor": {"space": "embedding"}},
            **dict(input_size=64, embed_dim=16, depth=1, num_heads=2),
            **dict(decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2),
        )


def test_one_graph_holds_the_term_and_its_gradient():
    model = build(weight=0.1, normalize="feature", tokens="masked", relation="off_diagonal_squared", companion="random")
    images, noise = batch(model, rows=2)
    expected = model(images, noise=noise)
    expected["loss"].backward()
    gradient = model.patch_embed.proj.weight.grad.clone()
    model.zero_grad()
    found = torch.compile(model, fullgraph=True, backend="aot_eager")(images, noise=noise)
    found["loss"].backward()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])
    torch.testing.assert_close(model.patch_embed.proj.weight.grad, gradient)


# ---- several processes ----------------------------------------------------------------------------------------------

TOGETHER = [
    {"relation": "off_diagonal", "normalize": "feature"},
    {"relation": "off_diagonal_squared", "normalize": "token"},
    {"relation": "off_diagonal_squared", "normalize": "feature", "tokens": "visible"},
    {"relation": "token_off_diagonal", "normalize": "feature"},
    {"relation": "off_diagonal"},
]


def loss_and_gradients(model, images, noise):
    losses = model(images.double(), noise=noise)
    losses["loss"].backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return losses["loss"].detach(), gradients


def half_of_the_batch(rank, folder):
    """The mean loss of two processes and their gradients in DistributedDataParallel, for each of TOGETHER."""
    meet = {"init_method": f"file://{folder}/meet", "rank": rank, "world_size": 2, "timeout": timedelta(minutes=5)}
    torch.distributed.init_process_group("gloo", **meet)
    results = []
    for options in TOGETHER:
        model = build(weight=0.5, **options).double()
        images, noise = batch(model, n=4)
        half = slice(2 * rank, 2 * rank + 2)
        loss, gradients = loss_and_gradients(
            torch.nn.parallel.DistributedDataParallel(model), images[half], noise[half]
        )
        torch.distributed.all_reduce(loss)
        results.append((loss / 2, {name.removeprefix("module."): value for name, value in gradients.items()}))
    torch.distributed.destroy_process_group()
    return results


def test_two_processes_are_one(tmp_path):
    other = torch.multiprocessing.get_context("spawn").Process(target=half_of_the_batch, args=(1, tmp_path))
    other.start()
    results = half_of_the_batch(0, tmp_path)
    other.join()
    for options, (loss, gradients) in zip(TOGETHER, results, strict=True):
        model = build(weight=0.5, **options).double()
        expected_loss, expected = loss_and_gradients(model, *batch(model, n=4))
        torch.testing.assert_close(loss, expected_loss)
        for name, gradient in expected.items():
            torch.testing.assert_close(gradients[name], gradient, msg=f"{options}: {name}")


# ---- the published implementation -----------------------------------------------------------------------------------


@needs_vectors
def test_the_published_outputs():
    vectors = read("nor_mae_released")
    relation = ("token_" if vectors["token_reg"] else "") + "off_diagonal" if vectors["off_diag"] else "diagonal"
    weight = float(vectors["lam"])
    model, _ = model_of(
        vectors, neighbor=NeighborTerm(NeighborOptions(weight=weight, cnp="released", relation=relation))
    )
    images, noise = vectors["imgs"], vectors["noise"]
    losses = model(images, noise=noise)
    losses["loss"].backward()
    view = model.observe(images, noise=noise)
    found = {
        "loss": losses["loss"],
        "rec": losses["reconstruction"],
        "corr": weight * losses["neighbor"],
        "pred": view.pred,
        "pred_cnp": model.terms["neighbor"].second_pass(model, view),
    }
    assert assert_as_published(found, model, vectors) == 8


def test_the_true_neighbour_is_another_loss():
    """The two selections have different losses: one cannot stand in for the other."""
    closest, released = build(border="wrap", weight=1.0), build(cnp="released", weight=1.0)
    images, noise = batch(closest)
    values = [model(images, noise=noise)["neighbor"].item() for model in (closest, released)]
    assert abs(values[0] - values[1]) > 1e-3 * abs(values[0])


def test_the_loop_would_notice_the_released_gather(monkeypatch):
    monkeypatch.setattr(
        models_nor_mae, "closest_neighbors", lambda tokens, grid, border: released_neighbors(tokens, grid)
    )
    with pytest.raises(AssertionError):
        test_the_term_is_what_its_options_say({})
