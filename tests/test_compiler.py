"""Without a compiler, --compile is logged and ignored."""

import torch

from util.compiler import compiles

CPU = torch.device("cpu")


def test_a_machine_that_cannot_compile_says_why_in_one_line(monkeypatch, caplog):
    def fails(function):
        raise RuntimeError("No working C++ compiler found\n\nSet TORCHDYNAMO_VERBOSE=1")

    monkeypatch.setattr(torch, "compile", fails)
    assert not compiles(CPU)
    assert "torch.compile does not work on this machine (No working C++ compiler found); training" in caplog.text


def test_one_that_can_says_nothing(monkeypatch, caplog):
    monkeypatch.setattr(torch, "compile", lambda function: function)
    assert compiles(CPU) and not caplog.records
