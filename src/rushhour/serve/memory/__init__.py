"""The memory that requests hold: its budget, the allocator's rules, compressed bodies, and shared memory."""
