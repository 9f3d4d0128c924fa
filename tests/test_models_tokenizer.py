"""Codes, tokenizers and k-means against loops, closed forms and known values."""

import pytest
import timm
import torch
import torch.nn.functional as F

import methods
from models_targets import nearest_center, patchify
from models_tokenizer import FSQ, EMACodebook, KMeansTokenizer, encoder_from, load_tokenizer
from models_vit import FrozenNetwork, compute_digest
from tests.runs import Training, assert_same_end, finish, tiny_for
from tests.small import CODES, batch, options_of, small, teacher_checkpoint, tokenizer_checkpoint, write_checkpoint
from util import checkpoint

TAKEN, REFUSED = torch.tensor(True), torch.tensor(False)


# ---- finite scalar quantisation --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("levels", "tokens"), [((8, 6, 5), 240), ((8, 5, 5, 5), 1000), ((7, 5, 5, 5, 5), 4375), ((8, 8, 8, 6, 5), 15360)]
)
def test_fsq_numbers_its_grid_without_gaps(levels, tokens):
    fsq = FSQ(levels, 0.99, 0.02)
    everything = torch.arange(tokens)
    codes = fsq.lookup(everything)
    assert fsq.tokens == tokens and torch.equal(fsq.number(codes), everything)
    assert codes.unique(dim=0).shape == (tokens, len(levels)) and codes.abs().max() <= 1


def test_fsq_has_the_known_values():
    fsq = FSQ((8, 8, 8, 6, 5), 0.99, 0.02)
    codes = fsq.codes(torch.tensor([[0.0], [9.0], [-9.0]]).expand(-1, 5))
    torch.testing.assert_close(codes[0], torch.zeros(5))
    torch.testing.assert_close(codes[1], torch.tensor([0.75, 0.75, 0.75, 2 / 3, 1.0]))
    torch.testing.assert_close(codes[2], -torch.ones(5))


def test_fsq_passes_the_gradient_of_the_squashing():
    vectors = torch.randn(2, 3, 3, requires_grad=True)
    found = FSQ((8, 6, 5), 0.99, 0.02).eval()(vectors)
    found.codes.sum().backward()
    half, offset = torch.tensor([3.5035, 2.5025, 2.002]), torch.tensor([0.5, 0.5, 0.0])
    slope = 1 - (vectors + (offset / half).atanh()).tanh().square()
    torch.testing.assert_close(vectors.grad, slope * half / torch.tensor([4.0, 3.0, 2.0]))
    assert found.commitment is None and found.tokens.shape == (2, 3)


# ---- the codebook ----------------------------------------------------------------------------------------------------


def codebook(tokens=6, width=4, decay=0.9, dead=0.0):
    torch.manual_seed(0)
    made = EMACodebook(tokens, width, decay, dead)
    made.usage.fill_(1.0)
    return made


def test_the_nearest_centre_is_the_nearest():
    x, centers = torch.randn(3, 50, 7), torch.randn(20, 7)
    expected = torch.cdist(x, centers.expand(3, -1, -1)).argmin(dim=-1)
    assert torch.equal(nearest_center(x, centers), expected)
    many = torch.randn(2**20 + 7, 7)  # taken in parts
    parts = nearest_center(many[:, None], centers)
    assert parts.shape == (2**20 + 7, 1) and torch.equal(parts[-40:, 0], nearest_center(many[-40:], centers))


def test_vectors_become_the_code_of_the_smallest_angle():
    book, vectors = codebook(), torch.randn(2, 5, 4, requires_grad=True)
    codes, tokens, commitment = book(vectors)
    unit = F.normalize(vectors, dim=-1)
    assert torch.equal(tokens, F.cosine_similarity(vectors[:, :, None], book.vectors, dim=-1).argmax(dim=-1))
    torch.testing.assert_close(codes, book.vectors[tokens])
    torch.testing.assert_close(commitment, (unit - book.vectors[tokens]).square().mean())
    grads = torch.autograd.grad(codes.sum(), vectors, retain_graph=True)[0], torch.autograd.grad(unit.sum(), vectors)[0]
    torch.testing.assert_close(*grads)  # straight through


