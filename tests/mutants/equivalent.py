"""Faults that change nothing that a user could see, each with the reason: they are not tried and not counted.

(file, part of the fault's description as the runner prints it): reason. A fault that no CPU can see says so.
"""

EQUIVALENT: dict[tuple[str, str], str] = {
    ("pack/mvue_group.h", "return a <= b ? a : b"): "of two equal magnitudes either is the smaller",
    (
        "pack/mvue_group.h",
        "{ return sum < bits_f",
    ): "the way of infinite sums, scaling by 2^-8, gives any group its bits",
    ("pack/pack_group.h", "uint32_t i = 0; i < 5"): "no pair begins with a fifth element",
    ("pack/two_of_four.h", "uint32_t place[5]"): "nobody reads a fifth place",
    ("pack/mvue_group.h", "i < 5"): "reads behind the group: seen under the sanitizers of .ci/run",
    ("gemm/stream_k.h", "return begin <= k_tiles ? begin : k_tiles"): "of two equal numbers either is the smaller",
    ("cpu/parallel.cpp", "kElementsPerThread"): "how many threads are worth their start: results are the same",
    ("cpu/parallel.cpp", "threads.reserve"): "room that a vector asks for in advance",
    ("common/tensor_list.h", "kTensorsPerLaunch = 33"): "lists of 33 tensors work too",
    ("common/tensor_list.h", "kKernelParameterBytes = 4097"): "no CPU sees it: the limit of CUDA's kernel parameters",
    ("common/tensor_list.h", "int step = 2"): "a bisection that begins with a longer step finds the same",
    ("common/tensor_list.h", "first_tile[kCapacity + 2]"): "room for one more",
    ("common/philox.h", "uint32_t word[5]"): "room for one more",
    ("functional/accumulation.py", "torch.cuda."): "no CPU sees it: which streams of a GPU autograd waits for",
    ("recipe/monitor.py", "arrived.record()"): "no CPU sees it: what waits for a copy from a GPU",
    ("recipe/monitor.py", "arrived.synchronize()"): "no CPU sees it: what waits for a copy from a GPU",
    ("recipe/monitor.py", "pin_memory=True"): "no CPU sees it: it makes a copy to the host asynchronous",
    ("recipe/monitor.py", "non_blocking=True"): "no CPU sees it: whether the host waits for a copy",
    ("pretrain/tokens.py", "CACHE_VERSION"): "another number marks the files as well",
    ("pretrain/tokens.py", "CHUNKS_AT_ONCE"): "how much text is in memory at once",
    ("pretrain/tokens.py", "digest_size"): "a digest of another length is a digest too",
    ("pretrain/text.py", "digest_size"): "a digest of another length is a digest too",
    ("pretrain/text.py", "BLOCK_BYTES = 1 << 20"): "how much of a file is in memory at once",
    ("pretrain/tokens.py", "self._epoch, self._starts = -1"): "any epoch that is none, any array that is replaced",
    ("pretrain/tokens.py", "comparison: count > batch"): "the remainder of a batch's own size is zero",
    ("convert/candidates.py", "number: 5 -> 6 in close"): "how many names that come close a message shows",
    ("save/folders.py", "number: 4 -> 5 in others"): "how many checkpoints a message shows",
    ("save/fitting.py", "number: 2 -> 3 in small"): "a parameter of any small size makes the same states",
}

#: of those that are tried, the share that tests must see
ENOUGH = 0.95


def why_equivalent(file: str, what: str) -> str | None:
    """The reason for which nobody could see this fault, or None."""
    return next((why for (of, part), why in EQUIVALENT.items() if of == file and part in what), None)


def verdict(killed: int, survived: int) -> bool:
    """Prints the share and tells whether it is enough."""
    share = killed / max(1, killed + survived)
    print(f"{killed} of {killed + survived} killed: {100 * share:.1f} %, {survived} survived")
    return share >= ENOUGH
