"""`relaxlm verify`: a compiled library against the original model in transformers.

verify.py        opens library, weights and checkpoint, runs both sides, compares
reference.py     the original in torch, on the CPU in float32
compiled.py      the library, run as the runtime runs it
kept_weights.py  what a preset keeps of the checkpoint, and whether the folder holds that
metrics.py       distances of logits and of the residual stream
limits.py        how large they may be, and how that was measured
results.py       findings and verdict;  report.py  as text
"""
