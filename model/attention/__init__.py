"""Attention over packed sequences: full and bidirectional inside each, none across.

Several implementations do the same; `choose_backend` picks one for a device and dtype. A backend's
`plan` makes, once per layout, the function every block then calls.
"""

from model.attention.plan import Attend
from model.attention.registry import BACKENDS, Backend, available_backends, choose_backend

__all__ = ["BACKENDS", "Attend", "Backend", "available_backends", "choose_backend"]
