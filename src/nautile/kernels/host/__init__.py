"""Routed experts computed on the host's cores while the card waits for others: one C++ file, called through ctypes."""

from nautile.kernels.host.team import ExpertJob, ExpertStream, HostTeam, host_fast_path, read_rate_words

__all__ = ["ExpertJob", "ExpertStream", "HostTeam", "host_fast_path", "read_rate_words"]
