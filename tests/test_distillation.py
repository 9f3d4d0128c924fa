"""Distillation methods and their gradients, compared with loops over images, heads and tokens; teachers of timm."""

import math
from types import SimpleNamespace

import pytest
import timm
import torch
from timm.layers import DropPath
from torch.nn import functional as F
from torchvision.transforms.v2.functional import adjust_brightness, adjust_contrast, adjust_saturation

from methods import METHODS, build, from_checkpoint
from models_mae import jitter_colours
from models_teacher import Teacher, compare
from options.teacher import TeacherOptions
from tests.small import SMALL, TEACHER, batch, options_of, small, teacher_checkpoint, write_checkpoint

PRESETS = ("dmae", "mae_lite_distill", "d2_mae", "tiny_mim", "g2sd", "amd", "proteus")
V = {"tiny_mim": 20, "proteus": 20, "amd": 1}  # visible patches; else 5

# ---- the equations --------------------------------------------------------------------------------------------------


def encode(vit, images, ids):
    """Return the input of the first block and the output of every block, for the patches `ids` `[N, V]`."""
    tokens = vit.patch_embed(images) + vit.pos_embed[:, 1:]
    chosen = torch.stack([row[own] for row, own in zip(tokens, ids, strict=True)])
    states = [torch.cat([(vit.cls_token + vit.pos_embed[:, :1]).expand(len(images), -1, -1), chosen], dim=1)]
    for block in vit.blocks:
        states.append(block(states[-1]))
    return states


def decode(model, latent, ids):
    """Return the output of every decoder block, for all patches."""
    embedded = model.decoder_embed(latent)
    rows = []
    for tokens, own in zip(embedded, ids, strict=True):
        places = {0: tokens[0]} | {int(place) + 1: token for place, token in zip(own, tokens[1:], strict=True)}
        rows.append(torch.stack([places.get(place, model.mask_token[0, 0]) for place in range(21)]))
    states = [torch.stack(rows) + model.decoder_pos_embed]
    for block in model.decoder_blocks:
        states.append(block(states[-1]))
    return states


def products(x, weight, bias, heads, a, b):
    """Return `[image][head][i][j]` = A_i . B_j / sqrt(d), where A and B are parts `a` and `b` of the layer's output."""
    channels = x.shape[-1]
    found = []
    for image in x:
        layers = [
            image @ weight[part * channels : (part + 1) * channels].T + bias[part * channels : (part + 1) * channels]
            for part in (a, b)
        ]
        d = channels // heads
        by_head = [[part[:, head * d : (head + 1) * d] for part in layers] for head in range(heads)]
        found.append([[[(q * k).sum() / math.sqrt(d) for k in theirs] for q in own] for own, theirs in by_head])
    return found


def attention_of(block, x, a=0, b=1):
    return products(block.norm1(x), block.attn.qkv.weight, block.attn.qkv.bias, block.attn.num_heads, a, b)


def mean_squared(pairs):
    """Return the mean squared difference over all values of pairs of vectors."""
    total = count = 0
    for ours, theirs in pairs:
        total, count = total + ((ours - theirs) ** 2).sum(), count + len(ours)
    return total / count


def token_pairs(ours, theirs):
    return zip(ours.flatten(0, 1), theirs.flatten(0, 1), strict=True)


def through_heads(term, student, teacher):
    """Return the mean squared difference of logits, after a convolution over heads for the student's."""
    weight, bias = term.head.weight[:, :, 0, 0], term.head.bias
    total = count = 0
    for ours, theirs in zip(student, teacher, strict=True):
        for head, rows in enumerate(theirs):
            for i, row in enumerate(rows):
                for j, value in enumerate(row):
                    mixed = bias[head] + sum(weight[head, own] * ours[own][i][j] for own in range(len(ours)))
                    total, count = total + (mixed - value) ** 2, count + 1
    return total / count


def divergence(student, teacher):
    """Return the mean over images, heads and rows of KL(softmax(teacher) || softmax(student))."""
    total = count = 0
    for ours, theirs in zip(student, teacher, strict=True):
        for own_rows, rows in zip(ours, theirs, strict=True):
            for own, row in zip(own_rows, rows, strict=True):
                q, p = torch.stack(own).softmax(0), torch.stack(row).softmax(0)
                total, count = total + (p * (p.log() - q.log())).sum(), count + 1
    return total / count


