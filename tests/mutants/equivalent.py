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
    ("pack/mvue_group.h", "i < 5"): "reads behind the group: seen under the sanitizers of .ci/run",
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
