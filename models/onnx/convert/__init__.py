"""GGUF to ONNX: a folder that onnxruntime-genai, and lowtide itself, load and run."""
