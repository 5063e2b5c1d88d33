"""From a plan to a loaded model: weights, kernels, speculation."""
