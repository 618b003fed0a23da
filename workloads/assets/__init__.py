"""Committed pictures, words and tables of the embedded benchmark, with their notices, as package data."""
