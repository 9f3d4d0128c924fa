"""The neighbor term on a share of the images: mean, variance and cost, for any batch size."""

import itertools

import pytest
import torch

import methods

SIZES = dict(
    model="mae_vit_tiny_patch4",
    input_size=16,
    embed_dim=24,
    depth=1,
    num_heads=2,
    decoder_embed_dim=16,
    decoder_depth=1,
    decoder_num_heads=2,
    norm_pix_loss=True,
)
N, ROW = 5, 1  # images, and the row of noise that selects some of them
DECIDED = {
    "paper": {},
    "released": {"cnp": "released"},
    "alignment": {"relation": "alignment"},
    "token off-diagonal": {"relation": "token_off_diagonal"},
    "raw diagonal": {"relation": "diagonal", "normalize": "none"},
    "hidden embeddings": {"space": "embedding", "tokens": "masked"},
    "random companion": {"companion": "random"},
    "pixels": {"similarity": "pixels"},
}


def built(fraction, **options):
    torch.manual_seed(0)
    model = methods.build("nor_mae", **SIZES, terms={"neighbor": {**options, "fraction": fraction}})
    return model.double()


def batch():
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(N, 3, 16, 16, generator=generator, dtype=torch.float64)
    return images, torch.rand(N, 3, 16, generator=generator)


def term_and_gradient(model, images, noise):
    """Return the term, and its gradient as one vector."""
    value = model(images, noise=noise)["neighbor"]
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(value, learned, allow_unused=True)
    return value.detach(), torch.cat([g.flatten() for g in gradients if g is not None])


def noise_for(model, noise, chosen):
    """Return the noise of the batch; in the row of the fraction, only the images `chosen` have small values."""
    rows = noise[:, : model.noise_rows].clone()
    rows[:, -1] = torch.tensor([0.1 if image in chosen else 0.9 for image in range(N)])[:, None]
    return rows


