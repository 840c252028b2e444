"""Engines and levels beside diffusers and other runtimes: each in its own process, in turn, compared pair by pair."""
