"""Side-by-side benchmarks: what adapter methods cost beside their peers, interleaved in one process on one thread."""
