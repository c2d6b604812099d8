"""Flow-map pretraining and on-policy distillation, in pieces that each work alone.

`objectives` holds the losses, `data` the samples, `trainer` the loop that `train` runs from a `config`, `demo` the
synthetic videos and the model that learns them.
"""

from __future__ import annotations

from .config import TrainConfig
from .demo.demo_model import DemoModel
from .objectives.dmd import ScoreConfig, UpdateCadence, dmd_gradient, dmd_loss, fake_score_loss, generator_score_loss
from .objectives.far_training import FarClip, FarVelocity, draw_num_chunks
from .objectives.flow_map_loss import FlowMapConfig, LossResult, flow_map_loss, flow_matching_loss
from .objectives.flow_map_target import flow_map_target, total_derivative
from .objectives.gan import DiscriminatorHeads, approximate_r1, discriminator_gan_loss, generator_gan_loss
from .objectives.guidance import drop_text, fused_prediction
from .objectives.loss_weights import LossWeight
from .objectives.on_policy import GanConfig, OnPolicy, OnPolicyConfig
from .objectives.pretraining import FarConfig, PretrainConfig, Pretraining, TrainingBatch
from .objectives.rebalance import DiffusionMean, rebalance
from .objectives.rollout import RolloutDraw, draw_rollout, far_rollout, rollout
from .objectives.timesteps import (
    GlobalBatch,
    TimePairs,
    assign_buckets,
    pair_times,
    sample_time_pairs,
    schedule,
    shift_time,
)
from .objectives.velocity import BidirectionalVelocity, Velocity
from .recipes import load_recipe
from .trainer import EMA, add_lora, lora_state_dict, merge_lora, train

__all__ = [
    "EMA", "BidirectionalVelocity", "DemoModel", "DiffusionMean", "DiscriminatorHeads", "FarClip", "FarConfig",
    "FarVelocity", "FlowMapConfig", "GanConfig", "GlobalBatch", "LossResult", "LossWeight", "OnPolicy",
    "OnPolicyConfig", "PretrainConfig", "Pretraining", "RolloutDraw", "ScoreConfig", "TimePairs", "TrainConfig",
    "TrainingBatch", "UpdateCadence", "Velocity", "add_lora", "approximate_r1", "assign_buckets",
    "discriminator_gan_loss", "dmd_gradient", "dmd_loss", "draw_num_chunks", "draw_rollout", "drop_text",
    "fake_score_loss", "far_rollout", "flow_map_loss", "flow_map_target", "flow_matching_loss", "fused_prediction",
    "generator_gan_loss", "generator_score_loss", "load_recipe", "lora_state_dict", "merge_lora", "pair_times",
    "rebalance", "rollout", "sample_time_pairs", "schedule", "shift_time", "total_derivative", "train",
]  # fmt: skip