def jittered(images, numbers, strength):
    """Return images with ImageNet's normalisation, jittered by torchvision in the order of the last three numbers."""
    mean, std = (torch.tensor(values)[:, None, None] for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    rows = []
    for image, row in zip(images, numbers, strict=True):
        x = image * std.to(image) + mean.to(image)
        for change in row[3:6].argsort().tolist():
            adjust = (adjust_brightness, adjust_contrast, adjust_saturation)[change]
            x = adjust(x, 1 + strength * (2 * row[change].item() - 1))
        rows.append((x - mean.to(image)) / std.to(image))
    return torch.stack(rows)


def reconstruction(model, images, ids, decoded):
    """Return the mean squared error over hidden patches of the prediction from the decoder's last block."""
    pred = model.decoder_pred(model.decoder_norm(decoded))[:, 1:]
    error = ((pred - model.target(images)) ** 2).mean(dim=-1)
    hidden = [(n, place) for n, own in enumerate(ids) for place in range(20) if place not in own.tolist()]
    return sum(error[n, place] for n, place in hidden) / len(hidden)


def equations(method, model, teacher, images, noise):
    """Compute each part of the method's loss, by name, from the equations of its paper."""
    order = noise[:, 0].argsort(dim=1)
    ids = order[:, : V.get(method, 5)]
    seen = images if method != "tiny_mim" else jittered(images, noise[:, 1], 0.4)
    states, terms, parts = encode(model, seen, ids), model.terms, {}
    latent = model.norm(states[-1])
    if model.predicts:
        source = model.decoder_input_norm(states[1]) if method == "d2_mae" else latent
        parts["reconstruction"] = reconstruction(model, images, ids, decode(model, source, ids)[-1])
    with torch.no_grad():
        taught = encode(teacher, images, ids)
    if method == "dmae":
        ours, theirs = terms["teacher"].head(states[1]), taught[3]
        pairs = [(a / a.norm(), b / b.norm()) for a, b in token_pairs(ours, theirs)]
        parts["teacher"] = sum((a - b).abs().sum() for a, b in pairs) / ours.numel()
    if method == "mae_lite_distill":
        logits = attention_of(teacher.blocks[3], taught[3])
        parts["teacher"] = through_heads(terms["teacher"], attention_of(model.blocks[1], states[1]), logits)
    if method == "d2_mae":
        logits, extra = attention_of(teacher.blocks[3], taught[3]), terms["teacher"].qkv
        parts["teacher"] = through_heads(terms["teacher"], products(latent, extra.weight, extra.bias, 2, 0, 1), logits)
    if method == "tiny_mim":
        for name, own, theirs in (("teacher", (0, 1), (0, 1)), ("teacher2", (0, 0), (2, 2))):
            extra = terms[name].qkv
            student = products(latent, extra.weight, extra.bias, 4, *own)
            parts[name] = divergence(student, attention_of(teacher.blocks[2], taught[2], *theirs))
    if method == "g2sd":
        ours = terms["teacher"].head(decode(model, latent, ids)[-1])
        with torch.no_grad():
            theirs = decode(teacher, teacher.norm(taught[-1]), ids)[1]
        total = 0
        for a, b in token_pairs(ours, theirs):
            b = (b - b.mean()) / (b.var(unbiased=False) + 1e-6).sqrt()
            difference = (a - b).abs()
            total += torch.where(difference < 2, difference**2 / 4, difference - 1).sum()
        parts["teacher"] = total / ours.numel()
    if method == "amd":
        with torch.no_grad():
            wider = encode(teacher, images, order[:, :5])
        for name, own, theirs in (("teacher", 1, 2), ("teacher2", 2, 4)):
            parts[name] = mean_squared(token_pairs(terms[name].head(states[own][:, 1:]), wider[theirs][:, 1:2]))
        generator = terms["teacher3"].head
        places = torch.stack([model.pos_embed[0, 1 + own] for own in order[:, 1:5]])
        made = generator.blocks(torch.cat([states[2], generator.mask_token + places], dim=1))[:, -4:]
        parts["teacher3"] = mean_squared(token_pairs(generator.head(generator.norm(made)), wider[4][:, 2:]))
    if method == "proteus":
        features = teacher.norm(taught[-1])
        for name, tokens in (("teacher", slice(0, 1)), ("teacher2", slice(1, None))):
            parts[name] = mean_squared(token_pairs(terms[name].head(latent[:, tokens]), features[:, tokens]))
        row = terms["teacher3"].noise_row
        counts = [int(20 * (0.1 + 0.4 * second)) if first < 0.5 else 0 for first, second in noise[:, row + 1, :2]]
        assert counts[0] > 1 and counts[1] == 0
        replaced = [own[:k] for own, k in zip(noise[:, row].argsort(dim=1), counts, strict=True)]
        tokens = (model.patch_embed(images) + model.pos_embed[:, 1:]).clone()
        for n, own in enumerate(replaced):
            tokens[n, own] = terms["teacher3"].mask_token[0, 0] + model.pos_embed[0, 1 + own]
        x = torch.cat([(model.cls_token + model.pos_embed[:, :1]).expand(len(images), -1, -1), tokens], dim=1)
        for block in model.blocks:
            x = block(x)
        with torch.no_grad():
            everything = teacher.norm(encode(teacher, images, torch.arange(20).expand(len(images), -1))[-1])
        student = terms["teacher3"].head(model.norm(x)[:, 1:])
        pairs = [(student[n, i], everything[n, 1 + i]) for n, own in enumerate(replaced) for i in own.tolist()]
        parts["teacher3"] = mean_squared(pairs)
    return parts


@pytest.mark.parametrize("method", PRESETS)
def test_a_method_computes_its_equations(method):
    more = {"decoder_depth": 2} if method == "g2sd" else {}
    terms = {}
    if method == "g2sd":
        options = TEACHER | {"decoder_depth": 2}
        torch.manual_seed(5)
        terms = {"teacher": {"checkpoint": find_file(build("mae", **options), {"method": "mae"} | options, "g2sd")}}
    model = small(method, **more, terms=terms).double()
    teacher, _ = from_checkpoint(model.terms["teacher"].options.checkpoint)
    teacher.double().requires_grad_(False)
    images, _, noise = batch(model, n=2)
    images = images.double()
    if method == "proteus":
        noise[:, -1, 0] = torch.tensor([0.3, 0.7])  # only the first image has masked patches
    found = model(images, noise=noise)
    expected = equations(method, model, teacher, images, noise)
    assert {*expected} == {*found} - {"loss"}
    weights = {name: term.options.weight for name, term in model.terms.items()} | {"reconstruction": 1.0}
    total = sum(weights[name] * part for name, part in expected.items())
    assert found["loss"].item() == pytest.approx(total.item(), rel=1e-10)
    for name, part in expected.items():
        assert found[name].item() == pytest.approx(part.item(), rel=1e-10), name
        assert part > 1e-6
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    ours = torch.autograd.grad(found["loss"], list(trained.values()))
    theirs = torch.autograd.grad(total, list(trained.values()))
    for name, a, b in zip(trained, ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10, msg=name)


def find_file(model, options, name):
    from tests.small import scratch

    return write_checkpoint(f"{scratch.name}/{name}.pth", model, options)


@pytest.mark.parametrize("method", PRESETS)
def test_the_loss_is_zero_where_teacher_and_student_are_equal(method):
    options = SMALL | {"depth": 2, "decoder_depth": 2}
    torch.manual_seed(3)
    teacher = build("mae", **options)
    path = find_file(teacher, {"method": "mae"} | options, "same")
    equal_blocks = {"student_block": -1, "teacher_block": -1}
    changes = {
        "dmae": {"teacher": equal_blocks},
        "g2sd": {"teacher": {"student_block": 1, "teacher_block": 1}},
        "amd": {"teacher3": None},  # with equal masks the generator has no input
        "tiny_mim": {"teacher": {"teacher_block": 2}, "teacher2": {"teacher_block": 2}},
    }.get(method, {})
    terms = changes | {"teacher": {"checkpoint": path} | changes.get("teacher", {})}
    if method == "amd":
        terms["teacher2"] = {}
    own = dict(options)
    if method in ("d2_mae", "tiny_mim"):  # the additional block corresponds to the teacher's second
        own["depth"] = 1
    if method == "g2sd":
        own["decoder_depth"] = 1
    own |= {"amd": {"mask_ratio": 0.75}, "tiny_mim": {"input_jitter": 0.0}}.get(method, {})
    model = small(method, **own, terms=terms)
    model.load_state_dict(
        teacher.state_dict() | {n: v for n, v in model.state_dict().items() if "terms" in n or "input" in n},
        strict=False,
    )
    for name, term in model.terms.items():
        if method in ("d2_mae", "tiny_mim"):
            block = teacher.blocks[1]
            model.norm.load_state_dict(block.norm1.state_dict())
            rows = slice(32, 48) if name == "teacher2" else slice(0, 32)
            with torch.no_grad():
                term.qkv.weight.copy_(block.attn.qkv.weight[rows])
                term.qkv.bias.copy_(block.attn.qkv.bias[rows])
        term.head = (
            torch.nn.LayerNorm(12, eps=1e-6, elementwise_affine=False) if method == "g2sd" else torch.nn.Identity()
        )
    images, _, noise = batch(model)
    if method == "proteus":  # equal patches, so that the mask token can be equal to them
        images = images[:, :, :1, :1].expand(-1, -1, 16, 20)[:1]
        noise = noise[:1]
        noise[:, -1, 0] = 0.3
        with torch.no_grad():
            model.terms["teacher3"].mask_token.copy_(model.patch_embed(images)[:, :1])
    losses = model(images, noise=noise)
    for name in model.terms:
        assert losses[name].item() == pytest.approx(0, abs=1e-6), name


# ---- combinations and options ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", PRESETS)
def test_a_method_combines_with_the_neighbor_term(method):
    model = small(method, terms={"neighbor": {}})
    images, _, noise = batch(model)
    losses = model(images, noise=noise)
    assert losses["neighbor"].isfinite() and model.predicts
    losses["loss"].backward()
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_the_encoders_input_alone_is_jittered_and_only_in_training(channels):
    statistics = {"mean": (0.4,) * channels, "std": (0.3,) * channels}
    model = small("mae", input_jitter=0.5, in_chans=channels, **statistics)
    plain = small("mae", in_chans=channels, **statistics)
    plain.load_state_dict(model.state_dict())
    images, _, noise = batch(model)
    assert model.noise_rows == 2 and plain.noise_rows == 1
    view = model.observe(images, noise=noise)
    assert torch.equal(view.images, images), "targets and teachers get the image as it is"
    changed = model.encoder_input(images, noise)
    torch.testing.assert_close(view.tokens, plain.embed(changed))
    assert (changed - images).abs().mean() > 0.02
    pixels = changed * 0.3 + 0.4
    assert -1e-6 < pixels.min() and pixels.max() < 1 + 1e-6
    model.eval(), plain.eval()
    torch.testing.assert_close(model.predict(images, noise=noise)[0], plain.predict(images, noise=noise[:, 0])[0])
    torch.testing.assert_close(model.encode(images), plain.encode(images))


def test_blocks_are_skipped_at_the_published_rate_in_training():
    model = small("tiny_mim", drop_path=0.1, input_jitter=0.0, depth=3)
    assert [(block.drop_path1.drop_prob, block.drop_path2.drop_prob) for block in model.blocks] == 3 * [(0.1, 0.1)]
    images, _, noise = batch(model)
    losses = [model(images, noise=noise)["loss"].item() for _ in range(20)]
    assert len({*losses}) > 1
    model.eval()
    assert len({model(images, noise=noise)["loss"].item() for _ in range(3)}) == 1
    assert METHODS["tiny_mim"].defaults["drop_path"] == 0.1
    assert not any(isinstance(module, DropPath) for module in small("tiny_mim").modules())


def test_a_middle_number_changes_nothing_and_other_channels_have_no_saturation():
    images, numbers = torch.rand(2, 3, 4, 4), torch.full((2, 6), 0.5)
    torch.testing.assert_close(jitter_colours(images, numbers, 0.4), images)
    numbers[:, 2] = 1.0
    torch.testing.assert_close(jitter_colours(images[:, :2], numbers, 0.4), images[:, :2])
    assert (jitter_colours(images, numbers, 0.4) - images).abs().max() > 0.05


def test_the_masks_of_the_further_pass_have_the_published_distribution():
    term = small("proteus").terms["teacher3"]
    noise = torch.rand(4000, 4, 20, generator=torch.Generator().manual_seed(0))
    view = SimpleNamespace(noise=noise, mask=noise[:, 0])
    model = SimpleNamespace(num_patches=20)
    term.noise_row = 2
    ids, chosen = term.masked_ids(model, view)
    counts = chosen.sum(dim=1)
    assert (counts > 0).float().mean().item() == pytest.approx(0.5, abs=0.03)
    some = counts[counts > 0]
    assert some.min() == 2 and some.max() == 9 and ids.shape == (4000, 10)
    for count in range(2, 10):  # int(20 u) for u uniform from 0.1 to 0.5
        assert (some == count).float().mean().item() == pytest.approx(1 / 8, abs=0.03)
    everywhere = torch.zeros(4000, 20).scatter(1, ids, chosen)[counts > 0].mean(dim=0)
    torch.testing.assert_close(everywhere, torch.full((20,), 5.5 / 20), atol=0.04, rtol=0)


def test_a_batch_without_replaced_patches_has_no_loss_there():
    model = small("proteus")
    images, _, noise = batch(model)
    noise[:, -1, 0] = 0.9
    losses = model(images, noise=noise)
    assert losses["teacher3"] == 0 and losses["loss"].isfinite()
    losses["loss"].backward()
    assert not [name for name, p in model.named_parameters() if p.requires_grad and not p.grad.isfinite().all()]


@pytest.mark.parametrize("distance", ["l1", "l2", "smooth_l1", "cosine", "kl"])
def test_equal_weights_are_the_mean_and_others_select(distance):
    options = TeacherOptions(distance=distance, normalize="softmax" if distance == "kl" else "layer_norm")
    student, teacher = torch.randn(2, 3, 8).double(), torch.randn(2, 3, 8).double()
    torch.testing.assert_close(
        compare(student, teacher, options, torch.ones(2, 3)), compare(student, teacher, options), check_dtype=False
    )
    weights = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    chosen = weights.bool()
    torch.testing.assert_close(
        compare(student, teacher, options, weights),
        compare(student[chosen][None], teacher[chosen][None], options),
        check_dtype=False,
    )


def test_only_what_is_needed_is_built_and_run():
    assert not any(name.startswith(("decoder", "mask_token")) for name in small("tiny_mim").state_dict())
    names = {name.split(".")[0] for name in small("g2sd").state_dict()}
    assert {"decoder_embed", "decoder_blocks"} <= names and not {"decoder_norm", "decoder_pred"} & names
    depths = {"dmae": 3, "mae_lite_distill": 4, "tiny_mim": 3, "amd": 4, "proteus": 4}
    for method, depth in depths.items():
        network = small(method).terms["teacher"].teacher.network
        assert len(network.encoder.blocks) == depth, method
        assert all(term.teacher.network is None for term in list(small(method).terms.values())[1:])


def test_terms_with_one_teacher_run_it_once(monkeypatch):
    model = small("proteus")
    calls = []
    original = Teacher.forward
    monkeypatch.setattr(Teacher, "forward", lambda self, *given: calls.append(given[-1]) or original(self, *given))
    images, _, noise = batch(model)
    model(images, noise=noise)
    assert calls == [(("features", 0),)]


def test_two_teachers():
    second = {"checkpoint": teacher_checkpoint(4), "student_block": 2, "tokens": "class", "distance": "cosine"}
    model = small("dmae", terms={"teacher2": second})
    images, _, noise = batch(model)
    losses = model(images, noise=noise)
    assert {"teacher", "teacher2"} <= {*losses} and 0 < losses["teacher2"] <= 2
    assert model.terms["teacher"].options.num_heads == 3 and model.terms["teacher2"].options.num_heads == 4
    torch.testing.assert_close(losses["loss"], losses["reconstruction"] + losses["teacher"] + losses["teacher2"])


def test_the_reconstruction_has_a_weight():
    model, half = small("dmae"), small("dmae", reconstruction_weight=0.5)
    images, _, noise = batch(model)
    full, less = model(images, noise=noise), half(images, noise=noise)
    assert torch.equal(full["reconstruction"], less["reconstruction"])
    torch.testing.assert_close(less["loss"], 0.5 * full["reconstruction"] + full["teacher"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_divergence_is_computed_in_float32(dtype):
    model = small("tiny_mim")
    with torch.no_grad():
        for term in model.terms.values():
            term.qkv.weight.mul_(40)  # softmax values that underflow in half precision
    images, _, noise = batch(model)
    expected = model(images, noise=noise)["loss"]
    with torch.autocast("cpu", dtype=dtype):
        losses = model(images, noise=noise)
    losses["loss"].backward()
    assert losses["teacher"].dtype == torch.float32 and expected > 5
    torch.testing.assert_close(losses["loss"], expected, rtol=0.1, atol=0)
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("distance", ["l1", "l2", "smooth_l1", "cosine", "kl"])
@pytest.mark.parametrize("normalize", ["none", "l2", "layer_norm", "softmax"])
def test_every_distance_and_normalisation(distance, normalize):
    if distance == "kl" and normalize != "softmax":
        with pytest.raises(ValueError, match="distance is 'kl', which needs normalize 'softmax'"):
            TeacherOptions(distance=distance, normalize=normalize)
        return
    model = small("dmae", terms={"teacher": {"distance": distance, "normalize": normalize, "temperature": 0.5}})
    images, _, noise = batch(model)
    view = model.observe(images, noise=noise)
    term = model.terms["teacher"]
    ours, theirs = term.head(view.taps[0]), term.teacher_tokens(model, view)
    total = 0
    for a, b in token_pairs(ours, theirs):
        if normalize == "l2":
            a, b = a / a.norm(), b / b.norm()
        if normalize == "layer_norm":
            a, b = ((x - x.mean()) / (x.var(unbiased=False) + 1e-6).sqrt() for x in (a, b))
        if normalize == "softmax":
            a, b = (a / 0.5).softmax(0), (b / 0.5).softmax(0)
        total += {
            "l1": lambda a, b: (a - b).abs().mean(),
            "l2": lambda a, b: ((a - b) ** 2).mean(),
            "smooth_l1": lambda a, b: F.smooth_l1_loss(a, b),
            "cosine": lambda a, b: 1 - (a @ b) / (a.norm() * b.norm()),
            "kl": lambda a, b: (b * (b / a).log()).sum(),
        }[distance](a, b)
    count = ours.shape[0] * ours.shape[1]
    assert term(model, view).item() == pytest.approx((total / count).item(), rel=1e-4)


def test_decoder_blocks_after_the_compared_one_are_left_out():
    """No loss would train them, which DistributedDataParallel refuses."""
    model = small("g2sd", decoder_depth=4, terms={"teacher": {"student_block": 0.5}})
    images, _, noise = batch(model)
    model(images, noise=noise)["loss"].backward()
    assert len(model.decoder_blocks) == 2
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]


def test_hidden_tokens_of_decoders_are_compared_in_one_order():
    model = small("g2sd", terms={"teacher": {"tokens": "hidden"}})
    images, _, noise = batch(model)
    view = model.observe(images, noise=noise)
    L = model.num_patches
    student, teacher = torch.randn(2, len(images), 1 + L, 3)
    no_ids = torch.empty(0, dtype=torch.long)
    ours, theirs = model.terms["teacher"].paired(model, view, student, no_ids, teacher)
    for n in range(len(images)):
        hidden = {patch for patch in range(L) if patch not in view.ids_keep[n].tolist()}
        assert {tuple(row) for row in ours[n].tolist()} == {tuple(student[n, 1 + patch].tolist()) for patch in hidden}
        places = {tuple(student[n, 1 + patch].tolist()): teacher[n, 1 + patch] for patch in hidden}
        assert all(torch.equal(row, places[tuple(own)]) for own, row in zip(ours[n].tolist(), theirs[n], strict=True))


def test_learned_tokens_of_students_start_as_the_releases_do():
    for method in ("proteus", "amd"):
        tokens = {name: p for name, p in small(method).terms.named_parameters() if name.endswith("mask_token")}
        assert tokens and all(0.005 < token.std() < 0.05 for token in tokens.values())


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("dmae", {"student_tap": "attention"}, "can only be compared with each other"),
        ("dmae", {"adaptor": "none"}, "adaptor 'none' needs equal channels; the student has 16, the teacher 24"),
        ("dmae", {"adaptor": "heads"}, "has no heads"),
        ("dmae", {"tokens": "hidden"}, "needs student_tap 'decoder' or a masked_pass"),
        ("dmae", {"tokens": "extra"}, "need each other"),
        ("dmae", {"student_tap": "decoder"}, "includes patches that the teacher does not get"),
        ("dmae", {"distance": "l3"}, "distance is 'l3'"),
        ("dmae", {"temperature": 0}, "temperature is 0; it must be more than 0"),
        ("dmae", {"teacher_input": "superset", "teacher_mask_ratio": 0.9}, "fewer than 5"),
        ("mae_lite_distill", {"adaptor": "none"}, "the student has 2 attention heads and the teacher 3"),
        ("mae_lite_distill", {"adaptor": "none", "extra_block": True}, "3 heads do not divide 16 channels"),
        ("mae_lite_distill", {"tokens": "class"}, "for attention and relations it can only be 'all'"),
        ("dmae", {"model": "vit_nano"}, "which timm .* does not have"),
        ("dmae", {"model": "resnet18"}, "a teacher is a vision transformer"),
        ("dmae", {"model": "test_vit"}, "these are not the weights of timm's test_vit"),
    ],
)
def test_impossible_combinations_are_refused(method, options, message):
    with pytest.raises(ValueError, match=message):
        small(method, terms={"teacher": options})


