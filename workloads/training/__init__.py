"""Engine, loop, optimisation and checkpoints."""
