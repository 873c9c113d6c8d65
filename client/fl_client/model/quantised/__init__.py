"""Int8 and int4 weights in groups of 128: tensors, layers, products on CPU and GPU."""
