"""What the operating system keeps resident: pages, mappings, shared libraries, cgroups."""
