"""How an attack runs a model: forward passes and input gradients and nothing else, the model left as it was found."""

from .engine import ENGINES, MEMORIES, Engine, Plan, Run, Stats
from .guest import BN_MODES, Model, attacking, input_gradient, round_towards, unwrap
from .loop import Loop
from .passes import PRECISIONS, Loss, Losses, Passes

__all__ = [
    "BN_MODES", "ENGINES", "MEMORIES", "PRECISIONS", "Engine", "Loop", "Loss", "Losses", "Model", "Passes", "Plan", "Run",
    "Stats", "attacking", "input_gradient", "round_towards", "unwrap",
]  # fmt: skip
