"""Every benchmark in turn: python -m bench [--csv FOLDER] [--png FOLDER]."""

import importlib

if __name__ == "__main__":
    kernels = ("packing", "mask", "mvue", "activation", "gemm", "gemm_activations", "grad_weight", "epilogue")
    for name in (*kernels, "ffn", "tokens", "block", "step"):
        importlib.import_module(f"bench.bench_{name}").main()
