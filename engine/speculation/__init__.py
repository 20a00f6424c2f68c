"""Speculative decoding: who drafts, what is accepted, and the configuration of both."""
