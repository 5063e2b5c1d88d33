"""ONNX models: decoders as exporters write them, run by onnxruntime."""
