"""The reimplemented baselines are correct, and the benchmark writes its results. Timings are not tested."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

import methods
from benchmarks import measure, memory, micro, step
from benchmarks.measure import PROJECT
from benchmarks.restated_mae import RestatedMAE, RestatedStep
from benchmarks.restated_nor_mae import RestatedNoRMAE, wrapped_neighbors

SIZES = dict(
    embed_dim=24, depth=2, num_heads=2, decoder_embed_dim=16, decoder_depth=2, decoder_num_heads=2, norm_pix_loss=True
)


def pair(method, restated, side=5, patch=4, **more):
    """Return our model, the reimplemented one with the same weights, and a batch."""
    torch.manual_seed(0)
    ours = methods.build(method, model=f"mae_vit_tiny_patch{patch}", input_size=side * patch, **SIZES, **more)
    theirs = restated(img_size=side * patch, patch_size=patch, **SIZES)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs, torch.randn(3, 3, side * patch, side * patch), torch.rand(3, side * side)


@pytest.mark.parametrize(("method", "restated"), [("mae", RestatedMAE), ("nor_mae_released", RestatedNoRMAE)])
def test_the_restated_loss_and_gradients_are_our_models(method, restated):
    ours, theirs, images, noise = pair(method, restated)
    mine, other = ours(images, noise=noise)["loss"], theirs(images, noise)
    torch.testing.assert_close(mine, other, rtol=1e-6, atol=0)
    mine.backward()
    other.backward()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-7, msg=name)


def test_the_restated_neighbour_term_is_there_and_weighs_what_it_says():
    ours, theirs, images, noise = pair("nor_mae_released", RestatedNoRMAE)
    with_term = theirs(images, noise)
    theirs.weight = 0.0
    difference = with_term - theirs(images, noise)
    losses = ours(images, noise=noise)
    assert abs(difference.item()) > 1e-6
    torch.testing.assert_close(difference, 5e-5 * losses["neighbor"], rtol=1e-2, atol=1e-7)


def test_the_wrapped_neighbours_of_a_corner_lie_on_all_four_sides():
    assert wrapped_neighbors(14)[0].tolist() == [1, 13, 14, 15, 27, 182, 183, 195]


def test_a_restated_step_learns_and_moves_no_position_table():
    _, theirs, images, noise = pair("mae", RestatedMAE)
    before = theirs.pos_embed.clone()
    take = RestatedStep(theirs, torch.device("cpu"), amp=None, lr=1e-3)
    losses = [take(images, noise) for _ in range(5)]
    assert losses[-1] < losses[0]
    assert torch.equal(theirs.pos_embed, before)


def test_ratios_are_taken_within_a_round():
    ratios = measure.paired_ratios({"a": [2.0, 20.0, 200.0], "b": [1.0, 10.0, 100.0]})
    assert ratios["a/b"] == {"median": 2.0, "q1": 2.0, "q3": 2.0}  # pairing removes a drift of both
    assert ratios["b/a"]["median"] == 0.5


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


SMALL = "--patch_size 16 --input_size 48 --decoder_depth 1 --batch_size 2 --rounds 2 --warmup 1".split()


@pytest.mark.usefixtures("threads")
def test_the_benchmark_writes_its_table_and_its_raw_times(tmp_path, capsys):
    output = tmp_path / "step.json"
    step.main([*SMALL, "--output", str(output)])
    result = json.loads(output.read_text())
    assert set(result["seconds"]) == {"mae", "nor", "nor_r20", "restated_mae", "restated_nor"}
    assert all(len(times) == 2 for times in result["seconds"].values())
    assert result["ratios"].keys() >= {"mae/restated_mae", "nor/restated_nor", "nor/mae"}
    assert torch.__version__.startswith(result["machine"]["versions"]["torch"])
    assert output.with_suffix(".md").read_text() == capsys.readouterr().out


@pytest.mark.usefixtures("threads")
def test_parts_of_the_term_give_what_the_restated_parts_give_and_are_measured(tmp_path, capsys):
    setting = step.Setting(input_size=48, batch_size=2)
    relation = micro.works(setting)["relation"]
    gradients = [form() for form in relation.values()]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)
    output = tmp_path / "micro.json"
    micro.main([*SMALL, "--output", str(output)])
    parts = json.loads(output.read_text())["parts"]
    assert list(parts) == ["relation", "search", "hog"]
    hog = parts.pop("hog")
    assert {name: len(times) for name, times in hog["seconds"].items()} == {"simmim step": 2, "hog": 2}
    for found in parts.values():
        assert {name: len(times) for name, times in found["seconds"].items()} == {"restated": 2, "ours": 2}
        assert "restated/ours" in found["ratios"] and found["peak_bytes"]["ours"] < found["peak_bytes"]["restated"]
    assert output.with_suffix(".md").read_text() == capsys.readouterr().out


def test_peak_memory_is_that_of_the_worst_moment():
    def work():
        first = torch.empty(3, 2**20)
        second = torch.empty(2**20)
        del first
        return second, torch.empty(2, 2**20)  # now no more than before

    for _ in range(3):
        assert step.peak_bytes(work, torch.device("cpu")) == 4 * 4 * 2**20


@pytest.mark.usefixtures("threads")
def test_memory_is_counted_the_same_every_time(tmp_path, capsys):
    found = []
    for number in range(2):
        output = tmp_path / f"{number}.json"
        memory.main([*SMALL, "--variants", "mae", "nor", "--output", str(output)])
        found.append(json.loads(output.read_text())["peak_bytes"])
    assert found[0] == found[1] and list(found[0]) == ["mae", "nor"] and min(found[0].values()) > 0
    assert "MB / image" in capsys.readouterr().out


def test_another_checkout_brings_its_own_code_and_leaves_none(tmp_path):
    shutil.copytree(PROJECT / "benchmarks", tmp_path / "benchmarks", ignore=shutil.ignore_patterns("results", "__*"))
    for name in ("methods.py", "models_vit.py", "models_targets.py", "models_mae.py", "models_nor_mae.py"):
        shutil.copy(PROJECT / name, tmp_path)
    for name in ("util", "options", "data"):
        shutil.copytree(PROJECT / name, tmp_path / name)
    own = sys.modules["models_mae"]
    with step.use_checkout(tmp_path) as other:
        setting = other.Setting(patch_size=4, input_size=8, decoder_depth=1, batch_size=2, warmup=1)
        ((name, take_step),) = other.prepared(setting, ["mae"], lambda text: None)
        assert Path(type(take_step.func.model).__init__.__code__.co_filename).is_relative_to(tmp_path)
    assert sys.modules["models_mae"] is own and str(tmp_path) not in sys.path
    take_step()
