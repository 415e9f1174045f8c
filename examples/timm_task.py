"""timm: adversarial training as a task, which is what its training script calls for a loss.

    python examples/timm_task.py

Trains timm's smallest ResNet on 4,000 digits, about two minutes on two CPU cores. Needs `pip install "fastadv[demo]" timm`.
"""

from __future__ import annotations

from typing import Any

import timm
import torch
from timm.optim import create_optimizer_v2
from timm.task import ClassificationTask
from torch import Tensor, nn

import fastadv
from fastadv.demo import accuracy, load_digits, shuffled_batches

EPS, EPOCHS = 0.2, 3
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MIXED = DEVICE == "cuda"


class RobustTask(ClassificationTask):
    """TRADES, with timm's criterion on the clean images. What wraps, compiles, averages and saves the model is inherited.

    No AWP: it takes the gradient inside a block of its own, and a task leaves that to its caller.
    """

    def __init__(self, model: nn.Module, eps: float, **options: Any) -> None:
        super().__init__(model, **options)
        attack = fastadv.TRADES.paper_attack(model, eps=eps, alpha=eps / 4)  # bare; trainable_module may be wrapped later
        self.objective = fastadv.TRADES(attack, beta=3.0, label_loss=self.criterion)

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        out = self.objective(self.trainable_module, input, target)
        return {"loss": out.loss, "output": out.logits, **out.metrics}


def main() -> None:
    torch.manual_seed(0)
    digits = load_digits()
    net = timm.create_model("test_resnet", num_classes=10, in_chans=1)
    # Images stay in [0, 1], where eps is counted, and the model normalises: in timm's script, --mean 0 0 0 --std 1 1 1.
    model = nn.Sequential(fastadv.Normalize(0.1307, 0.3081), net).to(DEVICE)
    task = RobustTask(model, EPS, criterion_kwargs={"smoothing": 0.1}, device=torch.device(DEVICE))
    optimizer = create_optimizer_v2(task.get_trainable_module(), opt="adamw", lr=2e-3, weight_decay=0.05)
    generator = torch.Generator().manual_seed(0)
    for epoch in range(EPOCHS):
        task.train()
        for x, y in shuffled_batches(digits.x_train, digits.y_train, generator):
            with torch.autocast(DEVICE, torch.bfloat16, enabled=MIXED):
                result = task(x.to(DEVICE), y.to(DEVICE))
            optimizer.zero_grad()
            result["loss"].backward()
            optimizer.step()
        task.eval()
        found = task.get_eval_model()
        x, y, judge = digits.x_test.to(DEVICE), digits.y_test.to(DEVICE), fastadv.PGD(found, EPS, steps=20)
        clean, robust = accuracy(found, x, y), accuracy(found, x, y, judge)
        print(f"epoch {epoch + 1}   loss {result['loss']:.3f}   clean {clean:.1%}   PGD-20 {robust:.1%}", flush=True)


if __name__ == "__main__":
    main()
