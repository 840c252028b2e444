"""Controls, the kinds of them, and the detectors that make control images."""
