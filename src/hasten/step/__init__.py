"""Calls of the transformer: the run and step of each, and the layers in front of its forward."""
