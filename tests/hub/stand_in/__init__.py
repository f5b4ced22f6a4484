"""A stand-in for the Hugging Face Hub on loopback: enough of its HTTP for the real clients, and nothing beyond this machine.

`hub.Hub` is what a test holds; the routes are in reading.py, writing.py, lfs.py and xet.py.
"""

from .hub import Hub

__all__ = ["Hub"]
