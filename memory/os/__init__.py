"""Memory of the operating system: pages, file mappings, shared libraries, control groups."""
