"""The paired benchmark: several configurations of one model, interleaved, each in a process of its own."""
