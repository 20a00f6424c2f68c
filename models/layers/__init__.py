"""The layers decoders are built from, each with the checkpoint tensors it loads."""
