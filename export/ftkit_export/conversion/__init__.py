"""A module to ONNX: preprocessing in the graph, int8 and float16, plain C, class activation maps."""
