"""What is stored per token and where: specs, block pool, prefix index, manager and device tensors."""