def test_a_part_that_nothing_trains_is_refused():
    with pytest.raises(ValueError, match="no loss uses the encoder's output"):
        small("dmae", reconstruction_weight=0)
    with pytest.raises(ValueError, match="no loss uses the encoder's output"):
        small("mae", reconstruct_block=1)
    with pytest.raises(ValueError, match="reads the output of every block"):
        small("cross_mae", reconstruct_block=1)
    with pytest.raises(ValueError, match="reconstruct_block is 3, but there are 2 blocks"):
        small("d2_mae", reconstruct_block=3)


def test_every_preset_is_an_entry_of_the_registry():
    assert {METHODS[name].model for name in PRESETS} == {METHODS["mae"].model}


# ---- other teachers -------------------------------------------------------------------------------------------------


def timm_file(tmp_path, name):
    torch.manual_seed(4)
    model = timm.create_model(name, pretrained=False, num_classes=0).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # so that layer scales and registers have an effect
            parameter.add_(0.02 * torch.randn_like(parameter))
    torch.save(model.state_dict(), tmp_path / f"{name}.pth")
    return model, {"model": name, "checkpoint": str(tmp_path / f"{name}.pth")}


IMAGE = {"model": "mae_vit_tiny_patch16", "input_size": 64, "embed_dim": 16, "depth": 2, "num_heads": 2}
FEATURES = {"student_tap": "features", "teacher_tap": "features", "teacher_input": "full"}


