"""Which kernels a backend uses, and the repacked copies of the weights that they read."""
