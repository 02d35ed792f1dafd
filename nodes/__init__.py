"""Nodes for other programs, in a package for each. The library imports none of them."""
