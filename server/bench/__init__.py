"""`omni-engine bench`: how fast an engine or a server is, with vLLM's flags, printed labels and JSON keys."""
