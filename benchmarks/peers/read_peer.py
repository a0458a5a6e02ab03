"""A loop that reads memory and adds, on relaxlm's threads: the read bandwidth of `compare.py`.

    python read_peer.py serve FOLDER THREADS

Answers {"do": "read"} with {"seconds": ...} for one pass over as many bytes as it says when ready.
"""

import json
import os
import sys

if __name__ == "__main__":
    os.environ["TVM_NUM_THREADS"] = sys.argv[3]
    from relaxlm.profiling.roofline import ReadLoop

    loop = ReadLoop()
    print(json.dumps({"ready": True, "nbytes": loop.nbytes}), flush=True)
    for _ in sys.stdin:
        loop.run()  # not counted: it wakes the threads
        speeds = sorted(loop.run() for _ in range(5))
        print(json.dumps({"seconds": loop.nbytes / speeds[2]}), flush=True)