def test_the_commitment_is_0_for_codes_2_over_z_for_orthogonal_ones_and_at_most_4_over_z():
    book = codebook(tokens=1)
    code = book.vectors[0]
    across = F.normalize(torch.randn(4) - 0, dim=0)
    across = F.normalize(across - (across @ code) * code, dim=0)
    for vector, expected in ((code, 0.0), (across, 2 / 4), (-code, 4 / 4)):
        assert book(3 * vector[None, None]).commitment.item() == pytest.approx(expected, abs=1e-6)


def looped_update(book, vectors, tokens, decay):
    codes, usage = book.vectors.clone(), book.usage.clone()
    for k in range(len(codes)):
        own = [F.normalize(v, dim=0) for v, token in zip(vectors, tokens, strict=True) if token == k]
        usage[k] = decay * usage[k] + (1 - decay) * len(own)
        if own:
            mean = F.normalize(torch.stack(own).mean(dim=0), dim=0)
            codes[k] = F.normalize(decay * codes[k] + (1 - decay) * mean, dim=0)
    return codes, usage


def test_codes_follow_the_mean_of_their_vectors():
    book, vectors = codebook(tokens=12), torch.randn(4, 5, 4)
    tokens = book(vectors).tokens
    assert 1 < tokens.unique().numel() < 12
    codes, usage = looped_update(book, vectors.flatten(0, 1), tokens.flatten(), 0.9)
    book.after_update(TAKEN)
    torch.testing.assert_close(book.vectors, codes)
    torch.testing.assert_close(book.usage, usage)
    torch.testing.assert_close(book.vectors.norm(dim=1), torch.ones(12), rtol=0, atol=1e-6)


def test_micro_batches_add_up_and_a_refused_update_changes_nothing():
    vectors = torch.randn(4, 5, 4)
    whole, parts, refused = codebook(dead=0.02), codebook(dead=0.02), codebook(dead=0.02)
    whole(vectors)
    for part in vectors.split(2):
        parts(part)
        refused(part)
    before = {name: value.clone() for name, value in refused.state_dict().items()}
    for book, taken in ((whole, TAKEN), (parts, TAKEN), (refused, REFUSED)):
        book.after_update(taken)
    assert torch.equal(whole.vectors, parts.vectors) and torch.equal(whole.usage, parts.usage)
    assert all(torch.equal(value, before[name]) for name, value in refused.state_dict().items())
    whole.after_update(TAKEN)  # without a forward pass between
    assert torch.equal(whole.vectors, parts.vectors)


def test_evaluation_changes_no_code():
    book = codebook().eval()
    before = book.vectors.clone()
    book(torch.randn(2, 5, 4))
    book.after_update(TAKEN)
    assert torch.equal(book.vectors, before)


def test_dead_codes_become_vectors_of_the_images():
    book = codebook(tokens=40, dead=0.02)
    book.usage.zero_()
    vectors = torch.randn(8, 10, 4)
    used = book(vectors).tokens.unique()
    book.after_update(TAKEN)
    unit = F.normalize(vectors.flatten(0, 1), dim=1)
    exact = (book.vectors @ unit.T).amax(dim=1) > 1 - 1e-6
    assert exact.sum() >= 40 - len(used)  # the first update fills the codebook
    average = 80 / 40
    assert ((book.usage == average) | (book.usage >= 0.02 * average)).all()
    alive = book.vectors.clone()
    book(vectors)
    book.after_update(TAKEN)
    assert torch.allclose(book.vectors, alive, atol=0.3)  # none is replaced again at once
    assert book.updates == 2


def test_perplexity_and_usage_describe_the_moving_average():
    book = codebook(tokens=4, dead=0.1)
    for usage, perplexity, share in (
        ([1, 1, 1, 1], 4, 1.0),
        ([2, 0, 0, 0], 1, 0.25),
        ([3, 3, 0, 0.01], None, 0.5),
        ([0, 0, 0, 0], 1, 0.0),
    ):
        book.usage.copy_(torch.tensor(usage))
        found = book.statistics()
        assert found["usage"].item() == share
        assert perplexity is None or found["perplexity"].item() == pytest.approx(perplexity)


