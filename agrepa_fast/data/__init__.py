"""From a list of clips to fixed-shape batches. Sound files and mels need the extra `audio`."""

from .batches import Batch
from .buckets import BucketBatches
from .corpus import write_corpus
from .dataset import ClipDataset
from .loading import iterate
from .manifest import read_manifest
from .mel import MEL_PRESETS, LogMel, MelConfig

__all__ = [
    "MEL_PRESETS",
    "Batch",
    "BucketBatches",
    "ClipDataset",
    "LogMel",
    "MelConfig",
    "iterate",
    "read_manifest",
    "write_corpus",
]
