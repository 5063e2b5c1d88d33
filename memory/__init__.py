"""Memory: budgets, the memory plan, and resident memory of the operating system."""
