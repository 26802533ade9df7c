"""A run's configuration: dataclasses that check themselves, presets, YAML files and `section.field=value` changes."""

from ...data.latents import LatentConfig
from ...data.mel import MelConfig
from .alignment import AlignmentConfig, ProbeConfig, TeacherConfig
from .data import DataConfig
from .load import dump_config, load_config, override_config
from .model import FlowConfig, ModelConfig
from .presets import RUN_PRESETS
from .run import RunConfig
from .train import OptimizerConfig, TrainConfig

__all__ = [
    "RUN_PRESETS",
    "AlignmentConfig",
    "DataConfig",
    "FlowConfig",
    "LatentConfig",
    "MelConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ProbeConfig",
    "RunConfig",
    "TeacherConfig",
    "TrainConfig",
    "dump_config",
    "load_config",
    "override_config",
]
