"""The soak: random damage to everything that is read, kills, full and closed disks, and odd requests; `make soak MINUTES=5`.

What may come of it is success, or one clear error of ours: no traceback, no hang, no file lost, no wrong tensors.
"""
