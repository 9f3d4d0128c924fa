"""Two processes with half the images each have the losses and gradients of one process with all, for every method.

Only SupMAE is left out: its batch norm uses the images of one device, as in the release.
"""

import itertools

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import methods
from methods import METHODS
from tests.runs import context, finish, tiny_for
from tests.small import CODES, NARROW, batch, small, teacher_checkpoint
from tests.test_distributed import assert_equal_to_rounding, finish_ranks

# `label` and the masks of `proteus` use a mean over the images of a device.
SHARED = [name for name, method in METHODS.items() if "label" not in method.terms and name != "proteus"]
RANKS, IMAGES = 2, 8
VARIANTS = {
    "with half of the images": ("nor_mae", {"neighbor": {"fraction": 0.5}}),
    "with a class token's uniformity": ("u_mae", {"uniformity": {"pool": "class", "weight": 1.0}}),
    "with all terms": ("cross_mae", {"neighbor": {}, "uniformity": {}, "teacher": {}}),
}
CASES = {name: (name, {}) for name in SHARED} | VARIANTS


def case(name):
    method, terms = CASES[name]
    if "teacher" in terms:
        terms = terms | {"teacher": {"checkpoint": teacher_checkpoint()}}
    model = small(method, terms=terms)
    return model, batch(model, IMAGES)


def losses_and_gradients(model, trained, images, labels, noise):
    losses = trained(images, labels, noise=noise)
    losses["loss"].backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {name: value.detach() for name, value in losses.items()}, gradients


def share_of(tensor, rank):
    """Return a rank's part of a tensor, or of each view in a list."""
    return [share_of(view, rank) for view in tensor] if isinstance(tensor, list) else tensor.chunk(RANKS)[rank]


def one_rank(rank, folder):
    """Run every case on this rank's half of the images."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=RANKS)
    found = {}
    for name in CASES:
        model, tensors = case(name)
        share = [share_of(tensor, rank) for tensor in tensors]
        found[name] = losses_and_gradients(model, DistributedDataParallel(model), *share)
    torch.save(found, folder / f"{rank}.pth")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    processes = [context.Process(target=one_rank, args=(rank, folder)) for rank in range(RANKS)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
        assert process.exitcode == 0
    return [torch.load(folder / f"{rank}.pth") for rank in range(RANKS)]


@pytest.mark.parametrize("name", CASES)
def test_two_processes_have_the_gradients_of_one(ranks, name):
    model, tensors = case(name)
    losses, gradients = losses_and_gradients(model, model, *tensors)
    for term, value in losses.items():
        halves = torch.stack([rank[name][0][term] for rank in ranks])
        torch.testing.assert_close(halves.mean(), value, rtol=1e-5, atol=1e-6, msg=term)
    for rank, (parameter, value) in itertools.product(ranks, gradients.items()):
        torch.testing.assert_close(rank[name][1][parameter], value, rtol=1e-4, atol=1e-6, msg=parameter)


@pytest.mark.slow
@pytest.mark.parametrize("method", [name for name in SHARED if name not in ("mae", "nor_mae", "random_asymmetry_mae")])
def test_a_run_on_two_processes_equals_one(tmp_path, method):
    """Run the program, for code that `test_two_processes_equal_one` does not cover."""
    own, narrow = methods.own_options(method), {**NARROW, **CODES, "local_size": 4}
    words = [*tiny_for(method), "--method", method, "--epochs", 1]
    words += [word for name, value in narrow.items() if name in own for word in (f"--{name}", value)]
    if "teacher" in METHODS[method].terms or method == "vqkd_tokenizer":
        finish(tmp_path / "teacher", "--method", "mae", "--embed_dim", 32, "--depth", 4, "--epochs", 1)
        option = "--teacher" if method == "vqkd_tokenizer" else "--terms.teacher.checkpoint"
        words += [option, tmp_path / "teacher/checkpoints/last.pth"]
    if "tokenizer" in own:
        codes = [word for name, value in CODES.items() for word in (f"--{name}", value)]
        tokenizer = [*tiny_for("vq_tokenizer"), "--method", "vq_tokenizer", *codes, "--epochs", 1]
        finish(tmp_path / "tokenizer", *tokenizer, tiny=False)
        words += ["--tokenizer", tmp_path / "tokenizer"]
    finish(tmp_path / "one", *words, tiny=False)
    finish_ranks(2, tmp_path / "two", *words, tiny=False)
    # MoCo-v3's batch norm removes what the last norm's bias adds to all images.
    constant = ("norm.bias",) if method == "moco_v3" else ()
    assert_equal_to_rounding(tmp_path / "one", tmp_path / "two", without_gradient=constant)
