"""Training controls and bases: the objective, the targets, data, caches, the loop and its checkpoints."""
