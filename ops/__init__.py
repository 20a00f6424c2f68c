"""What a device can do: one module per op family, each function with its plain torch body."""
