"""Samples: sources, mixtures, the stream and batches."""
