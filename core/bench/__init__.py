"""Measurements beside a peer: of a step's speed and memory, and of methods on the same photos."""