@pytest.mark.parametrize(
    "name",
    [
        "test_vit",
        pytest.param("vit_small_patch14_reg4_dinov2", marks=pytest.mark.slow),
        "vit_tiny_patch16_dinov3_qkvb",
    ],
)
def test_a_teacher_by_timms_name(tmp_path, name):
    """Another normalisation; patch size 14, layer scale and registers; rotary positions and registers."""
    theirs, options = timm_file(tmp_path, name)
    model = build("dmae", **IMAGE, terms={"teacher": options | FEATURES})
    term, side = model.terms["teacher"], 4 * theirs.patch_embed.patch_size[0]
    assert term.options.embed_dim == theirs.embed_dim and term.options.digest
    images, _, noise = batch(model, n=2)
    view = model.observe(images, noise=noise)
    found = term.teacher_tokens(model, view)
    theirs.set_input_size((side, side))
    mean, std = (torch.tensor(values)[:, None, None] for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    if name == "test_vit":
        images = (images * std + mean - 0.5) / 0.5
    if side != 64:
        images = F.interpolate(images, (side, side), mode="bicubic", antialias=True)
    with torch.no_grad():
        features = theirs.forward_features(images)
    expected = torch.cat([features[:, :1], features[:, theirs.num_prefix_tokens :]], dim=1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    # permuted patches result in equally permuted features
    network, order = term.teacher.network, torch.stack([torch.randperm(16) for _ in range(2)])
    again = network(view.images, None, order, (("features", 0),))["features 0"]
    for n in range(2):
        torch.testing.assert_close(again[n, 1:], found[n, 1 + order[n]], rtol=1e-4, atol=1e-4)
    losses = model(view.images, noise=noise)
    losses["loss"].backward()


@pytest.mark.parametrize(
    "name",
    [
        "vit_tiny_patch16_dinov3_qkvb",  # channels of the two halves are rotated, registers are not
        "eva02_tiny_patch14_224",  # neighbouring channels are rotated; biases beside one layer
        pytest.param("eva02_base_patch14_224", marks=pytest.mark.slow),  # three layers, a norm before the projection
        pytest.param("vit_small_patch16_rope_ape_224", marks=pytest.mark.slow),  # absolute positions too
    ],
)
def test_attention_of_a_teacher_with_rotary_positions(tmp_path, name):
    """Compare the logits with a loop over tokens and pairs of channels, and the three parts with timm's output."""
    theirs, options = timm_file(tmp_path, name)
    taps = {"student_tap": "attention", "teacher_tap": "attention", "teacher_input": "full", "teacher_block": 2}
    student = {"adaptor": "heads", "normalize": "none", "distance": "l2", "student_block": 2}
    model = build("dmae", **IMAGE, mask_ratio=0.5, terms={"teacher": options | taps | student})
    network = model.terms["teacher"].teacher.network
    images = torch.randn(1, 3, 64, 64)
    assert len(network.encoder.blocks) == 2
    network.encoder.double()
    prepared = network.prepare(images.double())
    found = network(images.double(), None, None, (("attention", 2),))["qkv 2"]

    order = torch.randperm(16)[None]
    again = network(images.double(), None, order, (("attention", 2),))["qkv 2"]
    torch.testing.assert_close(again[0, 1:], found[0, 1 + order[0]], rtol=1e-6, atol=1e-8)

    seen = {}
    block, side = theirs.blocks[1], 4 * theirs.patch_embed.patch_size[0]
    theirs.double().set_input_size((side, side))
    block.attn.register_forward_hook(lambda module, inputs, output: seen.update(x=inputs[0], y=output))
    with torch.no_grad():
        theirs.forward_features(prepared)
    attention, prefix, heads = block.attn, theirs.num_prefix_tokens, block.attn.num_heads
    weights = dict(attention.named_parameters())
    if attention.qkv is not None:
        layers = weights["qkv.weight"].chunk(3)
        biases = [weights.get(f"{part}_bias", 0) for part in "qkv"]
        biases = weights["qkv.bias"].chunk(3) if "qkv.bias" in weights else biases
    else:
        layers = [weights[f"{part}_proj.weight"] for part in "qkv"]
        biases = [weights.get(f"{part}_proj.bias", 0) for part in "qkv"]
    d = layers[0].shape[0] // heads
    sin, cos = theirs.rope.get_embed(shape=(4, 4)).chunk(2, dim=-1)  # [16, d]
    half = attention.rotate_half

    def rotated(vector, patch):
        turned = vector.clone()
        for i in range(d // 2):
            a, b = (i, i + d // 2) if half else (2 * i, 2 * i + 1)
            turned[a] = vector[a] * cos[patch, a] - vector[b] * sin[patch, a]
            turned[b] = vector[b] * cos[patch, b] + vector[a] * sin[patch, b]
        return turned

    tokens = [0, *range(prefix, prefix + 16)]
    assert found.shape == (1, 17, 3 * heads * d)
    queries, keys, values = (part.unflatten(-1, (heads, d))[0] for part in found.chunk(3, dim=-1))
    with torch.no_grad():
        rows = [[layer @ seen["x"][0, t] + bias for t in tokens] for layer, bias in zip(layers, biases, strict=True)]
        for head in range(0, heads, 2):
            own = slice(head * d, (head + 1) * d)
            q, k = ([row[own] for row in part] for part in rows[:2])
            q, k = ([x[0], *(rotated(row, patch) for patch, row in enumerate(x[1:]))] for x in (q, k))
            for i in range(17):
                for j in range(17):
                    logit, expected = queries[i, head] @ keys[j, head], sum(q[i] * k[j])
                    assert logit.item() == pytest.approx(expected.item(), rel=1e-6, abs=1e-8)
                torch.testing.assert_close(values[i, head], rows[2][i][own], check_dtype=False)
    if prefix == 1:  # all tokens are there, so that timm's attention can be completed
        shares = (torch.einsum("ihd,jhd->hij", queries, keys) / math.sqrt(d)).softmax(dim=-1)
        mixed = torch.einsum("hij,jhd->ihd", shares, values).flatten(1)
        with torch.no_grad():
            completed = attention.proj(attention.norm(mixed))
        torch.testing.assert_close(completed, seen["y"][0], rtol=1e-6, atol=1e-8)
    network.encoder.float()
    assert model(images)["teacher"].isfinite()


def test_the_teachers_normalisation_is_applied(tmp_path):
    _, options = timm_file(tmp_path, "test_vit")
    ours = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
    pixels = torch.rand(2, 3, 64, 64)
    prepared = []
    for mean, std in (ours, ((0.5,) * 3, (0.5,) * 3), ((0.1, 0.2, 0.3), (1.0, 1.0, 1.0))):
        model = build("dmae", **IMAGE, terms={"teacher": options}, mean=mean, std=std)
        images = (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
        prepared.append(model.terms["teacher"].teacher.network.prepare(images))
    for images in prepared:
        torch.testing.assert_close(images, (pixels - 0.5) / 0.5, rtol=1e-5, atol=1e-5)
    given = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    model = build("dmae", **IMAGE, terms={"teacher": options | given}, mean=(0.5,) * 3, std=(0.5,) * 3)
    torch.testing.assert_close(model.terms["teacher"].teacher.network.prepare((pixels - 0.5) / 0.5), pixels)


def test_grey_images_have_a_teacher_of_coloured_ones(tmp_path):
    _, options = timm_file(tmp_path, "test_vit")
    model = build("dmae", **IMAGE, in_chans=1, terms={"teacher": options}, mean=(0.2,), std=(0.4,))
    pixels = torch.rand(2, 1, 64, 64)
    prepared = model.terms["teacher"].teacher.network.prepare((pixels - 0.2) / 0.4)
    torch.testing.assert_close(prepared, ((pixels - 0.5) / 0.5).expand(-1, 3, -1, -1), rtol=1e-5, atol=1e-5)
    assert model((pixels - 0.2) / 0.4)["loss"].isfinite()
    with pytest.raises(ValueError, match="its images have 3 channels and the student's 4"):
        build("dmae", **IMAGE, in_chans=4, terms={"teacher": options})


def test_a_teacher_with_other_patches_gets_the_image_resized():
    ours = small("dmae", model="mae_vit_tiny_patch2", input_size=(16, 20))
    network = ours.terms["teacher"].teacher.network
    assert network.encoder.patch_embed.grid_size == (8, 10) and network.encoder.patch_embed.img_size == (32, 40)
    images, _, noise = batch(ours)
    assert ours(images, noise=noise)["teacher"].isfinite()


def test_a_run_of_an_older_version_resumes():
    """An option that did not exist has its default value."""
    import methods
    from options import differences

    new = options_of("dmae", small("dmae"))
    known = ("weight", "checkpoint", "student_block", "teacher_block", "embed_dim", "depth", "num_heads", "digest")
    old = new | {"terms": {"teacher": {name: new["terms"]["teacher"][name] for name in known}}}
    assert differences(methods.schema("dmae"), old, new) == []
    changed = new | {"terms": {"teacher": new["terms"]["teacher"] | {"distance": "l2"}}}
    assert [found.name for found in differences(methods.schema("dmae"), old, changed)] == ["terms.teacher.distance"]
