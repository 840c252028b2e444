"""The parts of scripts/verify_scale.py: trainings in several processes, really run."""
