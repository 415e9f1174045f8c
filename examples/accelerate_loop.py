"""Hugging Face accelerate: a loop with TRADES and weight perturbation (AWP), in bf16, on as many devices as it is started on.

    python examples/accelerate_loop.py        # or: accelerate launch examples/accelerate_loop.py

Trains a small network on 4,000 digits, a minute or two on two CPU cores. Needs `pip install "fastadv[demo]" accelerate`.
"""

from __future__ import annotations

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader, TensorDataset

import fastadv
from fastadv.demo import accuracy, load_digits, small_cnn
from fastadv.training import descents

EPS, EPOCHS, BATCH = 0.2, 5, 50


def main() -> None:
    accelerator = Accelerator(mixed_precision="bf16")
    set_seed(0, device_specific=True)  # each process attacks its part of the batch from random starts of its own
    digits = load_digits()
    net = small_cnn()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, nesterov=True)
    loader = DataLoader(TensorDataset(digits.x_train, digits.y_train), BATCH, shuffle=True)
    model, optimizer, loader = accelerator.prepare(net, optimizer, loader)

    # The attack runs on the bare model, so that no process waits for another in it, and still in accelerate's autocast.
    bare = accelerator.unwrap_model(model)
    objective = fastadv.TRADES(fastadv.TRADES.paper_attack(bare, eps=EPS, alpha=EPS / 4), beta=3.0)
    awp = fastadv.AWP(model, gamma=5e-3)  # on the wrapped one, by which all processes perturb the weights alike
    judge = fastadv.PGD(bare, EPS, steps=20)

    x_test, y_test = digits.x_test.to(accelerator.device), digits.y_test.to(accelerator.device)
    for epoch in range(EPOCHS):
        for x, y in loader:
            for _ in descents(objective, model, x, y, accelerator.backward, awp):
                optimizer.step()
                optimizer.zero_grad()
        objective.end_epoch()
        clean, robust = accuracy(bare, x_test, y_test), accuracy(bare, x_test, y_test, judge)
        accelerator.print(f"epoch {epoch + 1}   clean {clean:.1%}   PGD-20 {robust:.1%}", flush=True)


if __name__ == "__main__":
    main()
