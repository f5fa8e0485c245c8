"""Other ways to the same result, written for comparison by the benchmarks. Nothing here is part of the package."""
