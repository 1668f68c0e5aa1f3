"""Sandboxes on many machines: an edge owns those of one machine, gateways place and route, and keep nothing themselves.

    client ── token ──> gateway ── secret ──> edge ──> the same substrates as in one process

``wire`` is what they say to each other, ``edge`` owns sandboxes, ``edge_server`` and ``gateway`` speak HTTP, ``placement``
chooses, ``watcher`` knows which edges there are, ``quota`` knows who may have how much, ``client`` is a ``Driver``.
docs/fleet.md is the manual.
"""