def test_fsq_counts_how_often_tokens_occur():
    quantizer, vectors = FSQ((4, 3), decay=0.9, dead=0.02), torch.randn(2, 5, 2)
    quantizer.usage.fill_(1.0)
    tokens = torch.cat([quantizer(vectors).tokens, quantizer(2 * vectors).tokens]).flatten()
    quantizer.after_update(TAKEN)
    expected = 0.9 + 0.1 * torch.bincount(tokens, minlength=12)
    torch.testing.assert_close(quantizer.usage, expected)
    quantizer.after_update(TAKEN)  # without a forward pass between
    quantizer(vectors)
    quantizer.after_update(REFUSED)
    quantizer.eval()(vectors)
    quantizer.after_update(TAKEN)
    torch.testing.assert_close(quantizer.usage, expected)


# ---- the tokenizers --------------------------------------------------------------------------------------------------


@pytest.fixture(params=["vq_tokenizer", "vqkd_tokenizer"])
def method(request):
    return request.param


@pytest.mark.parametrize("quantizer", [{}, {"quantizer": "fsq", "levels": (4, 3)}], ids=["ema", "fsq"])
def test_the_loss_is_the_sum_of_its_parts(method, quantizer):
    model = small(method, commitment=0.5, **quantizer)
    images, _, _ = batch(model)
    losses = model(images)
    main = "reconstruction" if method == "vq_tokenizer" else "distillation"
    expected = losses[main] + (0 if quantizer else 0.5 * losses["commitment"])
    torch.testing.assert_close(losses["loss"], expected)
    assert {*losses} == {"loss", main, "perplexity", "usage"} | (set() if quantizer else {"commitment"})
    assert model.tokens == (12 if quantizer else 24)


@pytest.mark.parametrize("quantizer", [{}, {"quantizer": "fsq", "levels": (4, 3)}], ids=["ema", "fsq"])
def test_codes_move_with_updates_that_are_taken(method, quantizer):
    model = small(method, **quantizer)
    images, _, _ = batch(model)
    before = {name: value.clone() for name, value in model.quantizer.state_dict().items()}

    def is_unchanged():
        return all(torch.equal(value, before[name]) for name, value in model.quantizer.state_dict().items())

    model(images)
    model.after_update(REFUSED)
    assert is_unchanged()
    model(images)  # of a step that was not completed
    model.before_step(None)
    model.after_update(TAKEN)
    assert is_unchanged()
    model(images)
    model.after_update(TAKEN)
    assert not is_unchanged() and model.quantizer.usage.sum() > before["usage"].sum()


@pytest.mark.parametrize(
    "more", [{}, {"perceptual": 0.3, "perceptual_encoder": "teacher"}], ids=["plain", "perceptual"]
)
def test_another_image_size_is_that_of_a_new_model(method, more):
    if more and method == "vqkd_tokenizer":
        pytest.skip("it has no perceptual loss")
    more = {name: teacher_checkpoint() if value == "teacher" else value for name, value in more.items()}
    model, other = small(method, **more), small(method, **more, input_size=(8, 12))
    other.load_state_dict({name: value for name, value in model.state_dict().items() if "pos_embed" not in name}, False)
    model.set_input_size((8, 12))
    images, _, _ = batch(other)
    found, expected = model(images), other(images)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=name)
    assert not any(p.requires_grad for p in (model.pos_embed, model.decoder_pos_embed))
    if more:
        assert not any(p.requires_grad for p in model.perceptual.network.parameters())


def test_the_reconstruction_is_of_pixels():
    model = small("vq_tokenizer").eval()
    images, _, _ = batch(model)
    shown = model.pictures(images)["reconstruction"]
    torch.testing.assert_close(model(images)["reconstruction"], (shown - images).abs().mean())
    tokens = model.tokenize(images)
    assert tokens.shape == (4, 20) and tokens.max() < 24
    torch.testing.assert_close(patchify(shown, 4), model.show(tokens))
    assert model.constant_loss(images) == pytest.approx((images - images.median()).abs().mean().item(), abs=0.02)


