"""The diffusion transformer, its condition and flow matching."""
