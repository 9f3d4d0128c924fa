"""k-nearest-neighbour classification by cosine similarity, the same for all evaluations of features in this project.

Each of the k nearest bank images votes for its class with weight exp(similarity / temperature), as in Wu et al.,
"Unsupervised Feature Learning via Non-Parametric Instance Discrimination", CVPR 2018. k = 20 and temperature 0.07.

N queries   M bank images   D channels   C classes
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SIMILARITIES_AT_ONCE = 2**24  # 64 MiB of float32


def knn_predict(
    bank_MD: Tensor,
    bank_labels_M: Tensor,
    queries_ND: Tensor,
    k: int = 20,
    temperature: float = 0.07,
    num_classes: int | None = None,
) -> Tensor:
    """Return the class with the most votes, int64 `[N]`; the lowest class in a tie.

    If the bank has fewer than k images, all of them vote.
    """
    if not (len(bank_MD) == len(bank_labels_M) > 0 and bank_MD.shape[1] == queries_ND.shape[1]):
        bank, queries = list(bank_MD.shape), list(queries_ND.shape)
        raise ValueError(f"a bank {bank} with {len(bank_labels_M)} labels does not fit queries {queries}")
    if not (torch.isfinite(bank_MD).all() and torch.isfinite(queries_ND).all()):
        raise ValueError("the features are not finite")
    classes = num_classes or int(bank_labels_M.max()) + 1
    k = min(k, len(bank_MD))
    unit_MD, unit_ND = (F.normalize(features.float(), dim=-1) for features in (bank_MD, queries_ND))
    predictions = []
    for chunk_nD in unit_ND.split(max(1, SIMILARITIES_AT_ONCE // len(bank_MD))):
        similarity_nk, nearest_nk = (chunk_nD @ unit_MD.T).topk(k, dim=-1)
        votes_nC = torch.zeros(len(chunk_nD), classes, device=unit_MD.device)
        votes_nC.scatter_add_(1, bank_labels_M[nearest_nk], (similarity_nk / temperature).exp())
        predictions.append(votes_nC.argmax(dim=-1))
    return torch.cat(predictions)


def knn_accuracy(
    bank_MD: Tensor,
    bank_labels_M: Tensor,
    queries_ND: Tensor,
    query_labels_N: Tensor,
    k: int = 20,
    temperature: float = 0.07,
    num_classes: int | None = None,
) -> float:
    """Return the share (0 to 1) of the queries that `knn_predict` classifies correctly."""
    predicted_N = knn_predict(bank_MD, bank_labels_M, queries_ND, k, temperature, num_classes)
    return (predicted_N == query_labels_N).float().mean().item()
