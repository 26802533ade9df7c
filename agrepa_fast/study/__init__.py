"""A study: arms (ways to choose the aligned layers) x seeds x settings, trained from shared warm-ups and compared."""
