"""The device mesh, several processes, preemption, and the C allocator."""
