"""Where random numbers come from: every seed is made of (run seed, purpose, position in the run).

Nothing else enters: not the rank, not the worker process, not how often the run was restarted. So the data that a step
sees depends on the step alone.
"""

import hashlib


def seed_for(seed: int, purpose: str, *position: int) -> int:
    """Derives an independent seed in [0, 2**63), for example for "augment" at one position of the run."""
    text = ":".join([str(seed), purpose, *map(str, position)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
