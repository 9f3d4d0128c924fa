"""tools.doctor and tools.replay with different kinds of methods: views, several targets, tokenizers."""

import pytest

from tests.runs import Training, tiny_for
from tests.small import teacher_checkpoint, tokenizer_checkpoint
from tools import doctor, replay

HEAD = "--local_size 4 --local_crops 1 --out_dim 32 --head_hidden_dim 24 --head_bottleneck_dim 12 --head_batch_norm"
OWN = {
    "moco_v3": "--proj_hidden_dim 24 --proj_dim 12",
    "dino": HEAD,
    "maskfeat": "",
    "beit": "--in_chans 3 --input_size 16 --model mae_vit_tiny_patch4 --tokenizer TOKENIZER",
    "vqkd_tokenizer": "--in_chans 3 --input_size 16 --model mae_vit_tiny_patch4 --codes 24 --code_dim 4 "
    "--teacher TEACHER",
}


def options_for(method):
    own = OWN[method]
    for name, write in (("TOKENIZER", tokenizer_checkpoint), ("TEACHER", teacher_checkpoint)):
        own = own.replace(name, str(write())) if name in own else own
    return [*tiny_for(method), "--method", method, *own.split()]


@pytest.mark.parametrize("method", ["moco_v3", "dino", "beit"])
def test_an_unstable_run_is_replayed(method, tmp_path, capsys):
    """Weights or losses are not finite in the dump and when the step is repeated."""
    words = [*options_for(method), "--lr", "1e30", "--warmup_epochs", "0", "--max_bad_steps", "2"]
    training = Training(tmp_path / "run", *words, tiny=False)
    assert training.wait() == 3, training.stderr
    (dump,) = (tmp_path / "run" / "debug").glob("*.json")
    assert replay.main([str(dump), "--device", "cpu"]) == 0
    assert "not finite" in capsys.readouterr().out


def test_an_unknown_precision_is_refused(capsys):
    with pytest.raises(SystemExit):
        replay.main(["dump.json", "--amp", "fp8"])
    assert "--amp: invalid choice: 'fp8'" in capsys.readouterr().err


def test_a_replayed_step_has_the_temperature_of_its_epoch(tmp_path):
    temperatures = "--warmup_teacher_temp 0.01 --teacher_temp 0.04 --warmup_teacher_temp_epochs 10"
    words = [
        *options_for("dino"),
        "--lr",
        "1e30",
        "--warmup_epochs",
        "0",
        "--max_bad_steps",
        "2",
        *temperatures.split(),
    ]
    assert Training(tmp_path / "run", *words, tiny=False).wait() == 3
    (dump,) = (tmp_path / "run" / "debug").glob("*.json")
    again = replay.Replay(dump, device="cpu", amp="", data_path="")
    next(iter(again.micro_batches()))
    assert again.model.teacher_temp.item() == pytest.approx(0.01)  # of the first epoch; the model was built with 0.04


@pytest.mark.parametrize("method", OWN)
def test_doctor_measures_a_run(method, tmp_path, capsys):
    words = [*options_for(method), "--output_dir", str(tmp_path / "run"), "--batches", "1"]
    assert doctor.main(words) == 0
    out = capsys.readouterr().out
    assert "images" in out and "memory" in out and "Traceback" not in out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("price", ["-1", "nan", "inf"])
def test_doctor_refuses_a_price_below_zero(price, capsys):
    assert doctor.main(["--price", price]) == 2
    wanted = f"error: --price is {float(price)}; it must be a finite number of at least 0\n"
    assert capsys.readouterr().err == wanted
