"""The content of figures: arrows, counts, planes, scores and distances, compared with loops and closed forms."""

import math

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from matplotlib.quiver import Quiver

import methods
from data.sources import Source
from models_mae import take
from tools.figures import attention, collapse, figure1, neighbors, reconstruction, separation, similarity, subject
from tools.figures.models import FigureModel
from tools.figures.subject import Subject

STATISTICS = ((0.5, 0.4, 0.3), (0.2, 0.3, 0.25))
SIZES = {"embed_dim": 24, "depth": 2, "num_heads": 2, "decoder_embed_dim": 16, "decoder_depth": 1}


def shown(model=None, label="small", seed=0, **overrides):
    """Return a small model of 6 x 6 patches; a new one unless one is given."""
    if model is None:
        torch.manual_seed(seed)
        sizes = {"input_size": 48, "decoder_num_heads": 2, **SIZES, **overrides}
        model = methods.build("mae", "mae_vit_tiny_patch8", **sizes)
    return FigureModel(label, "fresh", model.eval(), STATISTICS, torch.device("cpu"))


def pixels(count=2, size=48, channels=3, seed=0):
    """Return blurred noise, so that neighbours are similar and no two patches are equal."""
    noise = torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(seed))
    return (255 * F.avg_pool2d(noise, 7, stride=1, padding=3)).to(torch.uint8)


def two(*models, **words):
    """Return a subject of two images and some models."""
    return Subject(models or [shown()], pixels(), ["a.jpg", "b.jpg"], **words)


def loop_closest(tokens_LD, rows, columns):
    """Reference implementation: one patch at a time, natural borders."""
    answer = []
    for here in range(rows * columns):
        y, x = divmod(here, columns)
        around = [
            r * columns + c
            for r in range(max(y - 1, 0), min(y + 2, rows))
            for c in range(max(x - 1, 0), min(x + 2, columns))
            if (r, c) != (y, x)
        ]
        answer.append(max(around, key=lambda j: F.cosine_similarity(tokens_LD[here], tokens_LD[j], dim=0)))
    return answer


# ---- models and images ----------------------------------------------------------------------------------------------


def test_normalized_and_displayed_undo_each_other():
    model = shown()
    images = model.normalized(pixels())
    expected = (pixels()[1, 2, 3, 4] / 255 - 0.3) / 0.25
    assert images[1, 2, 3, 4] == pytest.approx(expected.item(), abs=1e-6)
    np.testing.assert_allclose(two(model).displayed(model, images), two(model).photographs, atol=1e-6)


def test_chosen_patches_are_encoded_as_the_masked_autoencoder_encodes_them():
    model = shown()
    images, masking = model.normalized(pixels()), two(model).masking
    tokens = take(model.embed(images)[1], masking.ids_keep)
    with torch.no_grad():
        expected, _ = model.model.encode_tokens(take(model.model.embed(images), masking.ids_keep))
        torch.testing.assert_close(model.encode(tokens), expected[:, 1:])


@pytest.mark.parametrize(
    "words", [{}, {"class_token": False, "global_pool": "avg"}, {"reg_tokens": 2}, {"no_embed_class": True}]
)
def test_any_plain_vit_of_timm_is_encoded_as_timm_encodes_it(words):
    torch.manual_seed(0)
    vit = timm.models.VisionTransformer(
        48, 8, embed_dim=24, depth=2, num_heads=2, num_classes=0, pre_norm=True, **words
    )
    model = shown(vit)
    images = model.normalized(pixels())
    with torch.no_grad():
        expected = vit.forward_features(images)[:, vit.num_prefix_tokens :]
        torch.testing.assert_close(model.encode(model.embed(images)[1]), expected)
        *_, (_, last) = model.layers(images)
        torch.testing.assert_close(vit.norm(last)[:, model.prefix :], expected)


def test_grey_and_many_channels_are_shown_as_far_as_a_screen_can():
    assert subject.as_pictures(torch.rand(2, 1, 4, 6)).shape == (2, 4, 6)
    five = torch.rand(2, 5, 4, 6)
    np.testing.assert_array_equal(subject.as_pictures(five), five[:, :3].movedim(1, -1).numpy())
    assert Subject([shown()], pixels(channels=5), ["a", "b"]).channels_note == [
        "Shown: the first 3 channels, as red, green and blue, of 5."
    ]


