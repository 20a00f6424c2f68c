"""Answers of a given structure: grammars checked in a process of their own, and the masks that keep to them."""
