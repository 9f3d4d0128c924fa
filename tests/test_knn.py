"""k nearest neighbours, compared with a simple loop."""

import collections
import math

import pytest
import torch

from util import knn
from util.knn import knn_accuracy, knn_predict


def loop_predict(bank, labels, queries, k, temperature):
    """Reference implementation: one query at a time, similarities and votes as Python numbers."""
    answers = []
    for query in queries.tolist():
        similarities = []
        for row, label in zip(bank.tolist(), labels.tolist(), strict=True):
            dot = sum(a * b for a, b in zip(query, row, strict=True))
            similarities.append((dot / math.hypot(*query) / math.hypot(*row), label))
        votes = collections.defaultdict(float)
        for similarity, label in sorted(similarities, reverse=True)[:k]:
            votes[label] += math.exp(similarity / temperature)
        answers.append(max(sorted(votes), key=votes.get))
    return answers


def data(bank=60, queries=40, channels=5, classes=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, channels, generator=generator)
    bank_labels = torch.randint(classes, (bank,), generator=generator)
    query_labels = torch.randint(classes, (queries,), generator=generator)
    scale = torch.rand(bank, 1, generator=generator) * 10 + 0.1  # lengths must have no effect
    noisy = centres[bank_labels] + 1.5 * torch.randn(bank, channels, generator=generator)
    return (
        scale * noisy,
        bank_labels,
        centres[query_labels] + torch.randn(queries, channels, generator=generator),
        query_labels,
    )


@pytest.mark.parametrize("k, temperature", [(20, 0.07), (1, 0.07), (7, 1.0), (1000, 0.5)])
@pytest.mark.parametrize("at_once", [1, 2**24])
def test_predictions_are_the_loops(k, temperature, at_once, monkeypatch):
    monkeypatch.setattr(knn, "SIMILARITIES_AT_ONCE", at_once)
    bank, labels, queries, _ = data()
    assert knn_predict(bank, labels, queries, k, temperature).tolist() == loop_predict(
        bank, labels, queries, k, temperature
    )


def test_twenty_neighbours_at_temperature_seven_hundredths_by_default():
    bank, labels, queries, query_labels = data()
    assert knn_predict(bank, labels, queries).tolist() == loop_predict(bank, labels, queries, 20, 0.07)
    right = [a == b for a, b in zip(loop_predict(bank, labels, queries, 20, 0.07), query_labels.tolist(), strict=True)]
    assert knn_accuracy(bank, labels, queries, query_labels) == pytest.approx(sum(right) / 40)
    assert 0.3 < sum(right) / 40 < 1


def test_the_twentieth_neighbour_votes_by_default_and_the_next_does_not():
    labels = torch.tensor([0] * 9 + [1] * 10 + [0] + [1])  # from near to far; with 19 or 21 votes, class 1 wins
    angles = 0.001 * torch.arange(1, 22)
    bank, query = torch.stack([angles.cos(), angles.sin()], dim=1), torch.tensor([[1.0, 0.0]])
    assert [int(knn_predict(bank, labels, query, k)) for k in (19, 20, 21)] == [1, 0, 1]
    assert int(knn_predict(bank, labels, query)) == 0
    assert knn_accuracy(bank, labels, query, torch.tensor([0])) == 1


def test_near_votes_weigh_more_than_many():
    bank = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.8, -0.6]])
    labels, query = torch.tensor([1, 0, 0]), torch.tensor([[2.0, 0.0]])
    assert knn_predict(bank, labels, query, k=3, temperature=0.1).tolist() == [1]  # e^10 > 2 e^8
    assert knn_predict(bank, labels, query, k=3, temperature=1.0).tolist() == [0]  # e < 2 e^0.8


def test_equal_votes_go_to_the_lowest_class():
    bank, query = torch.tensor([[1.0, 1.0], [1.0, -1.0]]), torch.tensor([[1.0, 0.0]])
    assert knn_predict(bank, torch.tensor([3, 2]), query, num_classes=9).tolist() == [2]


@pytest.mark.parametrize(
    "bank, labels, queries, message",
    [
        (torch.ones(0, 3), torch.ones(0).long(), torch.ones(2, 3), r"a bank \[0, 3\] with 0 labels"),
        (torch.ones(4, 3), torch.ones(5).long(), torch.ones(2, 3), "with 5 labels"),
        (torch.ones(4, 3), torch.ones(4).long(), torch.ones(2, 2), r"does not fit queries \[2, 2\]"),
        (torch.ones(4, 3), torch.ones(4).long(), torch.full((2, 3), math.nan), "not finite"),
    ],
)
def test_what_does_not_fit_is_refused(bank, labels, queries, message):
    with pytest.raises(ValueError, match=message):
        knn_predict(bank, labels, queries)
