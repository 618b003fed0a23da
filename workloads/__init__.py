"""What one run is: model, data, adapter, training and evaluation of a single configuration."""
