"""The benchmark suite, installed as `agrepa_fast.bench`: cases, protocol, gate, results, report.

A case is one set-up shared by correctness, speed and memory; nothing is timed before its numbers are checked.
"""
