"""Puts our attention in the place of a decoder's attention nodes; the rest of the graph stays as it is."""
