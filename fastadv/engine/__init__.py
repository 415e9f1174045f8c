"""How an attack runs a model: forward passes and input gradients and nothing else, the model left as it was found."""

from .guest import BN_MODES, Model, attacking, input_gradient, round_towards, unwrap

__all__ = ["BN_MODES", "Model", "attacking", "input_gradient", "round_towards", "unwrap"]
