"""TidalDecode: a few layers select keys, the others reuse the selection."""
