"""What one run is: model, data, adapter, training and evaluation of a single configuration."""

__version__ = "0.1.0"
