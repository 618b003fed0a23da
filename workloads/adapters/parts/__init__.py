"""What adapter methods share beyond base.py; every file beside this folder is a method."""
