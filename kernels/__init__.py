"""Fused element-wise operators of the Next-DiT block, each beside its eager reference.

Imports nothing heavy and never raises: transformers probes a top-level package of this name at
import time (docs/adr/0002-the-kernels-name.md). Import the operators from their own modules.
"""
