"""Where tensors come from: safetensors, PyTorch's pickles and GGUF."""
