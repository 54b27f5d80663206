"""ONNX in, ONNX out; knows nothing of quantization."""
