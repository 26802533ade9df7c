"""Frozen audio encoders whose features the student is aligned to. Importing this needs torch alone."""

from .base import Teacher
from .cache import FeatureKey, dequantise, feature_path, read_features, write_features
from .registry import build_teacher, register_teacher

__all__ = [
    "FeatureKey",
    "Teacher",
    "build_teacher",
    "dequantise",
    "feature_path",
    "read_features",
    "register_teacher",
    "write_features",
]
