"""The version of ptq3d, where everything may read it."""

__version__ = "0.1.0"
