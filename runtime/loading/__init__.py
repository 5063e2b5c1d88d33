"""From a memory plan to a loaded model: weights, kernels, speculation."""
