"""Frozen audio encoders whose features the student is aligned to. Importing this needs torch alone."""

from .base import Teacher
from .registry import build_teacher, register_teacher

__all__ = ["Teacher", "build_teacher", "register_teacher"]
