"""What users write: the names of options, their values, paths, and the folders of their files."""
