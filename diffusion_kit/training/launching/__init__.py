"""Starting a training in several processes, on this machine or on others; every way is the engine's own launcher."""
