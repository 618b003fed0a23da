"""Tests of what the tables and pages show."""
