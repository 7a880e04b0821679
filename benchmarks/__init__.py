"""Benchmarks: one file per subject, named workloads, results in `results/`. Run `python -m benchmarks`."""
