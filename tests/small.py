"""A small model for any method of the registry, and a batch for it."""

import dataclasses
import functools
import tempfile
from pathlib import Path

import torch

import methods
from methods import METHODS, build
from util import checkpoint

SMALL = {
    "model": "mae_vit_tiny_patch4",
    "input_size": (16, 20),
    "embed_dim": 16,
    "depth": 2,
    "num_heads": 2,
    "decoder_embed_dim": 12,
    "decoder_depth": 1,
    "decoder_num_heads": 3,
    "norm_pix_loss": True,
}
NARROW = {  # options of the methods with several views
    "freeze_patch_embed": False,
    "proj_hidden_dim": 24,
    "proj_dim": 12,
    "out_dim": 32,
    "head_hidden_dim": 20,
    "head_bottleneck_dim": 12,
    "local_size": 8,
    "local_crops": 3,
    "drop_path": 0.0,
}
TEACHER = SMALL | {"embed_dim": 24, "depth": 4, "num_heads": 3}
CODES = {"codes": 24, "code_dim": 4}

scratch = tempfile.TemporaryDirectory()


def sizes(method, options=SMALL):
    """Return the options that the method has, such as decoder sizes only for a method with a decoder.

    Required values are added: a patch size that is suitable for HOG, a tokenizer, a teacher.
    """
    own = methods.own_options(method)
    known = ("model", *methods.ENCODER_OVERRIDES, *own)
    chosen = {name: value for name, value in NARROW.items() if name in own}
    chosen |= {name: value for name, value in options.items() if name in known}
    if "codes" in own:
        chosen |= CODES
    if "tokenizer" in own:
        chosen["tokenizer"] = tokenizer_checkpoint()
    if method == "vqkd_tokenizer":
        chosen["teacher"] = teacher_checkpoint()
    if method == "maskfeat":
        chosen |= {"model": "mae_vit_tiny_patch8", "input_size": tuple(2 * side for side in options["input_size"])}
    return chosen


def direct(model_class, **mixed):
    """Create an instance of the class; `mixed` contains both its arguments and its options."""
    own = {field.name for field in dataclasses.fields(model_class.Options)}
    options = model_class.Options(**{name: value for name, value in mixed.items() if name in own})
    return model_class(**{name: value for name, value in mixed.items() if name not in own}, options=options)


def small(method, **changes):
    """Create the method's model, always with the same weights; with a teacher if required, and a narrow label head."""
    terms = dict(changes.pop("terms", {}))
    for name in METHODS[method].terms:
        if name in ("teacher", "label") and terms.get(name, {}) is not None:
            heads = 4 if method == "tiny_mim" else 3  # the student's additional block has as many heads
            own = {"checkpoint": teacher_checkpoint(heads)} if name == "teacher" else {"hidden": 64}
            terms[name] = own | terms.get(name, {})
    options = sizes(method) | changes  # may create a checkpoint, with another seed
    torch.manual_seed(0)
    return build(method, **options, terms=terms)


def options_of(method, model):
    """Return the options that a run with the small model would store."""
    terms = {name: dict(vars(term.options)) for name, term in model.loss_terms.items()}
    return {"method": method} | sizes(method) | dataclasses.asdict(model.options) | {"terms": terms}


def write_checkpoint(path, model, options):
    checkpoint.save(Path(path), {"format": checkpoint.FORMAT, "model": model.state_dict(), "options": options})
    return str(path)


@functools.cache
def teacher_checkpoint(num_heads=3):
    """Return the path of a checkpoint of a larger MAE, as a run would write it."""
    torch.manual_seed(1)
    path, sizes = Path(scratch.name) / f"teacher{num_heads}.pth", TEACHER | {"num_heads": num_heads}
    return write_checkpoint(path, build("mae", **sizes), {"method": "mae"} | sizes)


@functools.cache
def tokenizer_checkpoint():
    """Return the path of a checkpoint of a VQ tokenizer, as a run would write it."""
    torch.manual_seed(2)
    path = Path(scratch.name) / "tokenizer.pth"
    model = build("vq_tokenizer", **sizes("vq_tokenizer"))
    return write_checkpoint(path, model, {"in_chans": 3} | options_of("vq_tokenizer", model))


def batch(model, n=4):
    """Return images (a list of views if the method uses several), labels and noise."""
    generator = torch.Generator().manual_seed(1)
    sizes = [crop.size for crop in model.views(0.2, 0.5) for _ in range(crop.count)]
    views = [torch.randn(n, model.in_chans, *size, generator=generator) for size in sizes]
    images = views if len(views) > 1 else views[0]
    labels = torch.randint(0, 3, (n,), generator=generator)
    return images, labels, torch.rand(n, model.noise_rows, model.num_patches, generator=generator)
