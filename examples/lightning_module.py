"""PyTorch Lightning: a module that trains adversarially, and one with weight perturbation (AWP), which optimises by hand.

    python examples/lightning_module.py

Trains a small network on 4,000 digits, a minute or two on two CPU cores. Needs `pip install "fastadv[demo]" lightning`.
"""

from __future__ import annotations

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fastadv
from fastadv.demo import load_digits, small_cnn
from fastadv.training import descents

EPS, EPOCHS, BATCH = 0.2, 5, 50


class Robust(lightning.LightningModule):
    """What differs from any other module is the line with ``objective`` in it."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net  # attacked bare: Lightning wraps the whole module, never this part of it
        self.objective = fastadv.TRADES(fastadv.TRADES.paper_attack(net, eps=EPS, alpha=EPS / 4), beta=3.0)
        self.judge = fastadv.PGD(net, EPS, steps=20)

    def on_fit_start(self) -> None:  # Lightning seeds all processes alike; each draws random starts of its own
        self.objective.draw_from(torch.Generator(self.device).manual_seed(self.global_rank))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        out = self.objective(self.net, x, y)
        self.log_dict(out.metrics, prog_bar=True)
        return out.loss

    def on_train_epoch_end(self) -> None:
        self.objective.end_epoch()

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        x, y = batch
        x_adv = self.judge(x, y)  # although Lightning validates in inference mode: an attack turns gradients on for itself
        scores = {name: (self.net(each).argmax(1) == y).float().mean() for name, each in (("clean", x), ("PGD-20", x_adv))}
        self.log_dict(scores, prog_bar=True, sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, nesterov=True)


class RobustAWP(Robust):
    """AWP takes the gradient inside a block of its own, so Lightning's automatic optimisation cannot."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        self.automatic_optimization = False
        self.awp = fastadv.AWP(net, gamma=5e-3, sync="global")  # said here, as the bare net does not tell of other processes

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        x, y = batch
        optimizer = self.optimizers()
        for out in descents(self.objective, self.net, x, y, self.manual_backward, self.awp):
            optimizer.step()
            optimizer.zero_grad()
            self.log_dict(out.metrics, prog_bar=True)


def main(module: type[Robust] = RobustAWP, **settings: object) -> None:
    """``settings``: of the Trainer, such as ``precision="bf16-mixed"``, in which attacks then run too."""
    lightning.seed_everything(0)
    digits = load_digits()
    loader = DataLoader(TensorDataset(digits.x_train, digits.y_train), BATCH, shuffle=True)
    test_loader = DataLoader(TensorDataset(digits.x_test, digits.y_test), 250)
    trainer = lightning.Trainer(max_epochs=EPOCHS, logger=False, enable_checkpointing=False, **settings)
    trainer.fit(module(small_cnn()), loader, test_loader)
    if trainer.is_global_zero:
        print("   ".join(f"{name} {trainer.callback_metrics[name]:.1%}" for name in ("clean", "PGD-20")))


if __name__ == "__main__":
    main()
