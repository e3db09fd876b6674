"""What MLX's affine quantization can run: w = scale · q + bias, with q of few bits, in groups along a row."""

#: Bits of weights, and how many neighbouring weights of a row share a scale and a bias.
WEIGHT_BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)
DEFAULT_GROUP_SIZE = 64