def test_vqkd_compares_directions_with_the_teachers_features():
    model = small("vqkd_tokenizer").eval()
    images, _, _ = batch(model)
    teacher = small("mae", **{"embed_dim": 24, "depth": 4, "num_heads": 3}).eval()
    teacher.load_state_dict(checkpoint.load_model(teacher_checkpoint())[0])
    wanted, found = teacher.encode(images)[:, 1:], model.decode(model.quantize(images).codes)
    assert found.shape == wanted.shape == (4, 20, 24)
    expected = 1 - (F.normalize(found, dim=-1) * F.normalize(wanted, dim=-1)).sum(dim=-1).mean()
    distillation = model(images)["distillation"]
    torch.testing.assert_close(distillation, expected)
    assert 0.6 < distillation < 1.4  # at the start about 1
    assert model.options.teacher_dim == 24 and len(model.options.teacher_digest) == 64
    assert not [name for name in model.state_dict() if "teacher" in name] and model.pictures(images) is None


def test_the_perceptual_loss_is_the_distance_of_unit_features():
    encoder, _ = encoder_from(*checkpoint.load_model(teacher_checkpoint()), "teacher", 3)
    model = small("vq_tokenizer", perceptual=0.3, perceptual_encoder=teacher_checkpoint())
    assert model.options.perceptual_blocks == (1, 2, 3, 4)
    images, _, _ = batch(model)
    losses, shown = model(images), model.pictures(images)["reconstruction"]
    terms = []
    for found, wanted in zip(
        encoder.features(shown, (1, 2, 3, 4)), encoder.features(images, (1, 2, 3, 4)), strict=True
    ):
        for a, b in zip(found.flatten(0, 1), wanted.flatten(0, 1), strict=True):
            terms.append((a / a.norm() - b / b.norm()).square().sum())
    torch.testing.assert_close(losses["perceptual"], torch.stack(terms).mean())
    torch.testing.assert_close(
        losses["loss"], losses["reconstruction"] + 0.3 * losses["perceptual"] + losses["commitment"]
    )
    assert model.perceptual_loss(images, images).item() == pytest.approx(0, abs=1e-10)
    (gradient,) = torch.autograd.grad(losses["perceptual"], model.decoder_pred.weight)
    assert gradient.abs().max() > 0 and model.constant_loss(images) is None


def test_block_outputs_are_those_of_timm():
    encoder, _ = encoder_from(*checkpoint.load_model(teacher_checkpoint()), "teacher", 3)
    images, _, _ = batch(small("mae"))
    (second, last) = encoder.eval().features(images, (2, 4))
    expected = encoder.forward_intermediates(images, indices=[1, 3], output_fmt="NLC", intermediates_only=True)
    torch.testing.assert_close(second, expected[0])
    torch.testing.assert_close(encoder.norm(last), encoder.features(images)[0])


def test_the_heads_of_192_channels_must_be_given():
    """They are 12 here and 3 in DeiT, and the weights do not tell."""
    weights = methods.build("mae", "mae_vit_tiny_patch16", input_size=32, depth=1).state_dict()
    with pytest.raises(ValueError, match="encoder_heads: .* other.pth does not contain it for its width 192"):
        encoder_from(weights, {}, "other.pth", 3)
    assert encoder_from(weights, {}, "other.pth", 3, heads=3)[0].heads == 3
    own = {"model": "mae_vit_tiny_patch16", "input_size": (32, 32)}
    assert encoder_from(weights, own, "own.pth", 3)[0].heads == 12


