"""Triton kernels and how each is launched. Imports Triton, so the operators import it lazily."""
