"""Sharded checkpoints: atomic, resumable on another number of processes.

checkpointer  saves beside the training, loads, keeps the newest
files         what lies on disk, and how damage is found
"""

from gptfast.checkpoint.checkpointer import Checkpointer

__all__ = ["Checkpointer"]