def test_an_encoder_of_timm_and_of_other_patches_can_teach(tmp_path):
    torch.manual_seed(0)
    sizes = dict(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=5)
    torch.save(timm.models.VisionTransformer(**sizes).state_dict(), tmp_path / "timm.pth")
    with pytest.raises(ValueError, match="timm.pth does not contain it for its width 24. Give --teacher_heads"):
        small("vqkd_tokenizer", teacher=str(tmp_path / "timm.pth"))
    model = small("vqkd_tokenizer", teacher=str(tmp_path / "timm.pth"), teacher_heads=3)
    images, _, _ = batch(model)
    assert model.teacher.network.patch_embed.img_size == (32, 40) and model(images)["loss"].isfinite()


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        ("vqkd_tokenizer", {"teacher": ""}, "give --teacher"),
        ("vqkd_tokenizer", {"teacher_digest": "0" * 64}, "other weights"),
        ("vqkd_tokenizer", {"teacher_dim": 8}, "teacher_dim is 8, and the teacher .* has 24"),
        ("vqkd_tokenizer", {"in_chans": 1}, "takes 3 channels, not 1"),
        (
            "vq_tokenizer",
            {"perceptual": 1.0, "perceptual_encoder": "TEACHER", "in_chans": 1},
            "takes 3 channels, not 1",
        ),
        (
            "vqkd_tokenizer",
            {"teacher": "AVERAGING", "teacher_heads": 3},
            "without a norm before its tokens are averaged",
        ),
        ("vqkd_tokenizer", {"teacher": "HEADLESS"}, "contains no encoder"),
        ("vqkd_tokenizer", {"teacher_heads": 2}, "teacher_heads: .* was trained with 3 attention heads, not with 2"),
        (
            "vq_tokenizer",
            {"perceptual": 1.0, "perceptual_encoder": "TEACHER", "perceptual_heads": 2},
            "perceptual_heads: .* was trained with 3 attention heads, not with 2",
        ),
        ("vq_tokenizer", {"perceptual": 1.0}, "needs --perceptual_encoder"),
        ("vq_tokenizer", {"perceptual_encoder": "TEACHER"}, "no effect with perceptual 0"),
        ("vq_tokenizer", {"levels": (8, 1), "quantizer": "fsq"}, "at least 2 each"),
        ("vq_tokenizer", {"codes": 1}, "codes: must be at least 2"),
        (
            "vq_tokenizer",
            {"perceptual": 1.0, "perceptual_encoder": "TEACHER", "perceptual_blocks": (5,)},
            "has blocks 1 to 4",
        ),
        (
            "vq_tokenizer",
            {"perceptual": 1.0, "perceptual_encoder": "TEACHER", "perceptual_blocks": (0, 2)},
            "has blocks 1 to 4",
        ),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, method, changes, message):
    torch.save({"model": {"head.weight": torch.zeros(1)}}, tmp_path / "headless.pth")
    averaging = timm.models.VisionTransformer(
        img_size=32,
        patch_size=8,
        embed_dim=24,
        depth=2,
        num_heads=3,
        class_token=True,
        global_pool="avg",
        num_classes=5,
    )
    torch.save(averaging.state_dict(), tmp_path / "averaging.pth")
    files = {
        "TEACHER": teacher_checkpoint(),
        "HEADLESS": str(tmp_path / "headless.pth"),
        "AVERAGING": str(tmp_path / "averaging.pth"),
    }
    with pytest.raises(ValueError, match=message):
        small(
            method,
            **{name: files.get(value, value) if isinstance(value, str) else value for name, value in changes.items()},
        )


def test_images_of_another_size_are_refused():
    model = small("vq_tokenizer")
    with pytest.raises(ValueError, match=r"this model takes \[images, 3"):
        model(torch.zeros(1, 3, 64, 64))


def test_a_tokenizer_without_its_teacher_computes_no_loss():
    model = small("vqkd_tokenizer")
    model.teacher = FrozenNetwork()
    with pytest.raises(ValueError, match="loaded without its teacher"):
        model(batch(model)[0])


