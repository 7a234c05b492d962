"""Training for jvjepa's models; its modules arrive with the first recipe."""
