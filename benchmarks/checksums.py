"""CPU seconds of the checksums that a checkpoint of 1 GB of float32 could have, as a markdown
table.

    python benchmarks/checksums.py

64 arrays, each hashed by one thread, on as many threads as there are cores. Wall-clock seconds
beside them need a machine that does nothing else.
"""

import hashlib
import os
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np

KINDS = {name: getattr(hashlib, name) for name in ("sha256", "blake2b", "sha1", "md5")}
KINDS |= {"crc32 (zlib)": zlib.crc32, "adler32 (zlib)": zlib.adler32}


def main() -> None:
    arrays = [
        np.random.default_rng(i).random(2**22, np.float32).view(np.uint8).data for i in range(64)
    ]
    print(f"| checksum, {os.cpu_count()} cores | CPU s | s |\n|---|---|---|")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for name, digest in KINDS.items():
            wall = time.perf_counter()
            cpu = time.process_time()
            list(pool.map(digest, arrays))
            print(
                f"| {name} | {time.process_time() - cpu:.2f} | {time.perf_counter() - wall:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
