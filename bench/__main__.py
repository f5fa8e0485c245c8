"""Every benchmark in turn: python -m bench [--csv FOLDER] [--png FOLDER]."""

import importlib

if __name__ == "__main__":
    for name in ("compress", "mask", "mvue", "activation", "gemm", "epilogue", "ffn", "tokens", "block", "step"):
        importlib.import_module(f"bench.bench_{name}").main()
