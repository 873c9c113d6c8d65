"""What the frozen features of a base know: a linear probe on the hospital task, split by category."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def probe_accuracy(
    train: tuple[NDArray[np.float32], list[str]], test: tuple[NDArray[np.float32], list[str]], penalty: float
) -> float:
    """Accuracy of multinomial logistic regression (L-BFGS, L2 penalty) on standardised features."""
    labels = sorted(set(train[1]))
    x, y = torch.from_numpy(train[0]), torch.tensor([labels.index(label) for label in train[1]])
    weight = torch.zeros(len(labels), x.shape[1], requires_grad=True)
    bias = torch.zeros(len(labels), requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(x @ weight.T + bias, y) + penalty * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        guess = (torch.from_numpy(test[0]) @ weight.T + bias).argmax(1)
    right = [labels[int(g)] == label for g, label in zip(guess, test[1], strict=True)]
    return sum(right) / len(right)
