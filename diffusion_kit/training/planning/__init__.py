"""What a training will need before it is run: bytes of memory, bytes between processes, operations."""
