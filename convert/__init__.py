"""Checkpoints in and out of jvjepa's format, and proof that they mean the same."""
