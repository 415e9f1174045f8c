"""A training loop of your own: TRADES, weight perturbation (AWP) and mixed precision in plain PyTorch.

    python examples/plain_loop.py

Trains a small network on 4,000 digits, about a minute on two CPU cores. Needs `pip install "fastadv[demo]"`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import fastadv
from fastadv.demo import accuracy, load_digits, shuffled_batches, small_cnn

EPS, EPOCHS = 0.2, 5
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MIXED = DEVICE == "cuda"  # bf16, which needs no GradScaler


def train_step(
    model: nn.Module, objective: fastadv.Objective, awp: fastadv.AWP, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor
) -> fastadv.Output:
    """Without AWP it is ``out = objective(model, x, y)`` and the last three lines of any loop."""
    with torch.autocast(DEVICE, torch.bfloat16, enabled=MIXED):
        x_adv = objective.adversarial(model, x, y)  # once: the weights move up, then down, the loss of the same images
        with awp.perturb(lambda: objective.loss(model, x, y, x_adv)):
            out = objective.forward(model, x, y, x_adv)
            optimizer.zero_grad()
            out.loss.backward()  # here, where the weights are perturbed
    objective.observe(out.logits, y)  # for methods that remember something; calling the objective does it by itself
    optimizer.step()  # here, where they are back
    return out


def main() -> None:
    torch.manual_seed(0)  # of the random starts
    digits = load_digits()
    model = small_cnn().to(DEVICE)
    objective = fastadv.TRADES(fastadv.TRADES.paper_attack(model, eps=EPS, alpha=EPS / 4), beta=3.0)
    awp = fastadv.AWP(model, gamma=5e-3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)
    generator = torch.Generator().manual_seed(0)
    x_test, y_test = digits.x_test.to(DEVICE), digits.y_test.to(DEVICE)
    judge = fastadv.PGD(model, EPS, steps=20)
    for epoch in range(EPOCHS):
        for x, y in shuffled_batches(digits.x_train, digits.y_train, generator):
            out = train_step(model, objective, awp, optimizer, x.to(DEVICE), y.to(DEVICE))
        objective.end_epoch()
        clean, robust = accuracy(model, x_test, y_test), accuracy(model, x_test, y_test, judge)
        print(f"epoch {epoch + 1}   loss {out.loss:.3f}   clean {clean:.1%}   PGD-20 {robust:.1%}", flush=True)


if __name__ == "__main__":
    main()
