"""Micro-batches for ever: order, supplies from files or from a cache, bad images, the loader."""
