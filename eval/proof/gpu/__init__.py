"""Proof on a GPU: kernels checked, then timed beside baselines, then the whole decode step.

`decodebench kernels --check --bench` runs it; results are CSV files that a later call goes on with.
"""
