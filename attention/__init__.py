"""Which keys a query sees, and the kernels that compute it."""
