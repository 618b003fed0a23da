"""Answers, scorers, statistics and conflict metrics."""
