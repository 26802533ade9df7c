"""Metrics of generated audio against recordings: Frechet distance, words, opinion, speaker, spectral distortion."""
