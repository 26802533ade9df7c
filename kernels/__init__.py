"""Triton kernels of agrepa-fast, installed as `agrepa_fast.kernels`. Import them through `agrepa_fast.ops`."""
