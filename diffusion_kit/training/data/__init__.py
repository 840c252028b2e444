"""From files to batches: sources, order, crops, captions and the cache."""