def test_models_of_other_grids_cannot_share_a_mask():
    other = shown(methods.build("mae", "mae_vit_tiny_patch16", input_size=48, decoder_num_heads=2, **SIZES), "coarse")
    with pytest.raises(ValueError, match="same grid of patches; found small 6 x 6, coarse 3 x 3"):
        two(shown(), other).masking  # noqa: B018


def test_masks_are_the_same_for_the_same_seed_and_hide_what_they_should():
    first, again, other = (two(seed=seed, mask_ratio=0.5).masking.mask for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.sum(dim=1).tolist() == [18, 18]
    with pytest.raises(ValueError, match="leaves 0 of 36"):
        two(mask_ratio=0.99).masking  # noqa: B018


# ---- neighbours -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", ["embed_pos", "embed", "pixels"])
def test_each_arrow_ends_at_the_neighbour_that_the_oracle_finds(space):
    made = two(similarity=space)
    model = made.models[0]
    figure = neighbors.neighbors(made)
    tokens = subject.compared(model, model.normalized(made.pixels), space).detach()
    for number in range(2):
        oracle = loop_closest(tokens[number], 6, 6)
        visible = sorted(made.masking.ids_keep[number].tolist())
        (arrows,) = [part for part in figure.axes[4 * number + 2].collections if isinstance(part, Quiver)]
        starts = [int(y // 8 * 6 + x // 8) for x, y in zip(arrows.X, arrows.Y, strict=True)]
        ends = [(x + u, y + v) for x, y, u, v in zip(arrows.X, arrows.Y, arrows.U, arrows.V, strict=True)]
        assert starts == visible
        assert [int(y // 8 * 6 + x // 8) for x, y in ends] == [oracle[patch] for patch in visible]
        assert all(x % 8 == y % 8 == 4 for x, y in ends)  # the middle of a patch


def test_the_views_hold_the_visible_patches_and_their_neighbours_and_nothing_else():
    made = two()
    companions, _ = made.neighbors(made.only, "embed_pos")
    axes = neighbors.neighbors(made).axes[4:8]
    original, masked, _, alone = (axis.images[0].get_array().data for axis in axes)
    np.testing.assert_allclose(original, pixels()[1].movedim(0, -1) / 255, atol=1e-6)
    visible = made.masking.ids_keep[1].tolist()
    theirs = companions[1][visible].tolist()
    for view, patches in ((masked, visible), (alone, theirs)):
        for patch in range(36):
            y, x = divmod(patch, 6)
            square = np.s_[8 * y : 8 * y + 8, 8 * x : 8 * x + 8]
            if patch in patches:
                np.testing.assert_array_equal(view[square], original[square])
            else:
                assert (view[square] == np.float32(subject.BLANK)).all()


def test_shared_neighbours_have_the_thick_border():
    made = two()
    companions, similarities = made.neighbors(made.only, "embed_pos")
    visible = sorted(made.masking.ids_keep[0].tolist())
    theirs = companions[0][visible].tolist()
    shared = {patch for patch in theirs if theirs.count(patch) > 1}
    alone, thick = [part for part in neighbors.neighbors(made).axes[3].collections]
    assert len(thick.get_paths()) == len(shared)
    assert len(alone.get_paths()) == len(set(theirs)) - len(shared)
    assert thick.get_linewidth()[0] > 1.5 * alone.get_linewidth()[0]
    words = neighbors.summary(visible, theirs, similarities[0][visible].tolist())
    assert f"9 patches, {len(set(theirs))} distinct" in words and f"{len(shared)} of them shared" in words


def test_the_released_selection_points_at_the_top_row():
    made = two(cnp="released")
    companions, _ = made.neighbors(made.only, "embed_pos")
    assert companions.max() < 8
    assert "released" in neighbors.sentences(made)[1]


def test_the_closeup_shows_two_patches_with_one_closest_neighbour():
    made = two()
    companions, _ = made.neighbors(made.only, "embed_pos")
    for number in range(2):
        closest = companions[number].tolist()
        shared, one, other = neighbors.shared_pair(closest, 6)
        assert one != other and closest[one] == closest[other] == shared
        assert closest.count(shared) == max(closest.count(patch) for patch in closest)
        bold = [
            max(axis.texts, key=lambda text: float(text.get_text()))
            for axis in neighbors.closeup(made).axes[3 * number + 1 : 3 * number + 3]
        ]
        assert all(text.get_fontweight() == "bold" for text in bold)
        assert all(text.get_position() == (shared % 6 * 8 + 4, shared // 6 * 8 + 4) for text in bold)
    with pytest.raises(ValueError, match="no two patches"):
        neighbors.shared_pair([1, 0], 2)


# ---- similarity -----------------------------------------------------------------------------------------------------


def stored(count=5):
    """Return a source of images in memory."""
    images = [image.movedim(0, -1).numpy() for image in pixels(count)]
    return Source([f"{number}.png" for number in range(count)], images.__getitem__)


def test_the_streamed_histogram_holds_every_patch_once_and_the_loops_figures():
    model, source = shown(), stored()
    samples = similarity.crops(source, model, "centre", seed=0)
    found = similarity.stream(model, samples, range(5), batch_size=2, progress=lambda batches, **_: batches)
    for space, histogram in found.items():
        tokens = subject.compared(model, model.normalized(pixels(5)), space).detach()
        oracle = [
            F.cosine_similarity(image[here], image[there], dim=0).item()
            for image in tokens
            for here, there in enumerate(loop_closest(image, 6, 6))
        ]
        assert histogram.counts.sum() == histogram.size == 5 * 36
        assert histogram.mean == pytest.approx(np.mean(oracle), abs=1e-6)
        assert (histogram.low, histogram.high) == pytest.approx((min(oracle), max(oracle)), abs=1e-6)
        expected, _ = np.histogram(oracle, bins=similarity.BINS, range=(-1, 1))
        assert np.abs(histogram.counts - expected).sum() <= 2  # rounding may move one value to the next bin
    axes = similarity.similarity(model, found, "centre").axes
    areas = [axis.patches[0].get_data().values.sum() for axis in axes]
    assert areas == pytest.approx([100, 100, 100])


def test_the_share_of_alike_patches_is_counted_exactly_and_rounding_over_one_is_kept():
    histogram = similarity.Histogram()
    histogram.add(torch.tensor([[0.99, 0.98999], [1.0000001, -1.0]], dtype=torch.float64))
    assert histogram.share_alike == 0.5
    assert histogram.counts[-1] == 2 and histogram.counts[0] == 1


def test_random_crops_depend_on_seed_and_image_alone():
    model, source = shown(), stored()
    state = torch.get_rng_state()
    one, other = (similarity.crops(source, model, "random", seed) for seed in (0, 1))
    forth = [one[number].image for number in range(5)]
    back = [one[number].image for number in reversed(range(5))][::-1]
    assert all(torch.equal(first, second) for first, second in zip(forth, back, strict=True))
    assert not torch.equal(forth[0], other[0].image)
    assert torch.equal(state, torch.get_rng_state())


# ---- separation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n, d", [(40, 24), (12, 24), (1500, 192)])
def test_the_plane_holds_the_variance_that_a_float64_svd_finds(n, d):
    features = torch.randn(n, d, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 2, d) + 3
    plane, share = separation.pca(features)
    centred = features.double().numpy() - features.double().numpy().mean(axis=0)
    singular = np.linalg.svd(centred, compute_uv=False)
    np.testing.assert_allclose(plane.square().sum(dim=0), singular[:2] ** 2, rtol=1e-9)
    np.testing.assert_allclose(share, singular[:2] ** 2 / (singular**2).sum(), rtol=1e-9)
    assert abs(plane[:, 0] @ plane[:, 1]) < 1e-8 * singular[0] ** 2
    torch.testing.assert_close(separation.pca(features.flip(0))[0].flip(0), plane)  # signs do not depend on the order


def loop_separation(features, groups):
    """Reference implementation: one token and one group at a time."""
    n, names = len(features), sorted(set(groups))
    middle = np.mean(features, axis=0)
    total = sum(((x - middle) ** 2).sum() for x in features)
    within = 0.0
    for name in names:
        members = [x for x, group in zip(features, groups, strict=True) if group == name]
        within += sum(((x - np.mean(members, axis=0)) ** 2).sum() for x in members)
    return 1 - (within / (n - len(names))) / (total / (n - 1))


def test_separation_is_what_the_loop_says():
    generator = torch.Generator().manual_seed(0)
    features, groups = torch.randn(30, 8, generator=generator), torch.randint(0, 9, (30,), generator=generator) * 7
    expected = loop_separation(features.double().numpy(), groups.tolist())
    assert separation.separation(features, groups) == pytest.approx(expected, abs=1e-12)


def test_separation_is_one_where_groups_coincide_and_zero_on_average_where_they_mean_nothing():
    generator = torch.Generator().manual_seed(0)
    groups = torch.arange(20).repeat_interleave(2)
    assert separation.separation(torch.randn(20, 8, generator=generator)[groups], groups) == pytest.approx(1)
    chance = [separation.separation(torch.randn(40, 8, generator=generator), groups) for _ in range(200)]
    assert abs(np.mean(chance)) < 3 * np.std(chance) / math.sqrt(200)
    with pytest.raises(ValueError, match="two groups"):
        separation.separation(torch.randn(5, 8), torch.zeros(5))


def test_tokens_are_encoded_from_the_same_patches_under_every_model():
    made = two(shown(), shown(label="other", seed=1))
    first, second = (separation.encode(made, model) for model in made.models)
    assert all(torch.equal(one.ids, other.ids) for one, other in zip(first, second, strict=True))
    model, masking = made.models[0].model, made.masking
    images = made.models[0].normalized(made.pixels)
    with torch.no_grad():
        visible, _ = model.encode_tokens(take(model.embed(images), masking.ids_keep))
        companions, _ = model.encode_tokens(take(model.embed(images), torch.stack([part.ids for part in first])))
    torch.testing.assert_close(first[1].visible, F.normalize(visible[1, 1:], dim=-1))
    torch.testing.assert_close(first[1].companions, F.normalize(companions[1, 1:], dim=-1))


def test_a_shared_companion_counts_once_and_groups_are_a_companion_and_its_patches():
    encoded = separation.encode(two(mask_ratio=0.4), shown())[0]
    features, groups = separation.once(encoded)
    distinct = sorted(set(encoded.ids.tolist()))
    assert len(distinct) < len(encoded.ids)  # some are shared, otherwise nothing is tested
    assert len(features) == len(groups) == len(encoded.ids) + len(distinct)
    for number, patch in enumerate(encoded.ids.tolist()):
        assert distinct[groups[number]] == patch
        torch.testing.assert_close(features[len(encoded.ids) + groups[number]], encoded.companions[number])


def test_the_panel_draws_the_plane_and_says_the_score():
    made = two()
    figure = separation.separated(made)
    features, groups = separation.once(separation.encode(made, made.only)[0])
    squares, circles = figure.axes[0].collections
    plane = np.concatenate([circles.get_offsets(), squares.get_offsets()])
    np.testing.assert_allclose(plane, separation.pca(features)[0], atol=1e-9)
    assert f"separation {separation.separation(features, groups):.3f}" in figure.axes[0].get_xlabel()


def test_three_thousand_patches_are_no_obstacle():
    torch.manual_seed(0)
    model = shown(methods.build("mae", "mae_vit_tiny_patch4", decoder_num_heads=2, **SIZES))
    made = Subject([model], pixels(count=1, size=224), ["a.jpg"])
    (axis,) = separation.separated(made).axes
    squares, circles = axis.collections
    assert model.num_patches == 3136 and len(circles.get_offsets()) == 784
    assert f"{len(squares.get_offsets())} CNPs" in axis.get_xlabel()
    assert sum(isinstance(part, Quiver) for part in neighbors.neighbors(made).axes[2].collections) == 1


def test_figure_1_shows_the_same_neighbours_above_and_below():
    made = two(shown(), shown(label="other", seed=1))
    figure = figure1.figure1(made)
    companions, _ = made.neighbors(made.models[0], "pixels")
    visible = sorted(made.masking.ids_keep[0].tolist())
    assert f"{len(set(companions[0][visible].tolist()))} distinct" in figure.axes[2].get_xlabel()
    assert f"{len(set(companions[0][visible].tolist()))} CNPs" in figure.axes[4].get_xlabel()
    assert len(figure.axes) == 6


# ---- reconstruction -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_a_perfect_prediction_is_the_image(norm_pix_loss, monkeypatch):
    made = two(shown(norm_pix_loss=norm_pix_loss))
    model = made.only.model
    monkeypatch.setattr(model, "predict", lambda images, noise=None: (model.target(images), torch.ones(2, 36)))
    figure = reconstruction.reconstruction(made)
    for axis in (figure.axes[2], figure.axes[3]):
        np.testing.assert_allclose(axis.images[0].get_array().data, made.photographs[0], atol=1e-5)
    assert ("undone" in figure.get_suptitle()) == norm_pix_loss


def test_hidden_patches_are_predicted_and_visible_ones_the_images():
    made = two(shown(), shown(label="other", seed=1))
    figure = reconstruction.reconstruction(made)
    axes = np.array(figure.axes).reshape(2, 6)[1]
    original, masked, one, one_pasted, other, other_pasted = (axis.images[0].get_array().data for axis in axes)
    hidden = made.masking.mask[1].reshape(6, 6).numpy().repeat(8, 0).repeat(8, 1).astype(bool)
    assert hidden.mean() == 0.75
    np.testing.assert_array_equal(original, made.displayed(made.models[0], made.models[0].normalized(made.pixels))[1])
    for predicted, pasted in ((one, one_pasted), (other, other_pasted)):
        np.testing.assert_allclose(pasted[~hidden], original[~hidden], atol=1e-6)
        np.testing.assert_allclose(pasted[hidden], predicted[hidden], atol=1e-6)
    np.testing.assert_allclose(masked[~hidden], original[~hidden], atol=1e-6)
    assert np.abs(one - other).max() > 0.01
    assert axes[2].get_figure().axes[2].get_title() == "small\nreconstruction"


@pytest.mark.parametrize("method", ["nor_mae", "sup_nor_mae", "cross_mae", "simmim"])
def test_models_of_every_decoder_are_drawn(method):
    encoder_alone = {name: size for name, size in SIZES.items() if not name.startswith("decoder")}
    sizes = encoder_alone if method == "simmim" else {**SIZES, "decoder_num_heads": 2}
    model = methods.build(method, "mae_vit_tiny_patch8", input_size=64, **sizes)
    made = Subject([shown(model, method)], pixels(size=64), ["a", "b"])
    for draw in (reconstruction.reconstruction, neighbors.neighbors, separation.separated, attention.attention):
        assert draw(made).axes
    assert collapse.measure(made.only, made.pixels)[1][-1] > 1


def test_an_encoder_alone_cannot_reconstruct():
    vit = timm.models.VisionTransformer(48, 8, embed_dim=24, depth=1, num_heads=2, num_classes=0)
    with pytest.raises(ValueError, match="without a decoder"):
        reconstruction.reconstruction(two(shown(vit)))


# ---- attention ------------------------------------------------------------------------------------------------------


def test_attention_read_head_by_head_gives_the_blocks_own_output():
    model = shown().model
    block, x = model.blocks[0], torch.randn(2, 37, 24, generator=torch.Generator().manual_seed(0))
    values = block.attn.qkv(block.norm1(x)).reshape(2, 37, 3, 2, 12)[:, :, 2]
    heads = [weights @ values[:, :, head] for head, weights in enumerate(attention.head_attention(block, x))]
    torch.testing.assert_close(block.attn.proj(torch.cat(heads, dim=-1)), block.attn(block.norm1(x)))


def test_distances_between_patches_are_pixels_between_their_middles():
    distances = attention.patch_distances((2, 3), (8, 4))
    middles = [(8 * row, 4 * column) for row in range(2) for column in range(3)]
    expected = [[math.dist(one, other) for other in middles] for one in middles]
    np.testing.assert_allclose(distances, expected, atol=1e-5)


def test_distance_and_entropy_are_what_a_loop_says():
    model = shown()
    distance, entropy = attention.distance_and_entropy(model, pixels())
    assert distance.shape == entropy.shape == (2, 2)
    between = attention.patch_distances((6, 6), (8, 8))
    far, broad = [], []
    with torch.no_grad():
        for image in model.normalized(pixels()).split(1):
            (_, x), _, _ = model.layers(image)
            weights = list(attention.head_attention(model.model.blocks[0], x))[1][0]
            for row in weights[1:]:
                seen = row[1:] / row[1:].sum()
                far.append(sum(seen[there] * between[len(far) % 36, there] for there in range(36)).item())
                broad.append(-sum(share * math.log2(share) for share in row.tolist()))
    assert distance[0, 1].item() == pytest.approx(np.mean(far), rel=1e-4)
    assert entropy[0, 1].item() == pytest.approx(np.mean(broad), rel=1e-4)


def test_attention_that_looks_everywhere_lies_on_the_line_of_uniform_attention():
    model = shown()
    for block in model.model.blocks:
        torch.nn.init.zeros_(block.attn.qkv.weight)
    distance, entropy = attention.distance_and_entropy(model, pixels())
    torch.testing.assert_close(distance, attention.patch_distances((6, 6), (8, 8)).mean().expand(2, 2))
    torch.testing.assert_close(entropy, torch.tensor(math.log2(37)).expand(2, 2))
    figure = attention.attention(two(model))
    for axis, values in zip(figure.axes, (distance, entropy), strict=True):
        mean, uniform = axis.lines
        assert mean.get_ydata() == pytest.approx(uniform.get_ydata()[0], rel=1e-5)
        assert len(axis.collections[0].get_offsets()) == values.numel()


# ---- collapse -------------------------------------------------------------------------------------------------------


def test_token_similarity_is_the_mean_over_all_pairs():
    tokens = torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(0))
    for image, found in zip(tokens, collapse.token_similarity(tokens), strict=True):
        pairs = [F.cosine_similarity(image[i], image[j], dim=0).item() for i in range(7) for j in range(7) if i != j]
        assert found.item() == pytest.approx(np.mean(pairs), abs=1e-6)


def rank_of(*batches):
    spread = collapse.Spread(batches[0].shape[1])
    for batch in batches:
        spread.add(batch)
    return spread.effective_rank


def test_the_effective_rank_is_that_of_the_singular_values_whatever_the_batches():
    vectors = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 1, 6) + 5
    singular = np.linalg.svd(vectors.double().numpy() - vectors.double().numpy().mean(axis=0), compute_uv=False)
    share = singular / singular.sum()
    expected = math.exp(-(share * np.log(share)).sum())
    assert rank_of(vectors) == pytest.approx(expected, rel=1e-9)
    assert rank_of(*vectors.split(7)) == pytest.approx(expected, rel=1e-9)


def test_the_effective_rank_of_known_shapes():
    assert rank_of(torch.cat([torch.eye(4), -torch.eye(4)])) == pytest.approx(4)
    assert rank_of(torch.outer(torch.arange(5.0), torch.ones(4)) + 3) == pytest.approx(1, abs=1e-6)
    assert rank_of(torch.full((5, 4), 0.1)) == 1.0


def test_the_curves_are_measured_at_every_depth():
    model = shown()
    similarities, ranks = collapse.measure(model, pixels(3), batch_size=2)
    with torch.no_grad():
        outputs = [x[:, 1:] for _, x in model.layers(model.normalized(pixels(3)))]
    assert similarities == pytest.approx([collapse.token_similarity(x).mean().item() for x in outputs], abs=1e-9)
    assert ranks == pytest.approx([rank_of(x.flatten(0, 1)) for x in outputs], rel=1e-6)
    assert len(ranks) == 3
    figure = collapse.collapse(two(model))
    assert [len(axis.lines[0].get_ydata()) for axis in figure.axes] == [3, 3]
