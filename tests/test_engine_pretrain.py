"""One epoch of training compared with a plain loop."""

import contextlib
import copy

import pytest
import torch
from torch import nn

from data.loader import Batch
from engine_pretrain import train_one_epoch
from util import optim
from util.distributed import Processes
from util.meters import Means
from util.stepper import Stepper

CPU = torch.device("cpu")


class Objective(nn.Module):
    """Its losses use the images, the labels and the noise, and differ between training and evaluation."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(12, 2)

    def forward(self, images, labels, *, noise):
        errors = (self.linear(images.flatten(1)) - labels[:, None]).square().mean(dim=1)
        loss = (errors * noise.mean(dim=(1, 2))).mean() + (0 if self.training else 5)
        return {"loss": 2 * loss, "part": loss}


def batch(number):
    generator = torch.Generator().manual_seed(number)
    n = 4 - number % 2
    images = torch.randint(0, 256, (n, 3, 2, 2), dtype=torch.uint8, generator=generator)
    noise = torch.rand(n, 1, 4, generator=generator)
    problems = [("a.png", "truncated")] if number == 2 else []
    return Batch(images, torch.arange(n), noise, torch.arange(n), problems, (0.1, 0.2, 0.3), (0.5, 0.6, 0.7))


@pytest.mark.parametrize("accum", [1, 2])
def test_an_epoch_equals_a_plain_loop(accum):
    torch.manual_seed(0)
    model = Objective().eval()
    plain = copy.deepcopy(model).train()
    optimizer = optim.sgd(optim.pretrain_groups(model, 0.0), 0.1)
    schedule = optim.warmup_cosine(optimizer, epochs=1, warmup_epochs=0, steps_per_epoch=6 // accum, min_lr=0.1)
    noted, steps, contexts = [], [], []

    @contextlib.contextmanager
    def autocast():
        contexts.append(len(steps))
        yield

    means = Means(Processes(0, 1, 0, CPU))
    stepper = Stepper(model, optimizer, schedule, accum=accum)
    train_one_epoch(
        model,
        [batch(number) for number in range(6)],
        stepper,
        means,
        device=CPU,
        autocast=autocast,
        note=noted.append,
        after_step=lambda: steps.append(stepper.step),
    )

    losses = []
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ((0.1, 0.2, 0.3), (0.5, 0.6, 0.7)))
    momentum = {name: torch.zeros_like(value) for name, value in plain.named_parameters()}
    for step in range(6 // accum):
        plain.zero_grad()
        for number in range(step * accum, (step + 1) * accum):
            each = batch(number)
            loss = plain((each.images / 255 - mean) / std, each.labels, noise=each.noise)["loss"]
            losses.append((loss.item(), len(each)))
            (loss / accum).backward()
        for name, parameter in plain.named_parameters():
            momentum[name] = 0.9 * momentum[name] + parameter.grad
            parameter.data -= 0.1 * momentum[name]
    for found, expected in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(found, expected)
    average = sum(loss * n for loss, n in losses) / sum(n for _, n in losses)
    assert means.overall() == {"loss": pytest.approx(average), "part": pytest.approx(average / 2)}
    assert model.training and noted == [[("a.png", "truncated")]]
    assert steps == list(range(1, 6 // accum + 1)) and contexts == [number // accum for number in range(6)]