@pytest.mark.parametrize("options", DECIDED.values(), ids=DECIDED)
def test_the_mean_over_all_choices_is_the_whole_term(options):
    images, noise = batch()
    whole, some = built(1.0, **options), built(0.4, **options)
    value, gradient = term_and_gradient(whole, images, noise[:, : whole.noise_rows])
    found = [
        term_and_gradient(some, images, noise_for(some, noise, chosen))
        for chosen in itertools.combinations(range(N), 2)
    ]
    torch.testing.assert_close(torch.stack([each for each, _ in found]).mean(), value, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(torch.stack([each for _, each in found]).mean(dim=0), gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_the_variance_is_what_the_option_says(k):
    """(1/k - 1/N) times the variance between images, for drawing without replacement."""
    images, noise = batch()
    some, whole = built(k / N), built(1.0)
    one_by_one = torch.stack([whole(images[n : n + 1], noise=noise[n : n + 1, 0])["neighbor"] for n in range(N)])
    choices = itertools.combinations(range(N), k)
    found = torch.stack([some(images, noise=noise_for(some, noise, chosen))["neighbor"] for chosen in choices])
    expected = (1 / k - 1 / N) * one_by_one.var(correction=1)
    torch.testing.assert_close(found.var(correction=0), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("fraction", "k"), [(0.01, 1), (0.2, 1), (0.3, 2), (0.5, 2), (0.7, 4), (0.99, 5)])
def test_k_images_take_the_second_pass(fraction, k, monkeypatch):
    images, noise = batch()
    model = built(fraction)
    passed = []
    encode = model.encode_tokens
    monkeypatch.setattr(model, "encode_tokens", lambda tokens: passed.append(len(tokens)) or encode(tokens))
    model(images, noise=noise[:, :2])
    assert passed == [N, k]


@pytest.mark.parametrize(("fraction", "drawn"), [(1, (1, 1)), (0.25, (1, 4)), (0.3, (3, 10)), (0.3333, (1, 3)),
                                                  (0.01, (1, 100)), (0.003, (1, 333)), (0.375, (3, 8))])  # fmt: skip
def test_a_fraction_draws_k_of_every_g_images(fraction, drawn):
    assert built(fraction).terms["neighbor"].options.drawn == drawn


@pytest.mark.parametrize(("fraction", "batch_sizes"), [(0.5, (2, 4, 6, 12)), (0.25, (4, 12)), (1 / 3, (3, 6, 12))])
def test_the_images_of_an_update_are_drawn_alike_in_batches_of_any_size(fraction, batch_sizes):
    """Accumulation, processes and batch size divide an update's images into consecutive parts."""
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(12, 3, 16, 16, generator=generator, dtype=torch.float64)
    noise = torch.rand(12, 2, 16, generator=generator)
    model = built(fraction)
    found = []
    for size in batch_sizes:
        parts = [term_and_gradient(model, *each) for each in zip(images.split(size), noise.split(size), strict=True)]
        found.append([torch.stack(values).mean(dim=0) for values in zip(*parts, strict=True)])
    for value, gradient in found[1:]:
        torch.testing.assert_close(value, found[0][0], rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(gradient, found[0][1], rtol=1e-5, atol=1e-7)
    drawn = model.terms["neighbor"].some_images(numbered(model, images, noise)).labels
    k, group = model.terms["neighbor"].options.drawn
    for first in range(0, 12, group):
        smallest = sorted(range(first, first + group), key=lambda n: noise[n, 1, 0].item())[:k]
        assert sorted(n for n in drawn.tolist() if first <= n < first + group) == sorted(smallest)


@pytest.mark.parametrize(("batch_size", "combined"), [(4, ""), (8, ""), (6, "device"), (1, "device")])
def test_batches_of_incomplete_groups_are_reported(batch_size, combined):
    assert built(0.25).terms["neighbor"].combines(batch_size) == combined
    assert built(1.0).terms["neighbor"].combines(batch_size) == ""


def test_one_image_takes_the_second_pass():
    images, noise = batch()
    one = images[:1], noise[:1, :2]
    torch.testing.assert_close(
        built(0.25)(one[0], noise=one[1])["neighbor"], built(1.0)(*one[:1], noise=one[1][:, 0])["neighbor"]
    )


def numbered(model, images, noise):
    """Return the view of a forward pass in which the label of each image is its index."""
    view = model.observe(images, noise=noise)
    view.labels = torch.arange(len(images))
    return view


def test_every_image_is_drawn_equally_often_and_independently_of_its_mask():
    model, counts = built(0.4), torch.zeros(N)
    images, _ = batch()
    for seed in range(400):
        noise = torch.rand(N, 2, 16, generator=torch.Generator().manual_seed(seed))
        counts[model.terms["neighbor"].some_images(numbered(model, images, noise)).labels] += 1
    assert counts.sum() == 800
    assert (counts / 400 - 0.4).abs().max() < 4 * (0.4 * 0.6 / 400) ** 0.5
    assert model.noise_rows == 2


def test_the_mask_and_the_reconstruction_are_those_of_the_whole_term():
    images, noise = batch()
    whole, some = built(1.0)(images, noise=noise[:, :1]), built(0.4)(images, noise=noise[:, :2])
    assert torch.equal(whole["reconstruction"], some["reconstruction"])
    assert not torch.equal(whole["neighbor"], some["neighbor"])
    assert torch.equal(whole["neighbor"], built(1)(images, noise=noise[:, :2])["neighbor"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"normalize": "feature"}, "normalize 'feature'.*mean over images"),
        ({"relation": "off_diagonal_squared"}, "relation 'off_diagonal_squared'.*mean over images"),
    ],
)
def test_a_term_that_is_no_mean_over_images_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        built(0.5, **options)
    built(1.0, **options)


@pytest.mark.parametrize("fraction", [0, -0.5, 1.5, float("nan"), "half", True])
def test_what_is_no_share_is_refused(fraction):
    with pytest.raises(ValueError, match="fraction is"):
        built(fraction)


def test_a_fraction_compiles_into_one_graph_that_serves_every_step():
    model = built(0.4).float()
    graphs = []
    compiled = torch.compile(model, fullgraph=True, backend=lambda graph, inputs: graphs.append(graph) or graph.forward)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        images, noise = torch.randn(N, 3, 16, 16, generator=generator), torch.rand(N, 2, 16, generator=generator)
        assert torch.equal(compiled(images, noise=noise)["loss"], model(images, noise=noise)["loss"])
    assert len(graphs) == 1
