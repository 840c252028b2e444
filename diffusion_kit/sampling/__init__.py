"""The sampling core: schedule, guidance, the step as a function of tensors, and the one loop.

Knows tensors and callables, no model and no pipeline by name, and imports neither diffusers nor transformers: a
scheduler is read by its attributes (`schedule.py`).
"""
