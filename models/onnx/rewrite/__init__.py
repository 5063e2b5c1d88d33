"""Rewrites ONNX graphs so that lowtide's kernels run in them."""
