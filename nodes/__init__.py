"""Nodes for other programs: a package for each, none of which the library imports."""
