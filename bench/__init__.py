"""The benchmark suite, installed as `agrepa_fast.bench`: cases, protocol, gate, results, report.

Correctness, speed and memory of a case share one set-up. Nothing is timed before its numbers are checked.
"""
