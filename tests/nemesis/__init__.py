"""The nemesis: the whole system under faults, and a checker that knows what must be there afterwards.

Two real workers, two beats, a broker and a PostgreSQL of its own, and a producer in plain Celery; beside them, on the
same broker, another application with a worker of its own, whom nothing of this may concern. Worker, beat and broker are
killed, a worker is stopped for longer than the visibility timeout, PostgreSQL is ended as by a crash, somebody locks
wallets, and more reservations than one transaction releases expire at once. One seed decides on the messages and on the
order of the faults, but the moments are the machine's: the same seed is the same plan, not the same run.

Out of its scope is a power cut: a kill costs the broker nothing that it has handed to the kernel, but with `appendfsync
everysec` a power cut costs it up to the last second. Nor does it lose or delay packets, or fill a disk.
"""
