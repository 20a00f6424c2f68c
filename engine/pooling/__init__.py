"""Pooling models, whose answers are vectors and scores: what comes in, what is computed, what goes out."""
