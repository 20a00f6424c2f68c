"""Decode steps as static graphs: the step itself, how graphs are keyed, compiled, kept, found and replayed."""
