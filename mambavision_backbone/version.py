"""The package's version (standard library only, so that the installer can read it)."""

__version__ = "0.1.0"