def test_a_tokenizer_comes_back_from_its_file_with_the_digest_of_what_decides_its_tokens(tmp_path):
    model = small("vq_tokenizer").eval()
    images, _, _ = batch(model)

    def digest(name):
        options = {"in_chans": 3} | options_of("vq_tokenizer", model)
        path = write_checkpoint(tmp_path / name, model, options)
        tokenizer, found, made_with = load_tokenizer(checkpoint.load_model, path)
        assert torch.equal(tokenizer.eval().tokenize(images), model.tokenize(images)) and made_with["codes"] == 24
        return found

    first = digest("a.pth")
    model.quantizer.usage += 1
    model.decoder_pred.bias.data += 1
    assert digest("b.pth") == first
    model.quantizer.vectors.data = model.quantizer.vectors.flip(0)
    assert digest("c.pth") != first


def test_a_tokenizer_starts_from_anothers_weights_at_another_size():
    from models_vit import load_from_run

    weights, made_with = checkpoint.load_model(tokenizer_checkpoint())
    model = small("vq_tokenizer", input_size=(16, 16))
    report = load_from_run(model, weights, made_with)
    assert not report.missing and report.resampled == ["decoder_pos_embed", "pos_embed"]
    assert torch.equal(model.quantizer.vectors, weights["quantizer.vectors"])


def test_a_run_folder_is_a_tokenizer(tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "last.pth").write_bytes(open(tokenizer_checkpoint(), "rb").read())
    assert load_tokenizer(checkpoint.load_model, str(tmp_path / "run"))[0].tokens == 24


def test_centres_of_pixels_and_of_features():
    images, _, _ = batch(small("mae"))
    centers = patchify(images, 4)[0, :7].clone()
    pixels = KMeansTokenizer(centers, 4, (4, 5))
    assert pixels.tokenize(images)[0, :7].tolist() == list(range(7)) and pixels.tokens == 7
    torch.testing.assert_close(pixels.show(torch.tensor([[3]]))[0, 0], centers[3])
    encoder, _ = encoder_from(*checkpoint.load_model(teacher_checkpoint()), "teacher", 3)
    features = encoder.features(images)[0]
    plain = KMeansTokenizer(features[1, :9].clone(), 4, (4, 5), encoder)
    assert plain.tokenize(images)[1, :9].tolist() == list(range(9)) and plain.show(torch.tensor([[3]])) is None
    cosine = KMeansTokenizer(F.normalize(features[1, :9], dim=-1), 4, (4, 5), encoder, cosine=True)
    expected = F.cosine_similarity(features[:, :, None], features[1, :9], dim=-1).argmax(dim=-1)
    assert torch.equal(cosine.tokenize(images), expected)


def test_weights_have_one_digest_whatever_their_order():
    a, b = torch.randn(2), torch.randn(3)
    assert compute_digest({"a": a, "b": b}) == compute_digest({"b": b, "a": a}) != compute_digest({"a": b, "b": a})


# ---- runs ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_killed_tokenizer_resumes_bit_for_bit_and_beit_takes_its_tokens(tmp_path):
    codes = [word for name, value in CODES.items() for word in (f"--{name}", value)]
    words = [*tiny_for("vq_tokenizer"), "--method", "vq_tokenizer", *codes, "--epochs", 2]
    words += ["--picture_every", 2, "--save_steps", 2]
    finish(tmp_path / "one", *words, tiny=False)
    Training(tmp_path / "killed", *words, tiny=False).kill_at(5)
    finish(tmp_path / "killed", *words, tiny=False)
    assert_same_end(tmp_path / "one", tmp_path / "killed")
    state = checkpoint.load(tmp_path / "one" / "checkpoints" / "last.pth")
    assert state["model"]["quantizer.updates"] == state["step"] > 5
    assert [path.suffix for path in (tmp_path / "one" / "samples").iterdir()] == [".png"]
    beit = [*tiny_for("beit"), "--method", "beit", "--tokenizer", tmp_path / "one", "--epochs", 1]
    finish(tmp_path / "beit", *beit, tiny=False)
    kept = methods.from_checkpoint(tmp_path / "beit" / "checkpoints" / "last.pth")[1]
    assert kept["tokens"] == 24 and len(kept["token_digest"]) == 64
    training = Training(tmp_path / "other", *beit, "--mean", "0.3", tiny=False)
    assert training.wait() == 2 and "another mean: give --mean 0.5" in training.stderr
