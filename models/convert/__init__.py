"""Converts GGUF files to ONNX folders."""
