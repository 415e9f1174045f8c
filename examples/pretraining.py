"""Adversarial pre-training (Hendrycks, Lee and Mazeika, 2019): load robust weights, give them a new last layer, train on.

    python examples/pretraining.py

Pre-trains a small network adversarially on the digits 0 to 4, then fine-tunes it on 200 images of 5 to 9, and compares with the
same training from scratch. About a minute on two CPU cores. Needs `pip install "fastadv[demo]"`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import fastadv
from fastadv.demo import accuracy, load_digits, shuffled_batches, small_cnn

EPS = 0.15
PRETRAINING, FINE_TUNING = 6, 20  # epochs


def train(model: nn.Module, x: Tensor, y: Tensor, epochs: int, lr: float) -> None:
    """PGD adversarial training; the last epochs count, so nothing is selected."""
    objective = fastadv.PGDAT(fastadv.PGD(model, EPS, steps=7, generator=torch.Generator().manual_seed(0)))
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, nesterov=True)
    generator = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for x_batch, y_batch in shuffled_batches(x, y, generator):
            out = objective(model, x_batch, y_batch)
            optimizer.zero_grad()
            out.loss.backward()
            optimizer.step()


def report(name: str, model: nn.Module, x: Tensor, y: Tensor) -> None:
    attack = fastadv.PGD(model, EPS, steps=20, generator=torch.Generator().manual_seed(1))
    print(f"{name:24s} clean {accuracy(model, x, y):.1%}   PGD-20 {accuracy(model, x, y, attack):.1%}", flush=True)


def main() -> None:
    digits = load_digits()
    early, late, late_test = digits.y_train < 5, digits.y_train >= 5, digits.y_test >= 5
    few_x, few_y = digits.x_train[late][:200], digits.y_train[late][:200] - 5
    x_test, y_test = digits.x_test[late_test], digits.y_test[late_test] - 5

    robust = small_cnn(0)
    train(robust, digits.x_train[early], digits.y_train[early], PRETRAINING, lr=0.05)
    weights = robust.state_dict()  # or torch.load("robust.pt")["state_dict"], of `fastadv demo`

    scratch, pretrained = small_cnn(0), small_cnn(0)
    pretrained.load_state_dict(weights)
    pretrained[-1] = small_cnn(1)[-1]  # a new head; everything else goes on from where it was, nothing is frozen
    for name, model in (("from scratch", scratch), ("adversarially pre-trained", pretrained)):
        train(model, few_x, few_y, FINE_TUNING, lr=0.03)
        report(name, model, x_test, y_test)


if __name__ == "__main__":
    main()
