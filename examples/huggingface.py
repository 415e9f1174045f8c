"""Hugging Face image classification: a Trainer that trains adversarially, and measures robust accuracy when it evaluates.

    python examples/huggingface.py

Trains a tiny ResNet on 4,000 digits, a minute or two on two CPU cores. Needs
`pip install "fastadv[demo]" transformers accelerate`.
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from torch import Tensor, nn
from transformers import EvalPrediction, ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments

import fastadv
from fastadv.demo import load_digits

EPS, EPOCHS, BATCH = 0.1, 3, 50


class Logits(nn.Module):
    """A Hugging Face model as fastadv takes one: images in, logits out. A module, so that an attack finds its batch norms."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(pixel_values=(x - 0.5) / 0.5).logits  # normalised here, not before, so that eps is in pixels


class RobustTrainer(Trainer):
    """PGD adversarial training; ``pixel_values`` are in [0, 1]: ``do_normalize=False`` in the image processor."""

    def __init__(self, *args: Any, eps: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Many models claim to count the items of accumulated batches in their loss. This one is a mean, to be divided.
        self.model_accepts_loss_kwargs = False
        starts = torch.Generator(self.args.device).manual_seed(self.args.process_index)  # Trainer seeds all processes alike
        attack = fastadv.PGD(Logits(self.model), eps, generator=starts)  # self.model is bare, whatever wraps it later
        self.objective = fastadv.PGDAT(attack)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        x, y = inputs["pixel_values"], inputs["labels"]
        out = self.objective(Logits(model), x, y)
        return (out.loss, {"logits": out.logits_adv}) if return_outputs else out.loss  # evaluate() attacks, too


def rows(x: Tensor, y: Tensor) -> list[dict[str, Any]]:
    return [{"pixel_values": image, "labels": label} for image, label in zip(x, y.tolist(), strict=True)]


def robust_accuracy(prediction: EvalPrediction) -> dict[str, float]:
    return {"robust_accuracy": float((prediction.predictions.argmax(1) == prediction.label_ids).mean())}


def main(**settings: Any) -> None:
    """``settings``: of TrainingArguments, such as ``bf16=True``, in which attacks then run too."""
    torch.manual_seed(0)
    digits = load_digits()
    size = {"embedding_size": 16, "hidden_sizes": [32, 64], "depths": [1, 1], "layer_type": "basic"}
    model = ResNetForImageClassification(ResNetConfig(num_channels=1, num_labels=10, **size))
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, num_train_epochs=EPOCHS, per_device_train_batch_size=BATCH, per_device_eval_batch_size=250,
            learning_rate=2e-3, eval_strategy="epoch", save_strategy="no", report_to="none", **settings,
        )  # fmt: skip
        data = {"train_dataset": rows(digits.x_train, digits.y_train), "eval_dataset": rows(digits.x_test, digits.y_test)}
        trainer = RobustTrainer(model, arguments, **data, compute_metrics=robust_accuracy, eps=EPS)
        trainer.train()
        print(f"robust accuracy {trainer.evaluate()['eval_robust_accuracy']:.1%}")


if __name__ == "__main__":
    main()
