"""The version of the distribution; on its own, so that packaging reads it without JAX."""

__version__ = "0.1.0"
