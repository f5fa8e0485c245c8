"""Every benchmark in turn: python -m bench [--csv FOLDER] [--png FOLDER]."""

import importlib

if __name__ == "__main__":
    passes = ("packing", "mask", "mvue", "activation", "activation_packing")
    products = ("gemm", "gemm_activations", "grad_weight", "epilogue")
    for name in (*passes, *products, "ffn", "tokens", "block", "step"):
        importlib.import_module(f"bench.bench_{name}").main()
