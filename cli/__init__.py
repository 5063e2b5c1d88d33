"""The command line: click, one command a file."""
