"""The weights (N, K) of three models' layers, as the GPU benchmarks and the roofline take them. N outputs, K inputs.

Where a model's layers share their input, the weights of one call for all of them stand there too.
"""

MODELS: dict[str, dict[str, tuple[int, int]]] = {
    "smollm2-135m": {
        "k, v": (192, 576),
        "q, o": (576, 576),
        "q+k+v": (960, 576),
        "gate, up": (1536, 576),
        "gate+up": (3072, 576),
        "down": (576, 1536),
    },
    "llama-3-8b": {
        "k, v": (1024, 4096),
        "q, o": (4096, 4096),
        "q+k+v": (6144, 4096),
        "gate, up": (14336, 4096),
        "gate+up": (28672, 4096),
        "down": (4096, 14336),
    },
    "llama-3-70b": {
        "k, v": (1024, 8192),
        "q, o": (8192, 8192),
        "q+k+v": (10240, 8192),
        "gate, up": (28672, 8192),
        "gate+up": (57344, 8192),
        "down": (8192, 28672),
    },
}
ROWS = (1, 4, 16, 64, 256, 1024, 4096)
"""M: rows of activations"""
