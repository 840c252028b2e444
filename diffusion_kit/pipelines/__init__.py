"""Families of pipelines, the factories over them, and the peer-named classes."""
