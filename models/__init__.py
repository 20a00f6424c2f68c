"""What a checkpoint brings: typed configuration, tokenizer, chat template, weights, layers and decoders."""
