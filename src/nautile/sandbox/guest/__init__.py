"""Virtual machines: their kernel, their first program, the disks they see, and the processes that keep them on the host."""
