"""The version, in the one place where packaging and `fiber.__version__` read it."""

__version__ = "1.0.0.dev0"
