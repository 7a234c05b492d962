"""Export of jvjepa's models to runtimes without JAX; its modules arrive with the first format."""
