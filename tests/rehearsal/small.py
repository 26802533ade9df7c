"""The small run of these tests: its teachers' widths, and overrides of the configuration."""

TEACHERS = {"speech": 12, "audio": 8}
SIZES = (
    "mel.mels=16",
    "model.depth=2",
    "model.width=16",
    "model.heads=2",
    "model.token_width=8",
    "model.dropout=0.1",
    "data.buckets=2",
    "probe.k=2",
)
